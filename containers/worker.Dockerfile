# The worker: `ccrun worker`, the Claude CLI, and what agents need: git, ssh, Node for MCP servers, ripgrep.
#   docker build --file containers/worker.Dockerfile --build-arg REVISION="$(git rev-parse HEAD)" .
# One container runs one task. It starts as root only to become the user ccrun (see worker-entrypoint.sh); agents are the user
# agent, with no rights at all.
#
# There is no init: the entry point turns into the worker, which so is process 1. It takes up and reaps orphans anyway
# (`ccrun.process.become_subreaper`), and no root process is left behind.

FROM python:3.13.16-slim-trixie@sha256:bf44cdfcb76cd3b41e879bc058fc37ec5872002ccfde7fcb765e218cde0cd79c AS build
WORKDIR /build
COPY scripts/requirements-build.txt containers/requirements-worker.txt ./
# Python as the base image has it builds; what is built stands in /opt/ccrun, without pip.
RUN python -m pip install --no-cache-dir --root-user-action=ignore --require-hashes --no-deps --only-binary=:all: \
      --requirement requirements-build.txt \
    && python -m venv --without-pip /opt/ccrun \
    && python -m pip --python /opt/ccrun/bin/python install --no-cache-dir --no-compile \
      --require-hashes --no-deps --only-binary=:all: --requirement requirements-worker.txt
COPY pyproject.toml README.md LICENSE ./
COPY ccrun ccrun/
# Bytecode is trusted as it is: the times of files, by which it would be checked, do not survive every builder.
RUN python -m pip wheel --no-cache-dir --no-index --no-deps --no-build-isolation --wheel-dir dist . \
    && python -m pip --python /opt/ccrun/bin/python install --no-cache-dir --no-compile --no-index --no-deps dist/*.whl \
    && /opt/ccrun/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/ccrun/lib

FROM python:3.13.16-slim-trixie@sha256:bf44cdfcb76cd3b41e879bc058fc37ec5872002ccfde7fcb765e218cde0cd79c
# setpriv, which the entry point and the worker switch users with, is part of util-linux: every Debian has it.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      ca-certificates git nodejs npm openssh-client ripgrep \
    && rm -rf /var/lib/apt/lists/*
# The base image has no bytecode of Python's own modules; without it each start would compile them again.
# The agent's user has a group of its own, no password, no shell to log in with and no home: a task brings its own.
RUN python -m pip uninstall --yes --root-user-action=ignore pip \
    && python -m compileall -q --invalidation-mode unchecked-hash -x '/(tests?|idlelib|site-packages)/' \
      "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && groupadd --gid 10001 ccrun \
    && useradd --uid 10001 --gid ccrun --create-home --shell /usr/sbin/nologin ccrun \
    && chmod 0700 /home/ccrun \
    && groupadd --gid 10002 agent \
    && useradd --uid 10002 --gid agent --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin agent \
    && ln -s /opt/ccrun/bin/ccrun /usr/local/bin/ccrun \
    && ln -s /opt/ccrun/lib/python3.13/site-packages/claude_agent_sdk/_bundled/claude /usr/local/bin/claude
COPY --from=build /opt/ccrun /opt/ccrun
COPY --chmod=0755 containers/worker-entrypoint.sh /usr/local/bin/worker-entrypoint
ENV CCRUN_AGENT_USER=agent \
    CCRUN_BACKEND=gcp \
    DISABLE_AUTOUPDATER=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# It listens on nothing that could be asked, and ends with its task: that its process runs is all there is to know.
HEALTHCHECK NONE
ENTRYPOINT ["worker-entrypoint"]
CMD ["ccrun", "worker"]

# Last, since they change with every build.
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="ccrun worker" \
      org.opencontainers.image.description="Runs one task with the Claude Code CLI, then ends" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
