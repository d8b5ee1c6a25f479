#!/usr/bin/env bash
# Deploys the API, `ccrun serve`, as a service that only CALLERS may call. Can be run again at any time: it changes only what differs.
#   scripts/deploy-service.sh [--dry-run]
# Settings come from the environment and from .env; .env.example explains them.
set -euo pipefail
# shellcheck source=scripts/deploy/cloud.sh
. "$(dirname "${BASH_SOURCE[0]}")/deploy/cloud.sh"
begin "" "$@"

# Cloud Run's longest timeout of a request. Readers resume an interrupted stream with Last-Event-ID.
REQUEST_SECONDS=3600

# Not /healthz: Cloud Run reserves some paths that end with z.
PROBE=httpGet.path=/health

deploy() {
  local image=$1 variables=$2 there=no scalars environment wanted throttling=true min=$SERVICE_MIN_INSTANCES
  local at=spec.template.spec with=spec.template.metadata.annotations
  local container="$at.containers[0]"
  [ "$SERVICE_CPU_ALWAYS" = no ] || throttling=false
  # gcloud shows a service in the format of version 1 of Cloud Run's API.
  look scalars run services describe "$CLOUDRUN_SERVICE_NAME" --region="$REGION" --format="value[separator='|']($container.image,$container.resources.limits.memory,$container.resources.limits.cpu,$at.serviceAccountName,$at.containerConcurrency,$at.timeoutSeconds,$with.'run.googleapis.com/execution-environment',$with.'run.googleapis.com/cpu-throttling',$with.'autoscaling.knative.dev/minScale',$with.'autoscaling.knative.dev/maxScale',metadata.annotations.'run.googleapis.com/ingress',$container.startupProbe.httpGet.path,$container.livenessProbe.httpGet.path)" && there=yes
  look environment run services describe "$CLOUDRUN_SERVICE_NAME" --region="$REGION" --flatten="$at.containers[0].env[]" --format="value[separator='|']($container.env.name,$container.env.value,$container.env.valueFrom.secretKeyRef.name,$container.env.valueFrom.secretKeyRef.key)" || true
  # gcloud shows an empty value for no minimum.
  [ "$min" != 0 ] || min=
  wanted="$image|$SERVICE_MEMORY|$SERVICE_CPU|$API|$SERVICE_CONCURRENCY|$REQUEST_SECONDS|gen2|$throttling|$min|$SERVICE_MAX_INSTANCES|$SERVICE_INGRESS|/health|/health"
  if [ "$there" = yes ] && [ "$(printf %s "$scalars" | sed 's/|True|/|true|/; s/|False|/|false|/')" = "$wanted" ] &&
    [ "$(sorted '' "$environment")" = "$(as_shown "$variables" "")" ]; then
    return
  fi
  say "Service $CLOUDRUN_SERVICE_NAME"
  local words=(run deploy "$CLOUDRUN_SERVICE_NAME" --region="$REGION" --image="$image" --service-account="$API"
    --no-allow-unauthenticated --ingress="$SERVICE_INGRESS" --execution-environment=gen2 --memory="$SERVICE_MEMORY"
    --cpu="$SERVICE_CPU" --concurrency="$SERVICE_CONCURRENCY" --timeout="${REQUEST_SECONDS}s"
    --min-instances="$SERVICE_MIN_INSTANCES" --max-instances="$SERVICE_MAX_INSTANCES"
    --startup-probe="$PROBE,periodSeconds=1,timeoutSeconds=1,failureThreshold=60"
    --liveness-probe="$PROBE,periodSeconds=30,timeoutSeconds=5,failureThreshold=3"
    --set-env-vars="$variables" --clear-secrets)
  if [ "$throttling" = true ]; then
    words+=(--cpu-throttling)
  else
    words+=(--no-cpu-throttling)
  fi
  change "${words[@]}"
}

# Prints the names of the worker's secrets. The API checks requests against them, but does not get their values.
worker_has() {
  local name found list=
  for name in $WORKER_SECRETS; do
    if look found secrets describe "$name" --format='value(name)'; then
      list="$list${list:+,}$name"
    fi
  done
  say "$list"
}

# shellcheck disable=SC2034 # `variables` reads both by their names
CCRUN_BACKEND=gcp CCRUN_WORKER_HAS=$(worker_has)
tag=$(image_tag) image='' url=''
find_image image api "$tag" || fail "There is no image api:$tag: run scripts/build-and-push.sh first."
look job run jobs describe "$CLOUDRUN_JOB_NAME" --region="$REGION" --format='value(metadata.name)' ||
  missing "The job $CLOUDRUN_JOB_NAME" deploy-job.sh
deploy "$image" "$(variables CCRUN_BACKEND CCRUN_WORKER_HAS PROJECT_ID REGION GCS_LOGS_BUCKET KMS_LOCATION KMS_KEY_RING KMS_KEY_NAME \
  CLOUDRUN_JOB_NAME MAX_TIMEOUT_MINUTES MAX_REQUEST_BYTES ALLOWED_TOOLS PERMISSION_MODE ALLOWED_BASE_URLS AGENT_NETWORK HEARTBEAT_SECONDS \
  POLL_SECONDS LOG_LEVEL)"
on_service || missing "The service $CLOUDRUN_SERVICE_NAME" deploy-service.sh
grant_callers
if look url run services describe "$CLOUDRUN_SERVICE_NAME" --region="$REGION" --format='value(status.url)'; then
  say "$url"
fi
finish
