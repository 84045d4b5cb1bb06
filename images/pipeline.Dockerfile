# The steps that wait and decide (gate, deploy, finish, and train's launcher), the pipeline's client, TensorBoard.
# No torch.
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

FROM tools AS wheel
COPY pyproject.toml README.md LICENSE /source/
COPY pipelines /source/pipelines
COPY components /source/components
COPY latentac /source/latentac
RUN cd /source && /opt/tools/bin/uv build -q --no-build-isolation --python /opt/tools/bin/python --wheel -o /wheels

FROM tools AS packages
ARG PIP_INDEX_URL
ARG UV_DEFAULT_INDEX=${PIP_INDEX_URL}
COPY requirements/images/pipeline.lock /locks/
RUN /opt/tools/bin/uv venv -q --python python3 /opt/latentac && \
    /opt/tools/bin/uv pip install -q --python /opt/latentac --compile-bytecode --require-hashes -r /locks/pipeline.lock

FROM packages AS code
COPY --from=wheel /wheels /wheels
COPY images/added.sh /locks/
RUN sh /locks/added.sh /opt/code sh -ec "\
/opt/tools/bin/uv pip install -q --python /opt/latentac --no-deps /wheels/*.whl;\
cd /opt/latentac/lib/python3*/site-packages && ../../../bin/python -m compileall -q latentac"

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
CMD ["latentac", "--help"]
ARG VERSION=0
ARG REVISION=unknown
ARG SOURCE=https://github.com/latentac/latentac
LABEL org.opencontainers.image.title="latentac pipeline" \
      org.opencontainers.image.description="Actor-critic reinforcement learning for diffusion models: the steps that wait and decide, and the client" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0"
# The run's manifests name the commit.
ENV LATENTAC_COMMIT=${REVISION}
# Our code last: what changes most often is the smallest layer.
COPY --from=code /opt/code /
