# The steps that compute: prepare, pretrain-value, train, evaluate, steer.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
ARG TORCH_IMAGE=latentac/torch:dev

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

FROM ${TORCH_IMAGE} AS packages
USER 0
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt UV_LINK_MODE=copy UV_NO_CACHE=1
COPY --from=tools /opt/tools /opt/tools
COPY requirements/images/train.lock requirements/images/kfp.lock images/added.sh /locks/
ARG PIP_INDEX_URL
ARG UV_DEFAULT_INDEX=${PIP_INDEX_URL}
# Bytecode for the packages that are new here; templates in some are no Python, hence `|| true`.
RUN sh /locks/added.sh /opt/packages sh -ec "\
/opt/tools/bin/uv pip install -q --python /opt/latentac --require-hashes -r /locks/train.lock;\
/opt/tools/bin/uv pip install -q --python /opt/latentac --require-hashes --no-deps -r /locks/kfp.lock;\
python -m compileall -q -x '/(torch|transformers|diffusers|triton|sympy|nvidia)/' /opt/latentac/lib || true"

FROM packages AS code
COPY --from=wheel /wheels /wheels
RUN sh /locks/added.sh /opt/code sh -ec "\
/opt/tools/bin/uv pip install -q --python /opt/latentac --no-deps /wheels/*.whl;\
cd /opt/latentac/lib/python3*/site-packages && python -m compileall -q latentac"

FROM ${TORCH_IMAGE}
COPY --from=packages /opt/packages /
CMD ["latentac", "--help"]
ARG VERSION=0
ARG REVISION=unknown
ARG SOURCE=https://github.com/latentac/latentac
LABEL org.opencontainers.image.title="latentac train" \
      org.opencontainers.image.description="Actor-critic reinforcement learning for diffusion models: the steps that compute" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0"
# The run's manifests name the commit.
ENV LATENTAC_COMMIT=${REVISION}
# Our code last: what changes most often is the smallest layer.
COPY --from=code /opt/code /
