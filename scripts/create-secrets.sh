#!/usr/bin/env bash
# Puts the secrets of .env into Secret Manager, and lets those read them who need them: CLOUDRUN_CALLBACK_SECRET (worker and sweep;
# one is made when there is none), and, where they are set, ANTHROPIC_API_KEY and CLAUDE_CODE_OAUTH_TOKEN (worker). The API reads none.
# A value that differs becomes a new version; old versions stay. Can be run again at any time.
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

# put NAME MEMBER…: what is set goes into Secret Manager; the members may read what is there.
put() {
  local name=$1 value=${!1} found there=no member
  shift
  look found secrets describe "$name" --format='value(name)' && there=yes
  if [ -z "$value" ] && [ "$there" = no ]; then
    [ "$name" = CLOUDRUN_CALLBACK_SECRET ] || return 0
    command -v openssl >/dev/null || fail "CLOUDRUN_CALLBACK_SECRET is not set, and there is no openssl here to make one."
    value=$(openssl rand -hex 32)
    say "CLOUDRUN_CALLBACK_SECRET is not set: one is made, and kept in Secret Manager alone. Those who receive callbacks need it:"
    say "  gcloud secrets versions access latest --secret=CLOUDRUN_CALLBACK_SECRET --project=$PROJECT_ID"
  fi
  if [ "$there" = no ]; then
    say "Secret $name"
    change secrets create "$name" --replication-policy=automatic
  fi
  if [ -n "$value" ] && ! is_latest "$name" "$value"; then
    say "Secret $name: a new version"
    # By standard input: whoever is on this machine can read command lines. Not by a pipe: a rehearsal reads nothing, and whoever
    # writes to a pipe that nobody reads is killed.
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
put CLOUDRUN_CALLBACK_SECRET "$WORKER" "$SWEEP"
put ANTHROPIC_API_KEY "$WORKER"
put CLAUDE_CODE_OAUTH_TOKEN "$WORKER"
finish
