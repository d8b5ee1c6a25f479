#!/usr/bin/env bash
# Lets the API run the worker's job and cancel its executions, and lets the sweep run the job and read its executions. Part of
# deploy-job.sh. Can be run again at any time: it changes only what differs.
#   scripts/grant-job-permissions.sh [--dry-run]
# Settings come from the environment and from .env; .env.example explains them.
set -euo pipefail
# shellcheck source=scripts/deploy/cloud.sh
. "$(dirname "${BASH_SOURCE[0]}")/deploy/cloud.sh"
begin "" "$@"

on_job "$CLOUDRUN_JOB_NAME" || missing "The job $CLOUDRUN_JOB_NAME" deploy-job.sh
grant "serviceAccount:$API" "projects/$PROJECT_ID/roles/ccrunLaunch"
grant "serviceAccount:$SWEEP" "projects/$PROJECT_ID/roles/ccrunRelaunch"
note_strangers
finish
