# shellcheck shell=bash
# Sourced by the scripts that deploy to Google Cloud: options, settings, calls of gcloud and error messages. Scripts read the state of
# a resource before they change it, so that they can be run again at any time. Compatible with bash 3.2, which macOS has.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=scripts/lib.sh
. "$ROOT/scripts/lib.sh"
# shellcheck source=scripts/deploy/settings.sh
. "$ROOT/scripts/deploy/settings.sh"
# shellcheck source=scripts/deploy/gcloud.sh
. "$ROOT/scripts/deploy/gcloud.sh"
# shellcheck source=scripts/deploy/grants.sh
. "$ROOT/scripts/deploy/grants.sh"

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

OPTIONS=" "
# Number of changes that the script has made, or would have made without --dry-run.
CHANGES=0
# A new service account is not known to all of Google Cloud at first, so grants to it are retried.
GRANT_ATTEMPTS=12
GRANT_RETRY_SECONDS=${GRANT_RETRY_SECONDS:-5}

# The result of `query` when the API is disabled: `fails` or `absent`.
WHEN_API_DISABLED=fails

# Patterns of the errors of gcloud and of the services.
DENIED="PERMISSION_DENIED|does not have [^ ]+ access|does not have permission|Permission '?[A-Za-z.]+'? denied|HTTPError 403"
DISABLED='SERVICE_DISABLED|has not been used in project|is not enabled on project'
ABSENT='NOT_FOUND|not found|Cannot find|does not exist|Unknown service account|HTTPError 404|is in (DISABLED|DESTROYED) state'
LOGGED_OUT='active account|gcloud auth login|Reauthentication|invalid_grant|UNAUTHENTICATED'

note() { printf '%s\n' "$*" >&2; }

# --- the script --------------------------------------------------------------------------------------------------------

# begin "options of the script" "$@": reads options and settings, and checks that gcloud is installed and has an active account.
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
      *[[:space:]]*) fail "${0##*/} has no option \"$option\": see --help." ;;
    esac
    case $known in
      *" $option "*) OPTIONS="$OPTIONS$option " ;;
      *) fail "${0##*/} has no option \"$option\": see --help." ;;
    esac
  done
  if option --help; then
    # The comment at the top of the script.
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
    fail "gcloud is not installed: install the Google Cloud CLI, https://cloud.google.com/sdk/docs/install."
  ACCOUNT=$(gcloud auth list --filter=status:ACTIVE --format='value(account)' 2>/dev/null) || ACCOUNT=
  [ -n "$ACCOUNT" ] || fail "gcloud has no active account: run gcloud auth login."
}

# Runs another script of this directory with the settings of this one, without the secrets.
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
    say "${0##*/}: nothing to change."
  elif dry_run; then
    say "${0##*/}: dry run, nothing was changed."
  else
    say "${0##*/}: done."
  fi
}

# Fails because a resource that another script creates does not exist. In a dry run the script continues, because the other
# script may have been run with --dry-run too.
missing() {
  dry_run || fail "$1 does not exist: run scripts/$2 first."
  say "$1 does not exist yet."
}

# Asks the operator to confirm a deletion with the project's ID.
confirm() {
  option --yes && return
  dry_run && return
  local answer=
  printf 'Type the ID of the project to continue: ' >&2
  IFS= read -r answer || true
  [ "$answer" = "$PROJECT_ID" ] || fail "" "That is not $PROJECT_ID: nothing was deleted."
}

# --- images and their environment --------------------------------------------------------------------------------------

# Prints the tag of the images: IMAGE_TAG, or the output of `git describe`.
image_tag() {
  if [ -n "$IMAGE_TAG" ]; then
    say "$IMAGE_TAG"
  else
    git -C "$ROOT" describe --always --tags 2>/dev/null ||
      fail "This directory is not a clone of the repository, so the images have no tag: set IMAGE_TAG."
  fi
}

# Prints the name of an image, without a tag.
image_name() { say "$REGION-docker.pkg.dev/$PROJECT_ID/$ARTIFACT_REPOSITORY/$1"; }

# find_image VARIABLE api|worker TAG: sets the variable to the image's name with its digest. Returns 1 if the image does not exist.
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

# Separator of variables. Settings must not contain it.
SEPARATOR='|;|'

# Prints the value of --set-env-vars: NAME=VALUE for each of these settings that is set.
variables() {
  local name list="^$SEPARATOR^" separator=
  for name; do
    [ -n "${!name}" ] || continue
    case ${!name} in
      *"$SEPARATOR"*) fail "$name must not contain $SEPARATOR." ;;
    esac
    list="$list$separator$name=${!name}"
    separator=$SEPARATOR
  done
  say "$list"
}

# as_shown VARIABLES SECRETS: prints the values of --set-env-vars and --set-secrets as `gcloud run … describe` shows them, one line
# for each variable: NAME|VALUE|| or NAME||SECRET|VERSION.
as_shown() {
  local rest=${1#"^$SEPARATOR^"}$SEPARATOR pair
  {
    while [ -n "$rest" ]; do
      pair=${rest%%"$SEPARATOR"*}
      rest=${rest#*"$SEPARATOR"}
      say "${pair%%=*}|${pair#*=}||"
    done
    [ -z "$2" ] || printf '%s\n' "$2" | tr ',' '\n' | sed -E 's/^([^=]+)=([^:]+):(.*)$/\1||\2|\3/'
  } | LC_ALL=C sort
}
