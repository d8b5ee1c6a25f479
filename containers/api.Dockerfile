# The API and the sweep: `ccrun serve`, `ccrun sweep`. The image has no Claude CLI, git, build tools or login shell for its user.
#   docker build --file containers/api.Dockerfile --build-arg REVISION="$(git rev-parse HEAD)" .
# It is for the gcp backend. On Cloud Run, IAM checks who may call the service; elsewhere, set HOST and CCRUN_API_TOKENS.
# The sweep is in this image, not in the worker's, because it needs gRPC and no agent. Its service account limits what it may do.

FROM python:3.13.16-slim-trixie@sha256:bf44cdfcb76cd3b41e879bc058fc37ec5872002ccfde7fcb765e218cde0cd79c AS build
WORKDIR /build
COPY scripts/requirements-build.txt containers/requirements-api.txt ./
# The Python of the base image builds the virtual environment in /opt/ccrun, which has no pip.
RUN python -m pip install --no-cache-dir --root-user-action=ignore --require-hashes --no-deps --only-binary=:all: \
      --requirement requirements-build.txt \
    && python -m venv --without-pip /opt/ccrun \
    && python -m pip --python /opt/ccrun/bin/python install --no-cache-dir --no-compile \
      --require-hashes --no-deps --only-binary=:all: --requirement requirements-api.txt
COPY pyproject.toml README.md LICENSE ./
COPY ccrun ccrun/
# Python does not check this bytecode against the sources: it would compare modification times, which not every builder preserves.
RUN python -m pip wheel --no-cache-dir --no-index --no-deps --no-build-isolation --wheel-dir dist . \
    && python -m pip --python /opt/ccrun/bin/python install --no-cache-dir --no-compile --no-index --no-deps dist/*.whl \
    && /opt/ccrun/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/ccrun/lib

FROM python:3.13.16-slim-trixie@sha256:bf44cdfcb76cd3b41e879bc058fc37ec5872002ccfde7fcb765e218cde0cd79c
# The base image has no bytecode of the standard library; without it, each start would compile these modules again.
RUN python -m pip uninstall --yes --root-user-action=ignore pip \
    && python -m compileall -q --invalidation-mode unchecked-hash -x '/(tests?|idlelib|site-packages)/' \
      "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && groupadd --gid 10001 ccrun \
    && useradd --uid 10001 --gid ccrun --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin ccrun \
    && ln -s /opt/ccrun/bin/ccrun /usr/local/bin/ccrun
COPY --from=build /opt/ccrun /opt/ccrun
ENV CCRUN_BACKEND=gcp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# By number, so that a platform can check that the user is not root.
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s \
  CMD ["python", "-I", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PORT', 8080)), timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["ccrun"]
CMD ["serve"]

# These lines are last because their values change with every build.
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="ccrun API" \
      org.opencontainers.image.description="Accepts tasks for the Claude Code CLI, streams their logs, settles lost tasks" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
