# shellcheck shell=bash
# For the scripts that deploy to Google Cloud: their settings, how they ask gcloud and change something, and what they say when
# that fails. Everything is looked at before it is changed, so that a script can be run again at any time. To be sourced.
# Runs under the bash 3.2 of macOS too.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/lib.sh
. "$ROOT/scripts/lib.sh"

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

OPTIONS=" "
# How many changes the script has made, or in a dry run would have made.
CHANGES=0
# A new service account is known everywhere only after a while: so often, and after so many seconds, a grant is tried again.
SETTLE_TRIES=12
SETTLE_SECONDS=${SETTLE_SECONDS:-5}

# Whether what belongs to an API that is off counts as absent.
WHEN_OFF=fails

# Worded as gcloud and the services behind it word it.
DENIED="PERMISSION_DENIED|does not have [^ ]+ access|does not have permission|Permission '?[A-Za-z.]+'? denied|HTTPError 403"
DISABLED='SERVICE_DISABLED|has not been used in project|is not enabled on project'
ABSENT='NOT_FOUND|not found|Cannot find|does not exist|Unknown service account|HTTPError 404|is in (DISABLED|DESTROYED) state'
LOGGED_OUT='active account|gcloud auth login|Reauthentication|invalid_grant|UNAUTHENTICATED'

note() { printf '%s\n' "$*" >&2; }

# --- settings ----------------------------------------------------------------------------------------------------------

# Every setting of the deployment goes to "$1": name, default, pattern, what it must be. .env.example explains them.
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
  "$1" SWEEP_SCHEDULE '*/5 * * * *' '[^[:space:]]+( [^[:space:]]+){4}' 'a schedule of cron: five fields'
  "$1" SCHEDULER_LOCATION "${REGION:-}" '[a-z]+-[a-z]+[0-9]+' 'a region, such as us-central1'
  # Checked by ccrun itself.
  "$1" MAX_REQUEST_BYTES '' "$any" 'one line'
  "$1" ALLOWED_TOOLS '' "$any" 'one line'
  "$1" PERMISSION_MODE '' "$any" 'one line'
  "$1" CALLBACK_ALLOWED_HOSTS '' "$any" 'one line'
  "$1" ANTHROPIC_BASE_URL '' "$any" 'one line'
  "$1" FLUSH_LINES '' "$any" 'one line'
  "$1" FLUSH_SECONDS '' "$any" 'one line'
  "$1" POLL_SECONDS '' "$any" 'one line'
  "$1" LOG_LEVEL '' "$any" 'one line'
  "$1" SERVICE_URL '' 'https?://[^[:space:]/?#@]+' 'the URL of a service, without a path'
  "$1" TEST_CALLBACK_URL '' 'https?://[^[:space:]]+' 'an http or https URL'
  # Secrets: their values are never shown, and never on a command line.
  "$1" CLOUDRUN_CALLBACK_SECRET '' "$any" 'one line'
  "$1" ANTHROPIC_API_KEY '' '[!-~]*' 'printable ASCII characters without blanks'
  "$1" CLAUDE_CODE_OAUTH_TOKEN '' '[!-~]*' 'printable ASCII characters without blanks'
  "$1" CCRUN_API_TOKENS '' "$any" 'one line'
  "$1" AUTH_TOKEN '' '[!-~]*' 'printable ASCII characters without blanks'
}

# Of ccrun on one machine; the deployment has no use for them, but the same file may name them.
OTHER_SETTINGS=" HOST PORT CCRUN_BACKEND CCRUN_DATA_DIR MAX_CONCURRENT_TASKS CLAUDE_CLI CCRUN_AGENT_USER LOG_FORMAT
STORAGE_EMULATOR_HOST KMS_EMULATOR_HOST CLOUD_RUN_EMULATOR_HOST "
SECRET_SETTINGS=' CLOUDRUN_CALLBACK_SECRET ANTHROPIC_API_KEY CLAUDE_CODE_OAUTH_TOKEN CCRUN_API_TOKENS AUTH_TOKEN '
KNOWN_SETTINGS=' '

