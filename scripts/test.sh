#!/usr/bin/env bash
# Runs the whole test suite, after installing ccrun into .venv where that is needed. Arguments go to pytest:
#   scripts/test.sh -k callback
#   scripts/test.sh -n 0 -x tests/test_store.py
#   scripts/test.sh -n 0 -m slow    (what else is left out: builds the images in folders; takes root, debootstrap, minutes)
# Or checks a service from outside, as its callers see it:
#   scripts/test.sh local                  starts one here, with a scripted model unless there is a credential
#   scripts/test.sh remote                 is the deployed one well, does it stream a task to its end?
#   scripts/test.sh remote-async           does a task in the background come to its end, is its callback sent?
#   scripts/test.sh auth                   is it closed to whoever brings no token, or a wrong one?
#   scripts/test.sh examples [FILE…]       are docs/examples taken? At SERVICE_URL if that is set, else here
# Settings of these come from the environment and from .env; .env.example explains them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/lib.sh
. scripts/lib.sh

# What the checks of a service may know of the settings.
FOR_CHECKS="SERVICE_URL AUTH_TOKEN TEST_CALLBACK_URL GIT_REPO GIT_TOKEN GIT_REPO_SSH SSH_KEY ANTHROPIC_API_KEY CLAUDE_CODE_OAUTH_TOKEN ANTHROPIC_BASE_URL CLAUDE_CLI"

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
    # By the environment, since command lines are there for all to read.
    [ -z "${!name:-}" ] || export "${name?}"
  done
  "$VENV/bin/python" -P -m ccrun check "$word" "$@"
}

find_service() {
  [ -n "$PROJECT_ID" ] || fail "Neither SERVICE_URL nor PROJECT_ID is set: one of them names the service to check."
  need_gcloud
  look SERVICE_URL run services describe "$CLOUDRUN_SERVICE_NAME" --region="$REGION" --format='value(status.url)' ||
    fail "The service $CLOUDRUN_SERVICE_NAME is not there: run scripts/deploy-service.sh first, or set SERVICE_URL."
}

find_token() {
  [ -z "$AUTH_TOKEN" ] || return 0
  case $SERVICE_URL in
    http://127.0.0.1:* | http://localhost:*) AUTH_TOKEN=$(trimmed "${CCRUN_API_TOKENS%%,*}") ;;
    *)
      need_gcloud
      AUTH_TOKEN=$(gcloud auth print-identity-token 2>/dev/null) ||
        fail "gcloud gives no identity token for $ACCOUNT: run gcloud auth login, or set AUTH_TOKEN."
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
  command -v "$1" >/dev/null || say "There is no $1 here: tests that need it are skipped ($2)."
}
missing node "receivers and JSON as JavaScript has them"
missing npm "the receiver that runs under Express"

# With COVERAGE=1, measures coverage too; `coverage combine` and `coverage report` then show it.
run=()
[ -z "${COVERAGE:-}" ] || run=(coverage run -m)
# One process for each core.
exec "$VENV/bin/python" -P -m ${run[@]+"${run[@]}"} pytest -n logical --dist worksteal "$@"
