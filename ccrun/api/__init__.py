"""The wing that seals and launches: HTTP, the event stream, the use cases. It never opens a payload."""
