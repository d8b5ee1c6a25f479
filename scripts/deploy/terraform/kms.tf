resource "google_kms_key_ring" "ring" {
  name     = var.kms_key_ring
  location = var.kms_location

  depends_on = [google_project_service.api]
}

resource "google_kms_crypto_key" "payload" {
  name            = var.kms_key_name
  key_ring        = google_kms_key_ring.ring.id
  purpose         = "ENCRYPT_DECRYPT"
  rotation_period = "7776000s" # 90 days

  # Without it, nothing that was sealed can ever be opened.
  lifecycle {
    prevent_destroy = true
  }
}