# Reads .env and checks every setting. The environment wins over the file, the file over the default.
load_settings() {
  settings know_setting
  local file=${ENV_FILE:-$ROOT/.env}
  if [ -f "$file" ]; then
    read_env_file "$file"
  elif [ -n "${ENV_FILE:-}" ]; then
    fail "There is no file $ENV_FILE, which ENV_FILE names."
  fi
  settings check_setting
}

know_setting() { KNOWN_SETTINGS="$KNOWN_SETTINGS$1 "; }

# The file is data: lines of NAME=VALUE, where quotes are allowed. Nothing in it is run, expanded or exported, and a name that is
# not a setting (PATH, say) is passed over.
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
        note "$name in $1 is not a setting: it is passed over."
        continue
        ;;
    esac
    if [[ $value =~ $in_double ]] || [[ $value =~ $in_single ]]; then
      value=${BASH_REMATCH[1]}
    elif [[ $value =~ ^[[:space:]]*[\"\'] ]]; then
      fail "Line $number of $1 has a quote too few or too many."
    else
      # A comment begins with a blank.
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
  # What came with the environment is not for gcloud.
  export -n "${name?}"
}

# --- the script --------------------------------------------------------------------------------------------------------

# begin "the script's own options" "$@": reads options and settings, and sees to it that gcloud can be asked.
begin() {
  read_options "$@"
  load_settings
  [ -n "$PROJECT_ID" ] || fail "PROJECT_ID is not set: copy .env.example to .env and set it there."
  API=$(account ccrun-api)
  WORKER=$(account ccrun-worker)
  SWEEP=$(account ccrun-sweep)
  SCHEDULER=$(account ccrun-scheduler)
  need_gcloud
}

read_options() {
  local known=" --dry-run --help $1 " option
  shift
  for option; do
    case $option in
      *[[:space:]]*) fail "${0##*/} does not know \"$option\": try --help." ;;
    esac
    case $known in
      *" $option "*) OPTIONS="$OPTIONS$option " ;;
      *) fail "${0##*/} does not know \"$option\": try --help." ;;
    esac
  done
  if option --help; then
    # The comment at the head of the script.
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit 0
  fi
}

option() {
  case $OPTIONS in
    *" $1 "*) ;;
    *) return 1 ;;
  esac
}

dry_run() { option --dry-run; }

need_gcloud() {
  command -v gcloud >/dev/null ||
    fail "gcloud is not here: install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install."
  ACCOUNT=$(gcloud auth list --filter=status:ACTIVE --format='value(account)' 2>/dev/null) || ACCOUNT=
  [ -n "$ACCOUNT" ] || fail "Nobody is logged in: run gcloud auth login."
}

# Runs another script of this folder, with the settings of this one but the secrets.
then_run() {
  local script=$1 name
  say "--- scripts/$script"
  (
    for name in $KNOWN_SETTINGS; do
      case $SECRET_SETTINGS in
        *" $name "*) ;;
        *) export "${name?}" ;;
      esac
    done
    if dry_run; then
      exec "$ROOT/scripts/$script" --dry-run
    fi
    exec "$ROOT/scripts/$script"
  )
}

finish() {
  if [ "$CHANGES" = 0 ]; then
    say "${0##*/}: all is as it should be."
  elif dry_run; then
    say "${0##*/}: a dry run, nothing was changed."
  else
    say "${0##*/}: done."
  fi
}

# Ends the script because something that another one makes is not there; in a dry run it goes on, since that one was dry too.
missing() {
  dry_run || fail "$1 is not there: run scripts/$2 first."
  say "$1 is not there yet."
}

# Asks for the project's ID before something is deleted.
confirm() {
  option --yes && return
  dry_run && return
  local answer=
  printf 'Type the ID of the project to go on: ' >&2
  IFS= read -r answer || true
  [ "$answer" = "$PROJECT_ID" ] || fail "" "That is not $PROJECT_ID: nothing was deleted."
}

