"""The Google Cloud backend: Cloud Storage, Cloud KMS and Cloud Run.

The only package of ccrun that imports Google's libraries. They are installed by the extra `gcp`, and imported only when this
backend is selected.
"""
