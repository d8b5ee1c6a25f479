#!/usr/bin/env bash
# Prepares a project of Google Cloud for ccrun: APIs, bucket and image repository, then the key (setup-kms.sh), the service accounts
# and their grants (setup-service-account.sh). Can be run again at any time: it changes only what differs.
#   scripts/setup-project.sh [--dry-run]
# Settings come from the environment and from .env; .env.example explains them.
set -euo pipefail
# shellcheck source=scripts/deploy/cloud.sh
. "$(dirname "${BASH_SOURCE[0]}")/deploy/cloud.sh"
begin "" "$@"

APIS="artifactregistry cloudbuild cloudkms cloudscheduler iam run secretmanager storage"

check_project() {
  local state billed
  look state projects describe "$PROJECT_ID" --format='value(lifecycleState)' ||
    fail "The project $PROJECT_ID does not exist, or $ACCOUNT has no access to it."
  [ "$state" = ACTIVE ] || fail "The project $PROJECT_ID is being deleted."
  if ! billed=$(run_gcloud billing projects describe "$PROJECT_ID" --format='value(billingEnabled)'); then
    note "The billing account of $PROJECT_ID cannot be read. Without one, the next steps fail."
  elif [ "$billed" != True ]; then
    fail "The project $PROJECT_ID has no billing account: link one with gcloud billing projects link."
  fi
}

enable_apis() {
  local enabled api wanted=()
  look enabled services list --enabled --format='value(config.name)'
  for api in $APIS; do
    [[ $'\n'$enabled$'\n' == *$'\n'"$api.googleapis.com"$'\n'* ]] || wanted+=("$api.googleapis.com")
  done
  [ ${#wanted[@]} != 0 ] || return 0
  say "APIs: ${wanted[*]}"
  change services enable "${wanted[@]}"
}

# No soft delete: it would retain sealed requests, and every version of a record, for days after their deletion.
make_bucket() {
  local bucket="gs://$GCS_LOGS_BUCKET" found uniform public soft_delete versions differs=()
  if ! look found storage buckets describe "$bucket" --format='value[separator="|"](uniform_bucket_level_access,public_access_prevention,soft_delete_policy.retentionDurationSeconds,versioning_enabled)'; then
    say "Bucket $bucket"
    write_lifecycle
    change storage buckets create "$bucket" --location="$REGION" --uniform-bucket-level-access --public-access-prevention \
      --soft-delete-duration=0 --lifecycle-file="$SCRATCH/lifecycle.json"
    return
  fi
  IFS='|' read -r uniform public soft_delete versions <<<"$found"
  # IAM conditions need uniform access.
  [ "$uniform" = True ] || differs+=(--uniform-bucket-level-access)
  [ "$public" = enforced ] || differs+=(--public-access-prevention)
  [ "${soft_delete:-0}" = 0 ] || differs+=(--clear-soft-delete)
  [ "$versions" != True ] || differs+=(--no-versioning)
  look found storage buckets describe "$bucket" --flatten='lifecycle_config.rule[]' --format='value[separator="|"](lifecycle_config.rule.action.type,lifecycle_config.rule.condition.age,lifecycle_config.rule.condition.matchesSuffix)'
  if [ "$(sorted '' "$found")" != "$(printf 'Delete|%s|\n' "1|/encrypted-payload.bin" "$LOG_RETENTION_DAYS|" | sed 's/|$//' | LC_ALL=C sort)" ]; then
    write_lifecycle
    differs+=("--lifecycle-file=$SCRATCH/lifecycle.json")
  fi
  [ ${#differs[@]} != 0 ] || return 0
  say "Bucket $bucket: ${differs[*]%%=*}"
  change storage buckets update "$bucket" "${differs[@]}"
}

# A worker deletes its payload when it has opened it. The rule of one day is for tasks that were never started.
write_lifecycle() {
  cat >"$SCRATCH/lifecycle.json" <<END
{
  "lifecycle": {
    "rule": [
      {"action": {"type": "Delete"}, "condition": {"age": $LOG_RETENTION_DAYS}},
      {"action": {"type": "Delete"}, "condition": {"age": 1, "matchesSuffix": ["/encrypted-payload.bin"]}}
    ]
  }
}
END
}

make_repository() {
  local found
  if ! look found artifacts repositories describe "$ARTIFACT_REPOSITORY" --location="$REGION" --format='value(format)'; then
    say "Image repository $ARTIFACT_REPOSITORY"
    change artifacts repositories create "$ARTIFACT_REPOSITORY" --location="$REGION" --repository-format=docker \
      --description="Images of ccrun"
  elif [ "$found" != DOCKER ]; then
    fail "$ARTIFACT_REPOSITORY in $REGION has the format $found: set ARTIFACT_REPOSITORY to another name."
  fi
  look found artifacts repositories list-cleanup-policies "$ARTIFACT_REPOSITORY" --location="$REGION" --format='value(name)' || true
  [ "$(sorted '' "$found")" != $'delete-old\nkeep-latest' ] || return 0
  say "Image repository $ARTIFACT_REPOSITORY: cleanup policies"
  change artifacts repositories set-cleanup-policies "$ARTIFACT_REPOSITORY" --location="$REGION" \
    --policy="$ROOT/scripts/deploy/image-cleanup.json" --no-dry-run
}

check_project
enable_apis
make_bucket
make_repository
finish
then_run setup-kms.sh
then_run setup-service-account.sh
say "Next: scripts/create-secrets.sh, scripts/build-and-push.sh, scripts/deploy-job.sh, scripts/deploy-service.sh, scripts/setup-scheduler.sh."
