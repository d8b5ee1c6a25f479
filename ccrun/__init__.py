"""ccrun runs the Claude Code CLI for other programs: safely, live and at scale."""

__version__ = "0.1.0"
