#!/usr/bin/env bash
# Lets Cloud Scheduler run the job that runs `ccrun sweep`, with a service account that can run this job and nothing else. Can be run
# again at any time: it changes only what differs.
#   scripts/setup-scheduler.sh [--dry-run]
# Settings come from the environment and from .env; .env.example explains them.
set -euo pipefail
# shellcheck source=scripts/deploy/cloud.sh
. "$(dirname "${BASH_SOURCE[0]}")/deploy/cloud.sh"
begin "" "$@"

schedule() {
  local found wanted verb=update
  local uri="https://run.googleapis.com/v2/projects/$PROJECT_ID/locations/$REGION/jobs/$CLOUDRUN_SWEEP_NAME:run"
  look found scheduler jobs describe "$CLOUDRUN_SWEEP_NAME" --location="$SCHEDULER_LOCATION" \
    --format='value[separator="|"](schedule,timeZone,httpTarget.uri,httpTarget.httpMethod,httpTarget.oauthToken.serviceAccountEmail,state)' || verb=create
  wanted="$SWEEP_SCHEDULE|Etc/UTC|$uri|POST|$SCHEDULER"
  if [ "${found##*|}" = PAUSED ]; then
    note "The schedule is paused: until it is resumed, no sweep settles lost tasks or delivers owed callbacks."
  fi
  [ "${found%|*}" != "$wanted" ] || return 0
  say "Schedule $CLOUDRUN_SWEEP_NAME: $SWEEP_SCHEDULE"
  # No retries: if a sweep does not start, the next one does its work.
  change scheduler jobs "$verb" http "$CLOUDRUN_SWEEP_NAME" --location="$SCHEDULER_LOCATION" --schedule="$SWEEP_SCHEDULE" \
    --time-zone=Etc/UTC --uri="$uri" --http-method=POST --oauth-service-account-email="$SCHEDULER" --attempt-deadline=30s \
    --max-retry-attempts=0
}

make_account ccrun-scheduler "Cloud Scheduler: runs the sweep"
make_role ccrunStart "Run a job without overrides" run.jobs.run
on_job "$CLOUDRUN_SWEEP_NAME" || missing "The job $CLOUDRUN_SWEEP_NAME" deploy-job.sh
grant "serviceAccount:$SCHEDULER" "projects/$PROJECT_ID/roles/ccrunStart"
note_strangers
schedule
finish
