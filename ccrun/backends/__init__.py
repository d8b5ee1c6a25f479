"""The backends: one package for each, with adapters for the same ports."""
