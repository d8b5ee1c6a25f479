# Who may do what: docs/permissions.md says why. Every grant is on the bucket, the key, a job, the service or a secret, none on the project.

resource "google_service_account" "ccrun" {
  for_each = {
    api       = "ccrun: takes requests and seals them"
    worker    = "ccrun: opens requests and runs agents"
    sweep     = "ccrun: settles what died, delivers what is owed"
    scheduler = "Cloud Scheduler: runs the sweep"
  }

  account_id   = "ccrun-${each.key}"
  display_name = each.value

  depends_on = [google_project_service.api]
}

resource "google_project_iam_custom_role" "role" {
  for_each = {
    ccrunAdd      = ["storage.objects.create", "storage.objects.get"]
    ccrunReplace  = ["storage.objects.delete"]
    ccrunList     = ["storage.objects.list"]
    ccrunLaunch   = ["run.jobs.run", "run.jobs.runWithOverrides", "run.executions.get", "run.executions.cancel"]
    ccrunRelaunch = ["run.jobs.run", "run.jobs.runWithOverrides", "run.executions.get", "run.executions.list"]
    ccrunStart    = ["run.jobs.run"]
  }

  role_id     = each.key
  title       = each.key
  permissions = each.value

  depends_on = [google_project_service.api]
}

locals {
  members = { for name, account in google_service_account.ccrun : name => "serviceAccount:${account.email}" }

  conditions = {
    NOT_LOGS    = "!resource.name.endsWith(\".jsonl\")"
    NOT_INDEX   = "!resource.name.startsWith(\"projects/_/buckets/${local.bucket}/objects/index/\")"
    ONLY_ACTIVE = "api.getAttribute(\"storage.googleapis.com/objectListPrefix\", \"\").startsWith(\"active/\")"
  }

  # On the bucket: who, as what, under which of the conditions.
  on_bucket = [
    { who = "api", role = "ccrunAdd", conditions = [] },
    { who = "api", role = "ccrunReplace", conditions = ["NOT_LOGS"] },
    { who = "api", role = "ccrunList", conditions = [] },
    { who = "worker", role = "ccrunAdd", conditions = ["NOT_INDEX"] },
    { who = "worker", role = "ccrunReplace", conditions = ["NOT_LOGS", "NOT_INDEX"] },
    { who = "sweep", role = "ccrunAdd", conditions = ["NOT_INDEX"] },
    { who = "sweep", role = "ccrunReplace", conditions = ["NOT_LOGS", "NOT_INDEX"] },
    { who = "sweep", role = "ccrunList", conditions = ["ONLY_ACTIVE"] },
  ]

  on_key = {
    api    = "roles/cloudkms.cryptoKeyEncrypter"
    worker = "roles/cloudkms.cryptoKeyDecrypter"
    sweep  = "roles/cloudkms.cryptoKeyDecrypter"
  }

  # On a job: who, as what, on which.
  on_job = [
    { who = "api", role = "ccrunLaunch", job = "worker" },
    { who = "sweep", role = "ccrunRelaunch", job = "worker" },
    { who = "scheduler", role = "ccrunStart", job = "sweep" },
  ]
}

resource "google_storage_bucket_iam_member" "ccrun" {
  for_each = { for grant in local.on_bucket : "${grant.who} ${grant.role}" => grant }

  bucket = google_storage_bucket.logs.name
  role   = google_project_iam_custom_role.role[each.value.role].name
  member = local.members[each.value.who]

  dynamic "condition" {
    for_each = length(each.value.conditions) == 0 ? [] : [each.value.conditions]
    content {
      title      = lower(replace(join("-and-", condition.value), "_", "-"))
      expression = join(" && ", [for name in condition.value : local.conditions[name]])
    }
  }
}

resource "google_kms_crypto_key_iam_member" "ccrun" {
  for_each = local.on_key

  crypto_key_id = google_kms_crypto_key.payload.id
  role          = each.value
  member        = local.members[each.key]
}

resource "google_cloud_run_v2_job_iam_member" "ccrun" {
  for_each = { for grant in local.on_job : "${grant.who} ${grant.role}" => grant }

  location = var.region
  name     = each.value.job == "worker" ? google_cloud_run_v2_job.worker.name : google_cloud_run_v2_job.sweep.name
  role     = google_project_iam_custom_role.role[each.value.role].name
  member   = local.members[each.value.who]
}

resource "google_cloud_run_v2_service_iam_member" "caller" {
  for_each = var.callers

  location = var.region
  name     = google_cloud_run_v2_service.api.name
  role     = "roles/run.invoker"
  member   = each.value
}
