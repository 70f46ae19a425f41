# The archiver, as the user 10001, on any Debian-like base with Python >= 3.11.
#
#   docker build --tag archiver .
#   buildah bud --build-arg BASE=localhost/python:mine --tag archiver .
#
# Another base must bring python3 with venv and pip, and certificates of the
# public authorities.
ARG BASE=python:3.12-slim

# The wheel, built by the tools that the developers' lock pins, hashes and all.
FROM ${BASE} AS wheel
ENV PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/tools
WORKDIR /src
COPY requirements.lock ./
RUN /opt/tools/bin/pip install --no-deps --require-hashes --requirement requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY alembic ./alembic
COPY archiver ./archiver
RUN /opt/tools/bin/python -m build --wheel --no-isolation --outdir /wheels


# The environment, which holds no pip and no tool of the build.
FROM ${BASE} AS environment
ENV PIP_NO_CACHE_DIR=1
RUN python3 -m venv --without-pip /opt/archiver
WORKDIR /src
COPY requirements-runtime.lock ./
RUN python3 -m pip --python /opt/archiver/bin/python install --no-compile --no-deps --require-hashes --requirement requirements-runtime.lock
COPY --from=wheel /wheels /wheels
RUN python3 -m pip --python /opt/archiver/bin/python install --no-compile --no-deps /wheels/*.whl

# The root file system is read-only in use. Unchecked: a copy may change times.
RUN /opt/archiver/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/archiver/lib


FROM ${BASE}
LABEL org.opencontainers.image.title="archiver" \
      org.opencontainers.image.description="Captures every message of many POP3 mailboxes, byte for byte, into an S3-compatible bucket, and proves it" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN install --directory --owner=10001 --group=10001 /var/lib/archiver /var/spool/archiver
COPY --from=environment /opt/archiver /opt/archiver
# Else glibc keeps free memory apart for each of many threads.
ENV PATH=/opt/archiver/bin:$PATH \
    HOME=/var/lib/archiver \
    MALLOC_ARENA_MAX=2 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /var/lib/archiver
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
ENTRYPOINT ["archiver"]
CMD ["run"]
