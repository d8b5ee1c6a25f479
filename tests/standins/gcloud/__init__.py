"""A stand-in for `gcloud`. It stores a project in a file, logs each call, and rejects what gcloud rejects.

The environment variable GCLOUD_STANDIN names the file with the project, as JSON. The log of calls has the same name with the
suffix `.calls`, and one line of JSON for each call: its arguments, the resource that it read and its output. Commands and flags
are those of gcloud 528. Where gcloud is installed, `tests/scripts/test_real_gcloud.py` compares the stand-in with it.
"""
