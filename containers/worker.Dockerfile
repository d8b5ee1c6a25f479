# The worker: `ccrun worker`, the Claude CLI, bubblewrap for the sandbox of agents, and the programs that agents need: git, git-lfs,
# ssh, Node for MCP servers, ripgrep.
#   docker build --file containers/worker.Dockerfile --build-arg REVISION="$(git rev-parse HEAD)" .
# One container runs one task. It starts as root only to switch to the user ccrun (see worker-entrypoint.sh). Agents run as
# the user agent, without any capability.
#
# There is no init: the entry point replaces itself with the worker, which is therefore process 1. The worker adopts and reaps
# orphans anyway (`ccrun.process.linux.become_subreaper`), and no root process remains.

FROM python:3.13.16-slim-trixie@sha256:bf44cdfcb76cd3b41e879bc058fc37ec5872002ccfde7fcb765e218cde0cd79c AS build
WORKDIR /build
COPY scripts/requirements-build.txt containers/requirements-worker.txt ./
# The Python of the base image builds the virtual environment in /opt/ccrun, which has no pip.
RUN python -m pip install --no-cache-dir --root-user-action=ignore --require-hashes --no-deps --only-binary=:all: \
      --requirement requirements-build.txt \
    && python -m venv --without-pip /opt/ccrun \
    && python -m pip --python /opt/ccrun/bin/python install --no-cache-dir --no-compile \
      --require-hashes --no-deps --only-binary=:all: --requirement requirements-worker.txt
COPY pyproject.toml README.md LICENSE ./
COPY ccrun ccrun/
# Python does not check this bytecode against the sources: it would compare modification times, which not every builder preserves.
RUN python -m pip wheel --no-cache-dir --no-index --no-deps --no-build-isolation --wheel-dir dist . \
    && python -m pip --python /opt/ccrun/bin/python install --no-cache-dir --no-compile --no-index --no-deps dist/*.whl \
    && /opt/ccrun/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/ccrun/lib

FROM python:3.13.16-slim-trixie@sha256:bf44cdfcb76cd3b41e879bc058fc37ec5872002ccfde7fcb765e218cde0cd79c
# The entry point and the worker switch users with setpriv. It is part of util-linux, which every Debian image has.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
      bubblewrap ca-certificates git git-lfs nodejs npm openssh-client ripgrep \
    && rm -rf /var/lib/apt/lists/*
# The base image has no bytecode of the standard library; without it, each start would compile these modules again.
# The agent's user has a separate group, no password, no login shell and no home directory: the worker creates one for each task.
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
    CCRUN_SANDBOX=required \
    DISABLE_AUTOUPDATER=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# A worker accepts no connections that a health check could use, and exits with its task: it is healthy while its process runs.
HEALTHCHECK NONE
ENTRYPOINT ["worker-entrypoint"]
CMD ["ccrun", "worker"]

# These lines are last because their values change with every build.
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=1970-01-01T00:00:00Z
LABEL org.opencontainers.image.title="ccrun worker" \
      org.opencontainers.image.description="Runs one task with the Claude Code CLI, then exits" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
