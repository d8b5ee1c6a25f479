# shellcheck shell=bash
# How the scripts call gcloud, and what they print when it fails. Sourced by cloud.sh.

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
