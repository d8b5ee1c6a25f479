# The secrets themselves; their values are versions that ../../create-secrets.sh adds, so none is in the state.

resource "google_secret_manager_secret" "secret" {
  for_each = var.worker_secrets

  secret_id = each.value

  replication {
    auto {}
  }

  depends_on = [google_project_service.api]
}

locals {
  # The API reads none: it only knows their names.
  readers = concat(
    [for name in var.worker_secrets : { who = "worker", secret = name }],
    [{ who = "sweep", secret = "CLOUDRUN_CALLBACK_SECRET" }],
  )
}

resource "google_secret_manager_secret_iam_member" "reader" {
  for_each = { for reader in local.readers : "${reader.who} ${reader.secret}" => reader }

  secret_id = google_secret_manager_secret.secret[each.value.secret].secret_id
  role      = "roles/secretmanager.secretAccessor"
  member    = local.members[each.value.who]
}
