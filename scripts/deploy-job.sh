#!/usr/bin/env bash
# Deploys the job that runs `ccrun worker`, with one execution for each task, and the job that runs `ccrun sweep`. Then runs
# grant-job-permissions.sh. Can be run again at any time: it changes only what differs.
#   scripts/deploy-job.sh [--dry-run]
# Settings come from the environment and from .env; .env.example explains them.
set -euo pipefail
# shellcheck source=scripts/deploy/cloud.sh
. "$(dirname "${BASH_SOURCE[0]}")/deploy/cloud.sh"
begin "" "$@"

# Time for the steps of a worker other than the agent: clone, setup commands, uploads, push, callback.
OVERHEAD_MINUTES=15
SWEEP_MINUTES=10

# deploy JOB ACCOUNT IMAGE ARGUMENTS MEMORY CPU SECONDS VARIABLES SECRETS
deploy() {
  local job=$1 address=$2 image=$3 arguments=$4 memory=$5 cpu=$6 seconds=$7 variables=$8 secrets=$9
  local there=no scalars environment wanted in=spec.template.spec words
  # gcloud shows a job in the format of version 1 of Cloud Run's API.
  local task=$in.template.spec container="$in.template.spec.containers[0]"
  look scalars run jobs describe "$job" --region="$REGION" --format="value[separator='|']($container.image,$container.args,$container.resources.limits.memory,$container.resources.limits.cpu,$task.serviceAccountName,$task.maxRetries,$task.timeoutSeconds,$in.taskCount,$in.parallelism)" && there=yes
  look environment run jobs describe "$job" --region="$REGION" --flatten="$task.containers[0].env[]" --format="value[separator='|']($container.env.name,$container.env.value,$container.env.valueFrom.secretKeyRef.name,$container.env.valueFrom.secretKeyRef.key)" || true
  wanted="$image|$arguments|$memory|$cpu|$address|0|$seconds|1|1"
  if [ "$there" = yes ] && [ "$scalars" = "$wanted" ] && [ "$(sorted '' "$environment")" = "$(as_shown "$variables" "$secrets")" ]; then
    return
  fi
  say "Job $job"
  words=(run jobs deploy "$job" --region="$REGION" --image="$image" --args="$arguments" --service-account="$address"
    --memory="$memory" --cpu="$cpu" --tasks=1 --parallelism=1 --task-timeout="${seconds}s" --set-env-vars="$variables")
  # No retries: a second execution would repeat the effects of the first.
  words+=(--max-retries=0)
  if [ -n "$secrets" ]; then
    words+=(--set-secrets="$secrets")
  else
    words+=(--clear-secrets)
  fi
  change "${words[@]}"
}

# Prints the value of --set-secrets for those of these secrets that exist.
secrets_of() {
  local name found list=
  for name; do
    if look found secrets describe "$name" --format='value(name)'; then
      list="$list${list:+,}$name=$name:latest"
    fi
  done
  say "$list"
}

# Rounded up to a minute.
minutes=${MAX_TIMEOUT_MINUTES%%.*}
[ "$minutes" = "$MAX_TIMEOUT_MINUTES" ] || minutes=$((minutes + 1))
# shellcheck disable=SC2034 # `variables` reads it by its name
CCRUN_BACKEND=gcp
api_image='' worker_image=''

tag=$(image_tag)
find_image api_image api "$tag" || fail "There is no image api:$tag: run scripts/build-and-push.sh first."
find_image worker_image worker "$tag" || fail "There is no image worker:$tag: run scripts/build-and-push.sh first."
# shellcheck disable=SC2086 # a list of names
worker_secrets=$(secrets_of $WORKER_SECRETS)
sweep_secrets=$(secrets_of CLOUDRUN_CALLBACK_SECRET)
[ -n "$sweep_secrets" ] || missing "The secret CLOUDRUN_CALLBACK_SECRET" create-secrets.sh

deploy "$CLOUDRUN_JOB_NAME" "$WORKER" "$worker_image" "" "$JOB_MEMORY" "$JOB_CPU" $(((minutes + OVERHEAD_MINUTES) * 60)) \
  "$(variables CCRUN_BACKEND PROJECT_ID REGION GCS_LOGS_BUCKET KMS_LOCATION KMS_KEY_RING KMS_KEY_NAME CLOUDRUN_JOB_NAME \
    MAX_TIMEOUT_MINUTES MAX_LINE_BYTES MAX_UPLOAD_BYTES TASK_MEMORY TASK_PIDS TASK_DISK CCRUN_SANDBOX AGENT_NETWORK AGENT_ALLOWED_HOSTS AGENT_PRIVATE_HOSTS CALLBACK_ALLOWED_HOSTS CALLBACK_TIMEOUT_SECONDS GOOGLE_OIDC_AUDIENCE ANTHROPIC_BASE_URL ANTHROPIC_MODEL ANTHROPIC_DEFAULT_OPUS_MODEL \
    ANTHROPIC_DEFAULT_SONNET_MODEL ANTHROPIC_DEFAULT_HAIKU_MODEL FLUSH_LINES FLUSH_SECONDS LOG_LEVEL)" "$worker_secrets"
deploy "$CLOUDRUN_SWEEP_NAME" "$SWEEP" "$api_image" sweep 512Mi 1 $((SWEEP_MINUTES * 60)) \
  "$(variables CCRUN_BACKEND PROJECT_ID REGION GCS_LOGS_BUCKET KMS_LOCATION KMS_KEY_RING KMS_KEY_NAME CLOUDRUN_JOB_NAME \
    CALLBACK_ALLOWED_HOSTS CALLBACK_TIMEOUT_SECONDS GOOGLE_OIDC_AUDIENCE LOG_LEVEL)" "$sweep_secrets"
finish
then_run grant-job-permissions.sh
