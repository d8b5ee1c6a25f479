#!/usr/bin/env bash
# Creates the service accounts and custom roles of ccrun, and makes the grants of docs/permissions.md on the bucket, the key, the jobs
# and the service, never on the project. Can be run again at any time: it changes only what differs.
#   scripts/setup-service-account.sh [--dry-run]
# Settings come from the environment and from .env; .env.example explains them.
set -euo pipefail
# shellcheck source=scripts/deploy/cloud.sh
. "$(dirname "${BASH_SOURCE[0]}")/deploy/cloud.sh"
begin "" "$@"

grant_bucket() {
  local roles="projects/$PROJECT_ID/roles"
  local not_logs='!resource.name.endsWith(".jsonl")'
  local not_index="!resource.name.startsWith(\"projects/_/buckets/$GCS_LOGS_BUCKET/objects/index/\")"
  local only_active='api.getAttribute("storage.googleapis.com/objectListPrefix", "").startsWith("active/")'
  local member
  grant "serviceAccount:$API" "$roles/ccrunAdd"
  grant "serviceAccount:$API" "$roles/ccrunReplace" not-logs "$not_logs"
  grant "serviceAccount:$API" "$roles/ccrunList"
  for member in "serviceAccount:$WORKER" "serviceAccount:$SWEEP"; do
    grant "$member" "$roles/ccrunAdd" not-index "$not_index"
    grant "$member" "$roles/ccrunReplace" neither-logs-nor-index "$not_logs && $not_index"
  done
  grant "serviceAccount:$SWEEP" "$roles/ccrunList" only-active "$only_active"
  note_strangers
}

make_account ccrun-api "ccrun serve: seals requests, starts workers"
make_account ccrun-worker "ccrun worker: opens requests, runs agents"
make_account ccrun-sweep "ccrun sweep: settles lost tasks, delivers callbacks"

make_role ccrunAdd "Create objects, and read objects by name" storage.objects.create,storage.objects.get
make_role ccrunReplace "Replace and delete objects" storage.objects.delete
make_role ccrunList "List objects" storage.objects.list
make_role ccrunLaunch "Run a job and cancel its executions" \
  run.jobs.run,run.jobs.runWithOverrides,run.executions.get,run.executions.cancel
make_role ccrunRelaunch "Run a job and see its executions" \
  run.jobs.run,run.jobs.runWithOverrides,run.executions.get,run.executions.list

on_bucket || missing "The bucket $GCS_LOGS_BUCKET" setup-project.sh
grant_bucket
on_key || missing "The key $KMS_KEY_NAME" setup-kms.sh
grant_key

# Grants on the jobs and the service, if they exist already.
if look job run jobs describe "$CLOUDRUN_JOB_NAME" --region="$REGION" --format='value(metadata.name)'; then
  then_run grant-job-permissions.sh
fi
if look service run services describe "$CLOUDRUN_SERVICE_NAME" --region="$REGION" --format='value(metadata.name)'; then
  on_service
  grant_callers
fi
finish
