# shellcheck shell=bash
# Service accounts, custom roles and grants. Sourced by cloud.sh.

# --- service accounts and roles ----------------------------------------------------------------------------------------

# Prints the email address of a ccrun service account.
account() { say "$1@$PROJECT_ID.iam.gserviceaccount.com"; }

# make_account NAME DESCRIPTION
make_account() {
  local found
  look found iam service-accounts describe "$(account "$1")" --format='value(email)' && return
  say "Service account $1"
  change iam service-accounts create "$1" --display-name="$1" --description="$2"
}

# make_role NAME DESCRIPTION PERMISSION,PERMISSION…
make_role() {
  local found deleted permissions
  if ! look found iam roles describe "$1" --format='value[separator="|"](deleted,includedPermissions)'; then
    say "Role $1"
    change iam roles create "$1" --title="$1" --description="$2" --permissions="$3" --stage=GA
    return
  fi
  IFS='|' read -r deleted permissions <<<"$found"
  if [ "$deleted" = True ]; then
    # A deleted role can be restored for a week; until then, its name cannot be used again.
    say "Role $1: restored"
    change iam roles undelete "$1"
  fi
  if [ "$(sorted ';' "$permissions")" != "$(sorted ',' "$3")" ]; then
    say "Role $1: permissions"
    change iam roles update "$1" --permissions="$3"
  fi
}

# sorted SEPARATOR LIST: prints the parts of a list in order, one on each line.
sorted() { printf '%s\n' "$2" | tr "${1:-\n}" '\n' | LC_ALL=C sort; }

# --- grants ------------------------------------------------------------------------------------------------------------

# These select the resource of `grant` and `revoke_all`. They return 1 if it does not exist.
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
  # One line for each member: role, member, title and expression of the condition.
  look POLICY "${KIND[@]}" get-iam-policy "${RESOURCE[@]}" --flatten='bindings[].members[]' \
    --format='value[separator="|"](bindings.role,bindings.members,bindings.condition.title,bindings.condition.expression)'
}

# grant MEMBER ROLE [TITLE EXPRESSION]
grant() {
  local member=$1 role=$2 title=${3:-} expression=${4:-} attempts=0 words
  local line="$role|$member|$title|$expression"
  GRANTED=$GRANTED$line$'\n'
  [[ $'\n'$POLICY$'\n' == *$'\n'"$line"$'\n'* ]] && return
  say "${role##*/} on ${RESOURCE[0]} for ${member#*:}${title:+ ($title)}"
  words=("${KIND[@]}" add-iam-policy-binding "${RESOURCE[@]}" --member="$member" --role="$role")
  if [ -n "$title" ]; then
    # The separator is #, because expressions contain commas.
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
    attempts=$((attempts + 1))
    { [ "$attempts" -lt "$GRANT_ATTEMPTS" ] && complains 'does not exist'; } || refused "${words[@]}"
    sleep "$GRANT_RETRY_SECONDS"
  done
}

# revoke_all MEMBER: removes all grants of a member on the resource.
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

# Reports grants on the resource, to ccrun accounts or all users, that the script has not made.
note_strangers() {
  local line role member
  while IFS= read -r line; do
    IFS='|' read -r role member _ <<<"$line"
    case $member in
      "serviceAccount:$API" | "serviceAccount:$WORKER" | "serviceAccount:$SWEEP" | "serviceAccount:$SCHEDULER" | allUsers | allAuthenticatedUsers) ;;
      *) continue ;;
    esac
    [[ $GRANTED == *$'\n'"$line"$'\n'* ]] ||
      note "Not granted by ccrun: ${member#*:} has $role on ${RESOURCE[0]}. Remove it unless you need it."
  done <<<"$POLICY"
}

grant_key() {
  grant "serviceAccount:$API" roles/cloudkms.cryptoKeyEncrypter
  grant "serviceAccount:$WORKER" roles/cloudkms.cryptoKeyDecrypter
  grant "serviceAccount:$SWEEP" roles/cloudkms.cryptoKeyDecrypter
  note_strangers
}

# Lets CALLERS call the service.
grant_callers() {
  local member members=()
  IFS=',' read -r -a members <<<"$CALLERS"
  for member in ${members[@]+"${members[@]}"}; do
    grant "$member" roles/run.invoker
  done
  note_strangers
  [ -n "$CALLERS" ] || note "CALLERS is not set: only accounts with a role on the whole project can call the service."
}