# --- gcloud ------------------------------------------------------------------------------------------------------------

# Its complaint is in $SCRATCH/complaint afterwards.
run_gcloud() { gcloud "$@" --project="$PROJECT_ID" --quiet 2>"$SCRATCH/complaint" <"${INPUT:-/dev/null}"; }

complains() { grep -Eq "$1" "$SCRATCH/complaint"; }

# look VARIABLE gcloud-words…: puts what gcloud answers into the variable. Fails when there is no such thing, and ends the script
# with a sentence when gcloud cannot tell.
look() {
  local _into=$1 _answer
  shift
  printf -v "$_into" ''
  if _answer=$(run_gcloud "$@"); then
    printf -v "$_into" %s "$_answer"
    return
  fi
  if complains "$DISABLED"; then
    # In a dry run it would have been enabled. What an API that is off has made is of no interest to teardown.sh.
    { dry_run || [ "$WHEN_OFF" = absent ]; } && return 1
  elif ! complains "$DENIED" && complains "$ABSENT"; then
    return 1
  fi
  refused "$@"
}

# change gcloud-words…: changes something, or in a dry run says what it would run.
change() {
  CHANGES=$((CHANGES + 1))
  if dry_run; then
    would_run gcloud "$@"
  else
    run_gcloud "$@" >/dev/null || refused "$@"
  fi
}

would_run() {
  local word line="would run:"
  for word; do
    case $word in
      *[!A-Za-z0-9_.,:/@=+-]*) line="$line $(printf %q "$word")" ;;
      *) line="$line $word" ;;
    esac
  done
  say "$line"
}

# Ends the script with one sentence about what gcloud complained of, and the last line that it said.
refused() {
  local said command="gcloud $1 $2" permission=
  said=$(grep -v '^[[:space:]]*$' "$SCRATCH/complaint" | tail -n 1) || true
  if complains "$DISABLED"; then
    fail "An API is off in $PROJECT_ID: run scripts/setup-project.sh." "$said"
  elif complains "$DENIED"; then
    permission=$(sed -En "s/.*(Permission '?|does not have )([a-z]+\.[A-Za-z.]+)('? denied| access).*/ (\2)/p" "$SCRATCH/complaint" | head -n 1)
    fail "$ACCOUNT may not do this in $PROJECT_ID: $command needs $(role_for "$@")$permission." "$said"
  elif complains "$LOGGED_OUT"; then
    fail "The login of $ACCOUNT has run out: run gcloud auth login." "$said"
  fi
  fail "$command failed." "$said"
}

# Prints the role that lets somebody do it.
role_for() {
  case "$1 $2" in
    "services "*) say roles/serviceusage.serviceUsageAdmin ;;
    "projects "*) say roles/browser ;;
    "billing "*) say roles/billing.viewer ;;
    "storage "*) say roles/storage.admin ;;
    "kms "*) say roles/cloudkms.admin ;;
    "secrets "*) say roles/secretmanager.admin ;;
    "iam roles") say roles/iam.roleAdmin ;;
    "iam "*) say roles/iam.serviceAccountAdmin ;;
    "artifacts "*) say roles/artifactregistry.admin ;;
    "builds "*) say roles/cloudbuild.builds.editor ;;
    "scheduler "*) say "roles/cloudscheduler.admin, and roles/iam.serviceAccountUser on $SCHEDULER" ;;
    "run "*) say "roles/run.admin, and roles/iam.serviceAccountUser on the ccrun accounts" ;;
    *) say "a role that you do not have" ;;
  esac
}

# --- identities --------------------------------------------------------------------------------------------------------

# Prints the address of one of our accounts.
account() { say "$1@$PROJECT_ID.iam.gserviceaccount.com"; }

