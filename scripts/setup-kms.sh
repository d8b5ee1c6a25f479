#!/usr/bin/env bash
# Creates the key that seals requests, with a rotation every 90 days, and lets the API encrypt with it, and the worker and the sweep
# decrypt. Can be run again at any time: it changes only what differs.
#   scripts/setup-kms.sh [--dry-run]
# Settings come from the environment and from .env; .env.example explains them.
set -euo pipefail
# shellcheck source=scripts/deploy/cloud.sh
. "$(dirname "${BASH_SOURCE[0]}")/deploy/cloud.sh"
begin "" "$@"

ROTATION_DAYS=90
ON_RING=(--keyring="$KMS_KEY_RING" --location="$KMS_LOCATION")

make_key() {
  local found purpose period next state version
  if ! look found kms keyrings describe "$KMS_KEY_RING" --location="$KMS_LOCATION" --format='value(name)'; then
    say "Key ring $KMS_KEY_RING"
    change kms keyrings create "$KMS_KEY_RING" --location="$KMS_LOCATION"
  fi
  if ! look found kms keys describe "$KMS_KEY_NAME" "${ON_RING[@]}" \
    --format='value[separator="|"](purpose,rotationPeriod,nextRotationTime,primary.state)'; then
    say "Key $KMS_KEY_NAME"
    change kms keys create "$KMS_KEY_NAME" "${ON_RING[@]}" --purpose=encryption \
      --rotation-period="${ROTATION_DAYS}d" --next-rotation-time="+P${ROTATION_DAYS}D"
    return
  fi
  IFS='|' read -r purpose period next state <<<"$found"
  [ "$purpose" = ENCRYPT_DECRYPT ] ||
    fail "The key $KMS_KEY_NAME is for $purpose, not for encryption: set KMS_KEY_NAME to another name."
  if [ "$period" != "$((ROTATION_DAYS * 24 * 60 * 60))s" ] || [ -z "$next" ]; then
    say "Key $KMS_KEY_NAME: rotation"
    change kms keys update "$KMS_KEY_NAME" "${ON_RING[@]}" \
      --rotation-period="${ROTATION_DAYS}d" --next-rotation-time="+P${ROTATION_DAYS}D"
  fi
  if [ "$state" != ENABLED ]; then
    # After scripts/teardown.sh --data. Keys cannot be deleted, so this key gets a new version.
    say "Key $KMS_KEY_NAME: new version, because the last one is ${state:-missing}"
    change kms keys versions create --key="$KMS_KEY_NAME" "${ON_RING[@]}" --primary
  fi
}

grant_use() {
  local address found
  for address in "$API" "$WORKER" "$SWEEP"; do
    if ! look found iam service-accounts describe "$address" --format='value(email)'; then
      say "Access to the key is granted by scripts/setup-service-account.sh, which creates the service accounts."
      return
    fi
  done
  on_key || missing "The key $KMS_KEY_NAME" setup-kms.sh
  grant_key
}

make_key
grant_use
finish
