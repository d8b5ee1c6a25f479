# shellcheck shell=bash
# Service accounts and roles, and who may do what on which resource. Sourced by cloud.sh.

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
