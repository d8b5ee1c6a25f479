"""Git for the worker: clone, examine changes, push."""
