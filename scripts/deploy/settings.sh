# shellcheck shell=bash
# The settings of the deployment: defaults, sources and checks. Sourced by cloud.sh.

# settings FUNCTION: calls the function for each setting, with name, default, pattern and the description of valid values.
# .env.example documents the settings.
settings() {
  local name='[a-z]([-a-z0-9]{0,47}[a-z0-9])?' id='[A-Za-z0-9_-]{1,63}' any='[^[:cntrl:]]*'
  local size='[0-9]+(Mi|Gi)' cpu='[1248]' whole='a whole number' email='[^[:space:]@,]+@[^[:space:]@,]+'
  local resource='a name of lower-case letters, digits and hyphens' number='[0-9]{1,12}(\.[0-9]{1,12})?'
  "$1" PROJECT_ID '' '[a-z][-a-z0-9]{4,28}[a-z0-9]' 'the ID of a project: 6 to 30 lower-case letters, digits and hyphens'
  "$1" REGION us-central1 '[a-z]+-[a-z]+[0-9]+' 'a region, such as us-central1'
  "$1" GCS_LOGS_BUCKET "${PROJECT_ID:+$PROJECT_ID-claude-logs}" '[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]' \
    'the name of a bucket, without gs:// and without a path'
  "$1" LOG_RETENTION_DAYS 30 '[1-9][0-9]{0,4}' 'a number of days'
  "$1" KMS_LOCATION global '[a-z]+(-[a-z]+[0-9]+|[0-9]*)' 'a location of Cloud KMS, such as global or us-central1'
  "$1" KMS_KEY_RING claude-code "$id" 'a name of letters, digits, hyphens and underscores'
  "$1" KMS_KEY_NAME payload-encryption "$id" 'a name of letters, digits, hyphens and underscores'
  "$1" CLOUDRUN_JOB_NAME claude-code-job "$name" "$resource"
  "$1" CLOUDRUN_SWEEP_NAME claude-code-sweep "$name" "$resource"
  "$1" CLOUDRUN_SERVICE_NAME claude-code-service "$name" "$resource"
  "$1" ARTIFACT_REPOSITORY claude-code "$name" "$resource"
  "$1" IMAGE_TAG '' '[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}' 'a tag: letters, digits, dots, hyphens and underscores'
  "$1" BUILD_SERVICE_ACCOUNT '' "$email" 'the e-mail address of a service account'
  "$1" JOB_MEMORY 2Gi "$size" 'a size, such as 2Gi'
  "$1" JOB_CPU 2 "$cpu" '1, 2, 4 or 8'
  "$1" MAX_TIMEOUT_MINUTES 60 "$number" 'a number of minutes from 1 to 1440'
  "$1" SERVICE_MEMORY 1Gi "$size" 'a size, such as 1Gi'
  "$1" SERVICE_CPU 1 "$cpu" '1, 2, 4 or 8'
  "$1" SERVICE_CONCURRENCY 100 '[1-9][0-9]{0,3}' "$whole from 1 to 1000"
  "$1" SERVICE_MIN_INSTANCES 0 '[0-9]{1,4}' "$whole"
  "$1" SERVICE_MAX_INSTANCES 10 '[1-9][0-9]{0,3}' "$whole"
  "$1" SERVICE_INGRESS all 'all|internal|internal-and-cloud-load-balancing' 'all, internal or internal-and-cloud-load-balancing'
  "$1" SERVICE_CPU_ALWAYS no 'yes|no' 'yes or no'
  "$1" CALLERS '' "((user|group|serviceAccount):$email|domain:[^[:space:],]+)(,((user|group|serviceAccount):$email|domain:[^[:space:],]+))*" \
    'members separated by commas, such as user:ann@example.com,serviceAccount:app@my-project.iam.gserviceaccount.com'
  "$1" SWEEP_SCHEDULE '*/5 * * * *' '[^[:space:]]+( [^[:space:]]+){4}' 'a cron schedule: five fields'
  "$1" SCHEDULER_LOCATION "${REGION:-}" '[a-z]+-[a-z]+[0-9]+' 'a region, such as us-central1'
  # ccrun checks these.
  "$1" MAX_REQUEST_BYTES '' "$any" 'one line'
  "$1" ALLOWED_TOOLS '' "$any" 'one line'
  "$1" PERMISSION_MODE '' "$any" 'one line'
  "$1" MAX_LINE_BYTES '' "$any" 'one line'
  "$1" MAX_UPLOAD_BYTES '' "$any" 'one line'
  "$1" TASK_MEMORY '' "$any" 'one line'
  "$1" TASK_PIDS '' "$any" 'one line'
  "$1" TASK_DISK '' "$any" 'one line'
  "$1" CCRUN_SANDBOX '' "$any" 'one line'
  "$1" AGENT_NETWORK '' "$any" 'one line'
  "$1" AGENT_ALLOWED_HOSTS '' "$any" 'one line'
  "$1" AGENT_PRIVATE_HOSTS '' "$any" 'one line'
  "$1" CALLBACK_ALLOWED_HOSTS '' "$any" 'one line'
  "$1" GOOGLE_OIDC_AUDIENCE '' "$any" 'one line'
  "$1" HEARTBEAT_SECONDS '' "$any" 'one line'
  "$1" CALLBACK_TIMEOUT_SECONDS '' "$any" 'one line'
  "$1" ANTHROPIC_BASE_URL '' "$any" 'one line'
  "$1" ALLOWED_BASE_URLS '' "$any" 'one line'
  "$1" ANTHROPIC_MODEL '' "$any" 'one line'
  "$1" ANTHROPIC_DEFAULT_OPUS_MODEL '' "$any" 'one line'
  "$1" ANTHROPIC_DEFAULT_SONNET_MODEL '' "$any" 'one line'
  "$1" ANTHROPIC_DEFAULT_HAIKU_MODEL '' "$any" 'one line'
  "$1" FLUSH_LINES '' "$any" 'one line'
  "$1" FLUSH_SECONDS '' "$any" 'one line'
  "$1" POLL_SECONDS '' "$any" 'one line'
  "$1" LOG_LEVEL '' "$any" 'one line'
  "$1" SERVICE_URL '' 'https?://[^[:space:]/?#@]+' 'the URL of a service, without a path'
  "$1" TEST_CALLBACK_URL '' 'https?://[^[:space:]]+' 'an http or https URL'
  # Secrets are never printed and never passed on a command line.
  "$1" CLOUDRUN_CALLBACK_SECRET '' "$any" 'one line'
  "$1" ANTHROPIC_API_KEY '' '[!-~]*' 'printable ASCII characters without blanks'
  "$1" CLAUDE_CODE_OAUTH_TOKEN '' '[!-~]*' 'printable ASCII characters without blanks'
  "$1" ANTHROPIC_AUTH_TOKEN '' '[!-~]*' 'printable ASCII characters without blanks'
  "$1" ANTHROPIC_CUSTOM_HEADERS '' "$any" 'one line'
  "$1" CCRUN_API_TOKENS '' "$any" 'one line'
  "$1" AUTH_TOKEN '' '[!-~]*' 'printable ASCII characters without blanks'
}

