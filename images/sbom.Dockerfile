# A throw-away image: what `make sbom` runs to list the packages of ${IMAGE} from within it.
ARG BASE=docker.io/library/python:3.11-slim-bookworm
ARG IMAGE=latentac/pipeline:dev

FROM ${BASE} AS tools
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements/images/sbom.lock /locks/
ARG PIP_INDEX_URL
RUN python3 -m venv /opt/sbom && \
    /opt/sbom/bin/python -m pip install -q --no-cache-dir --require-hashes -r /locks/sbom.lock

FROM ${IMAGE}
USER 0
COPY --from=tools /opt/sbom /opt/sbom
RUN if [ -x /opt/latentac/bin/python ]; then \
        /opt/sbom/bin/cyclonedx-py environment --output-reproducible --of JSON -o /python.json /opt/latentac/bin/python; \
    fi; \
    dpkg-query -W -f '${Package}\t${Version}\t${Architecture}\n' >/debian.tsv
