#!/usr/bin/env bash
# Has Cloud Scheduler run the job that runs `ccrun sweep`, under an identity that may run that job and nothing else. Can be run
# again at any time: it changes what differs.
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
    note "The schedule is paused: nothing settles dead tasks or delivers owed callbacks until it is resumed."
  fi
  [ "${found%|*}" != "$wanted" ] || return 0
  say "Schedule $CLOUDRUN_SWEEP_NAME: $SWEEP_SCHEDULE"
  # A sweep that does not start is made up for by the next one.
  change scheduler jobs "$verb" http "$CLOUDRUN_SWEEP_NAME" --location="$SCHEDULER_LOCATION" --schedule="$SWEEP_SCHEDULE" \
    --time-zone=Etc/UTC --uri="$uri" --http-method=POST --oauth-service-account-email="$SCHEDULER" --attempt-deadline=30s \
    --max-retry-attempts=0
}

make_account ccrun-scheduler "Cloud Scheduler: runs the sweep"
make_role ccrunStart "Run a job as it is" run.jobs.run
on_job "$CLOUDRUN_SWEEP_NAME" || missing "The job $CLOUDRUN_SWEEP_NAME" deploy-job.sh
grant "serviceAccount:$SCHEDULER" "projects/$PROJECT_ID/roles/ccrunStart"
note_strangers
schedule
finish
