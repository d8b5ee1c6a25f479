#!/usr/bin/env bash
# Deletes the deployment: schedule, service, jobs, images, secrets, roles and service accounts. Lists them first, and asks for the ID
# of the project. The bucket and the key are deleted only with --data: without the key, sealed requests in the bucket can never be
# opened. Key rings and keys cannot be deleted, so only the versions of the key are, 30 days later.
#   scripts/teardown.sh [--dry-run] [--data] [--yes]
# Settings come from the environment and from .env; .env.example explains them.
set -euo pipefail
# shellcheck source=scripts/deploy/cloud.sh
. "$(dirname "${BASH_SOURCE[0]}")/deploy/cloud.sh"
begin "--data --yes" "$@"

# shellcheck disable=SC2034 # read by `look`
WHEN_API_DISABLED=absent
FOUND=$'\n'
ON_RING=(--keyring="$KMS_KEY_RING" --location="$KMS_LOCATION")
SECRETS=$WORKER_SECRETS
ACCOUNTS="ccrun-api ccrun-worker ccrun-sweep ccrun-scheduler"
ROLES="ccrunAdd ccrunReplace ccrunList ccrunLaunch ccrunLook ccrunRelaunch ccrunStart"

# find_resource DESCRIPTION gcloud-words…: prints and remembers the resource if it exists.
find_resource() {
  local what=$1 found
  shift
  if look found "$@"; then
    FOUND=$FOUND$what$'\n'
    say "  $what"
  fi
}

was_found() { [[ $FOUND == *$'\n'"$1"$'\n'* ]]; }

# drop DESCRIPTION gcloud-words…: deletes the resource if it was found.
drop() {
  local what=$1
  shift
  was_found "$what" || return 0
  say "Deleting: $what"
  change "$@"
}

find_all() {
  local name deleted found
  say "These resources of the project $PROJECT_ID will be deleted:"
  find_resource "schedule $CLOUDRUN_SWEEP_NAME" scheduler jobs describe "$CLOUDRUN_SWEEP_NAME" --location="$SCHEDULER_LOCATION" --format='value(name)'
  find_resource "service $CLOUDRUN_SERVICE_NAME" run services describe "$CLOUDRUN_SERVICE_NAME" --region="$REGION" --format='value(metadata.name)'
  for name in "$CLOUDRUN_JOB_NAME" "$CLOUDRUN_SWEEP_NAME"; do
    find_resource "job $name, with its running executions" run jobs describe "$name" --region="$REGION" --format='value(metadata.name)'
  done
  find_resource "repository $ARTIFACT_REPOSITORY, with its images" artifacts repositories describe "$ARTIFACT_REPOSITORY" --location="$REGION" --format='value(format)'
  for name in $SECRETS; do
    find_resource "secret $name" secrets describe "$name" --format='value(name)'
  done
  for name in $ACCOUNTS; do
    find_resource "service account $name" iam service-accounts describe "$(account "$name")" --format='value(email)'
  done
  for name in $ROLES; do
    if look deleted iam roles describe "$name" --format='value(deleted)' && [ "$deleted" != True ]; then
      FOUND=$FOUND"role $name"$'\n'
      say "  role $name"
    fi
  done
  if option --data; then
    find_resource "bucket $GCS_LOGS_BUCKET, with all tasks and logs" storage buckets describe "gs://$GCS_LOGS_BUCKET" --format='value(name)'
    VERSIONS=
    if look found kms keys versions list --key="$KMS_KEY_NAME" "${ON_RING[@]}" --format='value[separator="|"](name,state)'; then
      VERSIONS=$(printf %s "$found" | sed -En 's/^.*\/([0-9]+)\|(ENABLED|DISABLED)$/\1/p')
    fi
    if [ -n "$VERSIONS" ]; then
      FOUND=$FOUND"versions of the key $KMS_KEY_NAME"$'\n'
      say "  versions of the key $KMS_KEY_NAME (they can be restored for 30 days; the key itself can never be deleted)"
    fi
  else
    say "Not deleted: the bucket $GCS_LOGS_BUCKET and the key $KMS_KEY_NAME (--data deletes the bucket and the versions of the key)."
  fi
}

# Removes the grants on a resource that remains; grants to deleted accounts would remain otherwise.
revoke_grants() {
  local name
  for name in $ACCOUNTS; do
    revoke_all "serviceAccount:$(account "$name")"
  done
}

delete_all() {
  local name version
  # Schedule and service first, because they start executions; then the jobs, then the resources that the jobs use.
  drop "schedule $CLOUDRUN_SWEEP_NAME" scheduler jobs delete "$CLOUDRUN_SWEEP_NAME" --location="$SCHEDULER_LOCATION"
  drop "service $CLOUDRUN_SERVICE_NAME" run services delete "$CLOUDRUN_SERVICE_NAME" --region="$REGION"
  for name in "$CLOUDRUN_JOB_NAME" "$CLOUDRUN_SWEEP_NAME"; do
    drop "job $name, with its running executions" run jobs delete "$name" --region="$REGION"
  done
  if on_key; then
    revoke_grants
  fi
  if was_found "bucket $GCS_LOGS_BUCKET, with all tasks and logs"; then
    say "Deleting: bucket $GCS_LOGS_BUCKET, with all tasks and logs"
    change storage rm --recursive "gs://$GCS_LOGS_BUCKET"
  elif on_bucket; then
    revoke_grants
  fi
  if was_found "versions of the key $KMS_KEY_NAME"; then
    for version in $VERSIONS; do
      say "Deleting in 30 days: version $version of the key $KMS_KEY_NAME"
      change kms keys versions destroy "$version" --key="$KMS_KEY_NAME" "${ON_RING[@]}"
    done
  fi
  drop "repository $ARTIFACT_REPOSITORY, with its images" artifacts repositories delete "$ARTIFACT_REPOSITORY" --location="$REGION"
  for name in $SECRETS; do
    drop "secret $name" secrets delete "$name"
  done
  for name in $ACCOUNTS; do
    drop "service account $name" iam service-accounts delete "$(account "$name")"
  done
  for name in $ROLES; do
    drop "role $name" iam roles delete "$name"
  done
}

find_all
if [ "$FOUND" = $'\n' ]; then
  say "  none: there is no deployment."
  exit
fi
confirm
delete_all
finish
