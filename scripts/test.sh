#!/usr/bin/env bash
# Runs the whole test suite. Installs ccrun into .venv first if needed. Arguments are passed to pytest:
#   scripts/test.sh -k callback
#   scripts/test.sh -n 0 -x tests/test_store.py
#   scripts/test.sh -n 0 -m slow    (left out otherwise: builds the images in directories; takes minutes, root and debootstrap)
# Or checks a service as a client:
#   scripts/test.sh local                  a local service, with a scripted model unless there is a credential
#   scripts/test.sh remote                 the deployed service: its health, and a streamed task
#   scripts/test.sh remote-async           the deployed service: an asynchronous task and its callback
#   scripts/test.sh auth                   the deployed service rejects requests without a valid token
#   scripts/test.sh examples [FILE…]       the requests in docs/examples, at SERVICE_URL if set, else at a local service
# Settings for these checks come from the environment and from .env; .env.example explains them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# The settings that are passed to the checks.
FOR_CHECKS="SERVICE_URL AUTH_TOKEN TEST_CALLBACK_URL GIT_REPO GIT_TOKEN GIT_REPO_SSH SSH_KEY ANTHROPIC_API_KEY
CLAUDE_CODE_OAUTH_TOKEN ANTHROPIC_AUTH_TOKEN ANTHROPIC_BASE_URL CLAUDE_CLI"

check_service() {
  local word=$1 name
  shift
  # shellcheck source=scripts/deploy/cloud.sh
  . scripts/deploy/cloud.sh
  load_settings
  case $word in
    local) SERVICE_URL= ;;
    examples)
      if [ $# = 0 ] && [ -d docs/examples ]; then
        set -- docs/examples/*.json
      fi
      ;;
    *) [ -n "$SERVICE_URL" ] || find_service ;;
  esac
  [ -z "$SERVICE_URL" ] || find_token
  prepare
  for name in $FOR_CHECKS; do
    # In the environment, because other users can read command lines.
    [ -z "${!name:-}" ] || export "${name?}"
  done
  "$VENV/bin/python" -P -m ccrun check "$word" "$@"
}

find_service() {
  [ -n "$PROJECT_ID" ] || fail "Neither SERVICE_URL nor PROJECT_ID is set: one of them names the service to check."
  need_gcloud
  look SERVICE_URL run services describe "$CLOUDRUN_SERVICE_NAME" --region="$REGION" --format='value(status.url)' ||
    fail "The service $CLOUDRUN_SERVICE_NAME does not exist: run scripts/deploy-service.sh first, or set SERVICE_URL."
}

find_token() {
  [ -z "$AUTH_TOKEN" ] || return 0
  case $SERVICE_URL in
    http://127.0.0.1:* | http://localhost:*) AUTH_TOKEN=$(trimmed "${CCRUN_API_TOKENS%%,*}") ;;
    *)
      need_gcloud
      AUTH_TOKEN=$(gcloud auth print-identity-token 2>/dev/null) ||
        fail "gcloud printed no identity token for $ACCOUNT: run gcloud auth login, or set AUTH_TOKEN."
      ;;
  esac
}

case ${1:-} in
  local | remote | remote-async | auth | examples)
    check_service "$@"
    exit
    ;;
esac

prepare

missing() {
  command -v "$1" >/dev/null || say "$1 is not installed: tests that need it are skipped ($2)."
}
missing bwrap "agents in a sandbox: apt-get install bubblewrap"
missing node "JavaScript receivers, comparison with JavaScript's JSON"
missing npm "the Express receiver"

# COVERAGE=1 measures coverage; run `coverage combine` and `coverage report` afterwards.
run=()
[ -z "${COVERAGE:-}" ] || run=(coverage run -m)
# One process more than there are cores: the tests wait for a fifth of their time.
processes=$(($(getconf _NPROCESSORS_ONLN) + 1))
exec "$VENV/bin/python" -P -m ${run[@]+"${run[@]}"} pytest -n "$processes" --dist worksteal "$@"
