# The deployment of ccrun on Google Cloud: the same as the scripts in scripts/ make, for those who keep theirs in Terraform.
# Take one of the two. Images are built by ../../build-and-push.sh; the values of secrets are put in by ../../create-secrets.sh or by hand, so that
# none of them is in the state.
#
# There is no .terraform.lock.hcl: it was written where no provider could be had. `terraform init` makes one: keep it.

terraform {
  required_version = ">= 1.5"

  required_providers {
    google = {
      source = "hashicorp/google"
      # tests/terraform plans against the schema of this one.
      version = "~> 8.7"
    }
  }
}

provider "google" {
  project = var.project_id
  region  = var.region
}

locals {
  bucket    = coalesce(var.gcs_logs_bucket, "${var.project_id}-claude-logs")
  images    = "${var.region}-docker.pkg.dev/${var.project_id}/${var.artifact_repository}"
  scheduler = coalesce(var.scheduler_location, var.region)
}
