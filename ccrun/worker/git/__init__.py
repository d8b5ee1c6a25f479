"""Git for the worker: clone, look at what changed, push."""
