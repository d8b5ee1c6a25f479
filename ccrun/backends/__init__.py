"""The adapters: one package for each backend, all behind the same ports (`ccrun.blobs`, `ccrun.jobs`, `ccrun.seal`)."""
