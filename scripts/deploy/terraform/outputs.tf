output "service_url" {
  description = "Where the service is called."
  value       = google_cloud_run_v2_service.api.uri
}

output "bucket" {
  description = "The bucket of tasks and logs."
  value       = google_storage_bucket.logs.name
}

output "images" {
  description = "Where the images are pushed to."
  value       = local.images
}

output "identities" {
  description = "The service accounts."
  value       = { for name, account in google_service_account.ccrun : name => account.email }
}
