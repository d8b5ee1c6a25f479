#!/usr/bin/env bash
# Stores the secrets of .env in Secret Manager and grants access to them: CLOUDRUN_CALLBACK_SECRET to the worker and the sweep
# (generated if it does not exist) and, if set, ANTHROPIC_API_KEY, CLAUDE_CODE_OAUTH_TOKEN, ANTHROPIC_AUTH_TOKEN and
# ANTHROPIC_CUSTOM_HEADERS to the worker. The API reads no secret.
# A changed value becomes a new version; old versions are retained. Can be run again at any time.
#   scripts/create-secrets.sh [--dry-run]
# Settings come from the environment and from .env; .env.example explains them.
set -euo pipefail
# shellcheck source=scripts/deploy/cloud.sh
. "$(dirname "${BASH_SOURCE[0]}")/deploy/cloud.sh"
begin "" "$@"

enable_api() {
  local enabled
  look enabled services list --enabled --format='value(config.name)'
  [[ $'\n'$enabled$'\n' == *$'\n'secretmanager.googleapis.com$'\n'* ]] && return
  change services enable secretmanager.googleapis.com
}

# store NAME MEMBER…: stores the value if the setting has one, and lets the members read the secret.
store() {
  local name=$1 value=${!1} found there=no member
  shift
  look found secrets describe "$name" --format='value(name)' && there=yes
  if [ -z "$value" ] && [ "$there" = no ]; then
    [ "$name" = CLOUDRUN_CALLBACK_SECRET ] || return 0
    command -v openssl >/dev/null || fail "CLOUDRUN_CALLBACK_SECRET is not set, and openssl, which would generate one, is not installed."
    value=$(openssl rand -hex 32)
    say "CLOUDRUN_CALLBACK_SECRET is not set: a new one is stored in Secret Manager. Receivers of callbacks need it:"
    say "  gcloud secrets versions access latest --secret=CLOUDRUN_CALLBACK_SECRET --project=$PROJECT_ID"
  fi
  if [ "$there" = no ]; then
    say "Secret $name"
    change secrets create "$name" --replication-policy=automatic
  fi
  if [ -n "$value" ] && ! is_latest "$name" "$value"; then
    say "Secret $name: new version"
    # On standard input, because other users of the machine can read command lines. Not `printf | change`: in a dry run nothing reads
    # the pipe, and printf could be killed by SIGPIPE, which would end the script.
    INPUT=/dev/stdin change secrets versions add "$name" --data-file=- < <(printf %s "$value")
  fi
  on_secret "$name" || missing "The secret $name" create-secrets.sh
  for member; do
    grant "serviceAccount:$member" roles/secretmanager.secretAccessor
  done
  note_strangers
}

is_latest() {
  local latest
  look latest secrets versions access latest --secret="$1" && [ "$latest" = "$2" ]
}

enable_api
store CLOUDRUN_CALLBACK_SECRET "$WORKER" "$SWEEP"
for name in ANTHROPIC_API_KEY CLAUDE_CODE_OAUTH_TOKEN ANTHROPIC_AUTH_TOKEN ANTHROPIC_CUSTOM_HEADERS; do
  store "$name" "$WORKER"
done
finish
