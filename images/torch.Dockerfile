# The layer that train and serve share: torch and the diffusion libraries, 5 GB. Our code is not in it, so it is built
# again only when torch.lock or its base changes.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS tools
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    UV_PYTHON_DOWNLOADS=never \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1
COPY requirements/images/tools.lock /locks/
# A mirror's address may hold a password: it is an argument of a stage that no image contains.
ARG PIP_INDEX_URL
ARG UV_DEFAULT_INDEX=${PIP_INDEX_URL}
RUN python3 -m venv /opt/tools && \
    /opt/tools/bin/python -m pip install -q --no-cache-dir --require-hashes -r /locks/tools.lock

FROM tools AS packages
ARG UV_DEFAULT_INDEX
ARG PIP_INDEX_URL
# cuda: the wheel that torch.lock names and hashes. Another backend of uv, such as cpu or cu126: see images/README.md.
ARG TORCH_BACKEND=cuda
ARG TORCH_SHA256
COPY requirements/images/torch.lock images/install-torch.sh /locks/
RUN sh /locks/install-torch.sh /opt/latentac /locks/torch.lock
# Without bytecode every start of a container parses torch anew, and the root is read-only then: all of the small
# packages, and of the large ones what a run imports. Templates in some packages are no Python, hence `|| true`.
RUN /opt/latentac/bin/python -c "\
import torch, torch.distributed.run, torch._dynamo, peft, transformers.models.clip.modeling_clip;\
import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion;\
import diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3" && \
    { /opt/latentac/bin/python -m compileall -q -x '/(torch|transformers|diffusers|triton|sympy|nvidia)/' \
    /opt/latentac/lib || true; }
# By this label `make images` finds the stage's 5 GB and removes them: the final stage holds a copy.
LABEL latentac.stage=torch

FROM ${BASE}
RUN command -v tini || { apt-get update -q && apt-get install -q -y --no-install-recommends tini && \
    rm -rf /var/lib/apt/lists/*; }
# The user's name is for libraries that ask for it; a platform may run the image under any other number.
RUN echo "latentac:x:65532:65532:latentac:/tmp:/usr/sbin/nologin" >>/etc/passwd && \
    echo "latentac:x:65532:" >>/etc/group && \
    mkdir -p /work && chown 65532:0 /work && chmod 0775 /work
COPY --from=packages /opt/latentac /opt/latentac
# Writable are /tmp and /work alone.
ENV PATH=/opt/latentac/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    VIRTUAL_ENV=/opt/latentac \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    USER=latentac \
    HOME=/tmp \
    XDG_CACHE_HOME=/tmp/.cache
WORKDIR /work
USER 65532:65532
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["python3"]