# make_account NAME "what it is for"
make_account() {
  local found
  look found iam service-accounts describe "$(account "$1")" --format='value(email)' && return
  say "Service account $1"
  change iam service-accounts create "$1" --display-name="$1" --description="$2"
}

# make_role NAME "what it lets do" permission,permission…
make_role() {
  local found deleted permissions
  if ! look found iam roles describe "$1" --format='value[separator="|"](deleted,includedPermissions)'; then
    say "Role $1"
    change iam roles create "$1" --title="$1" --description="$2" --permissions="$3" --stage=GA
    return
  fi
  IFS='|' read -r deleted permissions <<<"$found"
  if [ "$deleted" = True ]; then
    # For a week after it was deleted a role cannot be made again, but brought back.
    say "Role $1: brought back"
    change iam roles undelete "$1"
  fi
  if [ "$(sorted ';' "$permissions")" != "$(sorted ',' "$3")" ]; then
    say "Role $1: its permissions"
    change iam roles update "$1" --permissions="$3"
  fi
}

# sorted SEPARATOR LIST: prints the parts of a list, in order, a line each.
sorted() { printf '%s\n' "$2" | tr "${1:-\n}" '\n' | LC_ALL=C sort; }

# --- who may do what on what -------------------------------------------------------------------------------------------

# After one of these, `grant` and `revoke_all` speak of that resource. They fail when it is not there.
on_bucket() { on yes storage buckets "gs://$GCS_LOGS_BUCKET"; }
on_key() { on yes kms keys "$KMS_KEY_NAME" --keyring="$KMS_KEY_RING" --location="$KMS_LOCATION"; }
on_secret() { on yes "" secrets "$1"; }
on_service() { on yes run services "$CLOUDRUN_SERVICE_NAME" --region="$REGION"; }
on_job() { on no run jobs "$1" --region="$REGION"; }

on() {
  WITH_CONDITIONS=$1
  KIND=("$2" "$3")
  [ -n "$2" ] || KIND=("$3")
  shift 3
  RESOURCE=("$@")
  GRANTED=$'\n'
  # One line a member: role, member, title and expression of the condition.
  look POLICY "${KIND[@]}" get-iam-policy "${RESOURCE[@]}" --flatten='bindings[].members[]' \
    --format='value[separator="|"](bindings.role,bindings.members,bindings.condition.title,bindings.condition.expression)'
}

# grant MEMBER ROLE [TITLE EXPRESSION]
grant() {
  local member=$1 role=$2 title=${3:-} expression=${4:-} tries=0 words
  local line="$role|$member|$title|$expression"
  GRANTED=$GRANTED$line$'\n'
  [[ $'\n'$POLICY$'\n' == *$'\n'"$line"$'\n'* ]] && return
  say "${role##*/} on ${RESOURCE[0]} for ${member#*:}${title:+ ($title)}"
  words=("${KIND[@]}" add-iam-policy-binding "${RESOURCE[@]}" --member="$member" --role="$role")
  if [ -n "$title" ]; then
    # Separated by # since expressions hold commas.
    words+=("--condition=^#^title=$title#expression=$expression")
  elif [ "$WITH_CONDITIONS" = yes ]; then
    words+=(--condition=None)
  fi
  CHANGES=$((CHANGES + 1))
  if dry_run; then
    would_run gcloud "${words[@]}"
    return
  fi
  until run_gcloud "${words[@]}" >/dev/null; do
    tries=$((tries + 1))
    { [ "$tries" -lt "$SETTLE_TRIES" ] && complains 'does not exist'; } || refused "${words[@]}"
    sleep "$SETTLE_SECONDS"
  done
}

# Takes away all that a member may do on the resource.
revoke_all() {
  local role member title expression words
  while IFS='|' read -r role member title expression; do
    [ "$member" = "$1" ] || continue
    words=("${KIND[@]}" remove-iam-policy-binding "${RESOURCE[@]}" --member="$member" --role="$role")
    if [ -n "$title" ]; then
      words+=("--condition=^#^title=$title#expression=$expression")
    elif [ "$WITH_CONDITIONS" = yes ]; then
      words+=(--condition=None)
    fi
    change "${words[@]}"
  done <<<"$POLICY"
}

