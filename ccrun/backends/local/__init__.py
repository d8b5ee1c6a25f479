"""The local backend: objects as files, a key file, and workers as processes on this machine."""
