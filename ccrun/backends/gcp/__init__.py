"""The adapters of Google Cloud: Cloud Storage, Cloud KMS, Cloud Run.

The only package that imports Google's libraries (the extra `gcp`). It is loaded only on the gcp backend.
"""
