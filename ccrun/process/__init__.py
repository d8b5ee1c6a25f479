"""Child processes. No other package starts any."""