# Tells what our accounts may do on the resource beyond what was granted: a leftover, or somebody's doing.
note_strangers() {
  local line role member
  while IFS= read -r line; do
    IFS='|' read -r role member _ <<<"$line"
    case $member in
      "serviceAccount:$API" | "serviceAccount:$WORKER" | "serviceAccount:$SWEEP" | "serviceAccount:$SCHEDULER" | allUsers | allAuthenticatedUsers) ;;
      *) continue ;;
    esac
    [[ $GRANTED == *$'\n'"$line"$'\n'* ]] ||
      note "Not of ccrun's doing: ${member#*:} has $role on ${RESOURCE[0]}. Take it away unless you know what for."
  done <<<"$POLICY"
}

grant_key() {
  grant "serviceAccount:$API" roles/cloudkms.cryptoKeyEncrypter
  grant "serviceAccount:$WORKER" roles/cloudkms.cryptoKeyDecrypter
  grant "serviceAccount:$SWEEP" roles/cloudkms.cryptoKeyDecrypter
  note_strangers
}

# Who may call the service.
grant_callers() {
  local member members=()
  IFS=',' read -r -a members <<<"$CALLERS"
  for member in ${members[@]+"${members[@]}"}; do
    grant "$member" roles/run.invoker
  done
  note_strangers
  [ -n "$CALLERS" ] || note "CALLERS is not set: nobody may call the service but who may do so in the whole project."
}

# --- images and what runs them -----------------------------------------------------------------------------------------

# Prints the tag of the images: IMAGE_TAG, else what git calls this commit.
image_tag() {
  if [ -n "$IMAGE_TAG" ]; then
    say "$IMAGE_TAG"
  else
    git -C "$ROOT" describe --always --tags 2>/dev/null ||
      fail "This folder is not a clone of the repository, so its version has no name: set IMAGE_TAG."
  fi
}

# Prints where an image is kept, without a tag.
image_name() { say "$REGION-docker.pkg.dev/$PROJECT_ID/$ARTIFACT_REPOSITORY/$1"; }

# find_image VARIABLE api|worker TAG: puts the image as it is deployed, by its digest, into the variable. Fails when it is not there.
find_image() {
  local _digest
  if look _digest artifacts docker images describe "$(image_name "$2"):$3" --format='value(image_summary.digest)'; then
    printf -v "$1" %s "$(image_name "$2")@$_digest"
  elif dry_run; then
    printf -v "$1" %s "$(image_name "$2"):$3"
  else
    return 1
  fi
}

# Between two variables; a setting that holds it is refused.
BETWEEN='|;|'

# Prints NAME=VALUE for every one of these settings that is set, as --set-env-vars reads them.
variables() {
  local name list="^$BETWEEN^" separator=
  for name; do
    [ -n "${!name}" ] || continue
    case ${!name} in
      *"$BETWEEN"*) fail "$name must not hold $BETWEEN." ;;
    esac
    list="$list$separator$name=${!name}"
    separator=$BETWEEN
  done
  say "$list"
}

# Prints the same as the container shows it: NAME|VALUE|| or NAME||SECRET|VERSION, a line each.
as_shown() {
  local rest=${1#"^$BETWEEN^"}$BETWEEN pair
  {
    while [ -n "$rest" ]; do
      pair=${rest%%"$BETWEEN"*}
      rest=${rest#*"$BETWEEN"}
      say "${pair%%=*}|${pair#*=}||"
    done
    [ -z "$2" ] || printf '%s\n' "$2" | tr ',' '\n' | sed -E 's/^([^=]+)=([^:]+):(.*)$/\1||\2|\3/'
  } | LC_ALL=C sort
}