# Settings of the local backend. The deployment does not use them, but they may be in the same file.
OTHER_SETTINGS=" HTTPS_PROXY HTTP_PROXY NO_PROXY AGENT_PROXY SSL_CERT_FILE NODE_EXTRA_CA_CERTS
CLAUDE_CODE_USE_VERTEX ANTHROPIC_VERTEX_PROJECT_ID CLOUD_ML_REGION ANTHROPIC_VERTEX_BASE_URL CLAUDE_CODE_USE_BEDROCK AWS_REGION
ANTHROPIC_BEDROCK_BASE_URL AWS_BEARER_TOKEN_BEDROCK AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN
CLAUDE_CODE_USE_FOUNDRY ANTHROPIC_FOUNDRY_RESOURCE ANTHROPIC_FOUNDRY_BASE_URL ANTHROPIC_FOUNDRY_API_KEY
ANTHROPIC_FOUNDRY_AUTH_TOKEN CCRUN_EXPOSE_CLOUD_CREDENTIALS CCRUN_ALLOW_ANYBODY HOST PORT CCRUN_BACKEND CCRUN_DATA_DIR MAX_CONCURRENT_TASKS CLAUDE_CLI CCRUN_AGENT_USER CCRUN_AGENT_USERS LOG_FORMAT
STORAGE_EMULATOR_HOST KMS_EMULATOR_HOST CLOUD_RUN_EMULATOR_HOST "
# Those that Secret Manager stores for the worker.
WORKER_SECRETS='CLOUDRUN_CALLBACK_SECRET ANTHROPIC_API_KEY CLAUDE_CODE_OAUTH_TOKEN ANTHROPIC_AUTH_TOKEN ANTHROPIC_CUSTOM_HEADERS'
SECRET_SETTINGS=" $WORKER_SECRETS CCRUN_API_TOKENS AUTH_TOKEN "
KNOWN_SETTINGS=' '

