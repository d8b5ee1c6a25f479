"""The embedded backend: files, a key file and worker processes on one machine."""
