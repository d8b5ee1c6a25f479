# shellcheck shell=bash
# Calls of gcloud, and messages when they fail. Sourced by cloud.sh.

# Writes gcloud's error output to $SCRATCH/errors.
run_gcloud() { gcloud "$@" --project="$PROJECT_ID" --quiet 2>"$SCRATCH/errors" <"${INPUT:-/dev/null}"; }

complains() { grep -Eq "$1" "$SCRATCH/errors"; }

# query VARIABLE gcloud-words…: sets the variable to the output of gcloud. Returns 1 if the resource does not exist, and exits with a
# message on other errors.
look() {
  local _into=$1 _output
  shift
  printf -v "$_into" ''
  if _output=$(run_gcloud "$@"); then
    printf -v "$_into" %s "$_output"
    return
  fi
  if complains "$DISABLED"; then
    # In a dry run, another script would have enabled the API. teardown.sh ignores resources of disabled APIs.
    { dry_run || [ "$WHEN_API_DISABLED" = absent ]; } && return 1
  elif ! complains "$DENIED" && complains "$ABSENT"; then
    return 1
  fi
  refused "$@"
}

# change gcloud-words…: runs a command that changes something, or prints it in a dry run.
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

# Exits with one sentence about the error of gcloud, and the last line of its error output.
refused() {
  local last_line command="gcloud $1 $2" permission=
  last_line=$(grep -v '^[[:space:]]*$' "$SCRATCH/errors" | tail -n 1) || true
  if complains "$DISABLED"; then
    fail "An API is disabled in $PROJECT_ID: run scripts/setup-project.sh." "$last_line"
  elif complains "$DENIED"; then
    permission=$(sed -En "s/.*(Permission '?|does not have )([a-z]+\.[A-Za-z.]+)('? denied| access).*/ (\2)/p" "$SCRATCH/errors" | head -n 1)
    fail "$ACCOUNT lacks a permission in $PROJECT_ID: $command needs $(role_for "$@")$permission." "$last_line"
  elif complains "$LOGGED_OUT"; then
    fail "The login of $ACCOUNT has expired: run gcloud auth login." "$last_line"
  fi
  fail "$command failed." "$last_line"
}

# Prints the role that a command needs.
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