# Reads .env and checks every setting. The environment takes precedence over the file, and the file over the default.
load_settings() {
  settings know_setting
  local file=${ENV_FILE:-$ROOT/.env}
  if [ -f "$file" ]; then
    read_env_file "$file"
  elif [ -n "${ENV_FILE:-}" ]; then
    fail "ENV_FILE names $ENV_FILE, which does not exist."
  fi
  settings check_setting
}

know_setting() { KNOWN_SETTINGS="$KNOWN_SETTINGS$1 "; }

# Reads lines of NAME=VALUE, where quotes are allowed. Nothing in the file is run, expanded or exported. Names that are not settings,
# such as PATH, are ignored.
read_env_file() {
  local line name value number=0
  local is_pair='^(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$' is_blank='^(#.*)?$'
  local in_double='^[[:space:]]*"([^"]*)"[[:space:]]*(#.*)?$' in_single="^[[:space:]]*'([^']*)'[[:space:]]*(#.*)?\$"
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=$(trimmed "${line%$'\r'}")
    [[ $line =~ $is_blank ]] && continue
    [[ $line =~ $is_pair ]] || fail "Line $number of $1 is not NAME=VALUE."
    name=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
    case $KNOWN_SETTINGS$OTHER_SETTINGS in
      *[[:space:]]"$name"[[:space:]]*) ;;
      *)
        note "$name in $1 is not a setting: ignored."
        continue
        ;;
    esac
    if [[ $value =~ $in_double ]] || [[ $value =~ $in_single ]]; then
      value=${BASH_REMATCH[1]}
    elif [[ $value =~ ^[[:space:]]*[\"\'] ]]; then
      fail "Line $number of $1 has unbalanced quotes."
    else
      # A comment begins after a space.
      value=$(trimmed "${value%%[[:space:]]#*}")
    fi
    [ -n "${!name+set}" ] || printf -v "$name" %s "$value"
  done <"$1"
}

trimmed() {
  local text=$1
  text=${text#"${text%%[![:space:]]*}"}
  printf %s "${text%"${text##*[![:space:]]}"}"
}

check_setting() {
  local name=$1 default=$2 pattern="^($3)\$" meaning=$4 value
  value=${!name:-}
  [ -n "$value" ] || value=$default
  if [ -n "$value" ] && ! [[ $value =~ $pattern ]]; then
    case $SECRET_SETTINGS in
      *" $name "*) fail "$name must be $meaning." ;;
      *) fail "$name must be $meaning, not \"${value:0:60}\"." ;;
    esac
  fi
  printf -v "$name" %s "$value"
  # gcloud must not get settings that were in the environment.
  export -n "${name?}"
}
