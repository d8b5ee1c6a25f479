"""The wing that opens payloads and runs code that it does not trust. It never launches."""
