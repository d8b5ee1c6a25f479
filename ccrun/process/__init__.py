"""Child processes: the only package that starts any."""
