resource "google_cloud_scheduler_job" "sweep" {
  name             = var.cloudrun_sweep_name
  region           = local.scheduler
  schedule         = var.sweep_schedule
  time_zone        = "Etc/UTC"
  attempt_deadline = "30s"

  # A sweep that does not start is made up for by the next one.
  retry_config {
    retry_count = 0
  }

  http_target {
    http_method = "POST"
    uri         = "https://run.googleapis.com/v2/projects/${var.project_id}/locations/${var.region}/jobs/${google_cloud_run_v2_job.sweep.name}:run"

    oauth_token {
      service_account_email = google_service_account.ccrun["scheduler"].email
    }
  }

  depends_on = [google_cloud_run_v2_job_iam_member.ccrun]
}
