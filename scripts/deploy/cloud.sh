# shellcheck shell=bash
# For the scripts that deploy to Google Cloud: their settings, how they ask gcloud and change something, and what they say when
# that fails. Everything is looked at before it is changed, so that a script can be run again at any time. To be sourced.
# Runs under the bash 3.2 of macOS too.

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
