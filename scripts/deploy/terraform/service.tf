resource "google_cloud_run_v2_service" "api" {
  name                = var.cloudrun_service_name
  location            = var.region
  ingress             = var.service_ingress
  deletion_protection = false

  template {
    service_account                  = google_service_account.ccrun["api"].email
    execution_environment            = "EXECUTION_ENVIRONMENT_GEN2"
    max_instance_request_concurrency = var.service_concurrency
    # The longest that Cloud Run lets an answer take; a stream that is cut goes on with Last-Event-ID.
    timeout = "3600s"

    scaling {
      min_instance_count = var.service_min_instances
      max_instance_count = var.service_max_instances
    }

    containers {
      image = "${local.images}/api:${var.image_tag}"

      resources {
        limits   = { memory = var.service_memory, cpu = var.service_cpu }
        cpu_idle = !var.service_cpu_always
      }

      # Not /healthz: Cloud Run answers some paths that end in z by itself.
      startup_probe {
        period_seconds    = 1
        timeout_seconds   = 1
        failure_threshold = 60
        http_get {
          path = "/health"
        }
      }

      liveness_probe {
        period_seconds    = 30
        timeout_seconds   = 5
        failure_threshold = 3
        http_get {
          path = "/health"
        }
      }

      # It gets no secret: it only knows which ones its workers have.
      dynamic "env" {
        for_each = merge(local.settings, {
          CCRUN_WORKER_HAS    = join(",", sort(tolist(var.worker_secrets)))
          MAX_TIMEOUT_MINUTES = tostring(var.max_timeout_minutes)
        }, var.service_settings)
        content {
          name  = env.key
          value = env.value
        }
      }
    }
  }

  depends_on = [google_cloud_run_v2_job.worker]
}
