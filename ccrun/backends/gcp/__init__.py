"""The adapters of Google Cloud: Cloud Storage, Cloud KMS, Cloud Run.

The only part of ccrun that loads Google's libraries, which the extra `gcp` brings. It is loaded on the gcp backend alone.
"""
