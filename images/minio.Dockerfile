# The MinIO server for evaluation and tests. Upstream publishes no images any more, so `make images` builds the program
# from the Go module proxy (tools/minio.py) and this puts it on the base.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE}
RUN command -v tini || { apt-get update -q && apt-get install -q -y --no-install-recommends tini && \
    rm -rf /var/lib/apt/lists/*; }
RUN echo "minio:x:65532:65532:minio:/tmp:/usr/sbin/nologin" >>/etc/passwd && echo "minio:x:65532:" >>/etc/group && \
    mkdir -p /data && chown 65532:0 /data && chmod 0775 /data
COPY minio /usr/local/bin/minio
ARG VERSION=0
ARG REVISION=unknown
ARG SOURCE=https://github.com/minio/minio
ENV HOME=/tmp \
    MINIO_UPDATE=off
LABEL org.opencontainers.image.title="latentac minio" \
      org.opencontainers.image.description="MinIO's last release, for evaluation: production brings its own S3" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="AGPL-3.0-only"
WORKDIR /data
USER 65532:65532
EXPOSE 9000
ENTRYPOINT ["/usr/bin/tini", "--", "minio"]
CMD ["server", "/data", "--quiet", "--certs-dir=/tmp/certs"]
