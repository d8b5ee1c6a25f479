"""The API side: accepts requests, seals payloads, launches workers and streams events. Never opens a payload."""
