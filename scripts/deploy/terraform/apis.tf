resource "google_project_service" "api" {
  for_each = toset(["artifactregistry", "cloudbuild", "cloudkms", "cloudscheduler", "iam", "run", "secretmanager", "storage"])

  service            = "${each.key}.googleapis.com"
  disable_on_destroy = false
}
