locals {
  # What all three are told.
  settings = {
    CCRUN_BACKEND     = "gcp"
    PROJECT_ID        = var.project_id
    REGION            = var.region
    GCS_LOGS_BUCKET   = local.bucket
    KMS_LOCATION      = var.kms_location
    KMS_KEY_RING      = var.kms_key_ring
    KMS_KEY_NAME      = var.kms_key_name
    CLOUDRUN_JOB_NAME = var.cloudrun_job_name
  }

  # Beside the agent's time: clone, push, uploads, callback.
  beside_minutes = 15
}

resource "google_cloud_run_v2_job" "worker" {
  name                = var.cloudrun_job_name
  location            = var.region
  deletion_protection = false

  template {
    task_count  = 1
    parallelism = 1

    template {
      service_account       = google_service_account.ccrun["worker"].email
      execution_environment = "EXECUTION_ENVIRONMENT_GEN2"
      # No retries: what an agent has done is done, and a second run would do it again.
      max_retries = 0
      timeout     = "${(ceil(var.max_timeout_minutes) + local.beside_minutes) * 60}s"

      containers {
        image = "${local.images}/worker:${var.image_tag}"

        resources {
          limits = { memory = var.job_memory, cpu = var.job_cpu }
        }

        dynamic "env" {
          for_each = merge(local.settings, { MAX_TIMEOUT_MINUTES = tostring(var.max_timeout_minutes) }, var.worker_settings)
          content {
            name  = env.key
            value = env.value
          }
        }

        dynamic "env" {
          for_each = var.worker_secrets
          content {
            name = env.value
            value_source {
              secret_key_ref {
                secret  = google_secret_manager_secret.secret[env.value].secret_id
                version = "latest"
              }
            }
          }
        }
      }
    }
  }

  depends_on = [google_secret_manager_secret_iam_member.reader]
}

resource "google_cloud_run_v2_job" "sweep" {
  name                = var.cloudrun_sweep_name
  location            = var.region
  deletion_protection = false

  template {
    task_count  = 1
    parallelism = 1

    template {
      service_account       = google_service_account.ccrun["sweep"].email
      execution_environment = "EXECUTION_ENVIRONMENT_GEN2"
      max_retries           = 0
      timeout               = "600s"

      containers {
        image = "${local.images}/api:${var.image_tag}"
        args  = ["sweep"]

        resources {
          limits = { memory = "512Mi", cpu = "1" }
        }

        dynamic "env" {
          for_each = merge(local.settings, var.sweep_settings)
          content {
            name  = env.key
            value = env.value
          }
        }

        env {
          name = "CLOUDRUN_CALLBACK_SECRET"
          value_source {
            secret_key_ref {
              secret  = google_secret_manager_secret.secret["CLOUDRUN_CALLBACK_SECRET"].secret_id
              version = "latest"
            }
          }
        }
      }
    }
  }

  depends_on = [google_secret_manager_secret_iam_member.reader]
}
