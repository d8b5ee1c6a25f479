"""What aiohttp's HTTP server logs, without the bytes that it has received.

Its messages about malformed requests quote them, with tokens and prompts. Here such a request is one line with the kind of the
error and the peer. The exception of any other error is reduced to its type and frames.
"""

from __future__ import annotations

import logging
import traceback

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

log = structlog.get_logger()


def server_logger() -> logging.Logger:
    """Return the logger for `aiohttp.web.AppRunner`. It is not connected to other loggers."""
    logger = logging.Logger("aiohttp.server")
    logger.addHandler(_Handler())
    return logger


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        # The only argument of aiohttp's messages that is no text of its own is the address of the peer.
        peer = str(record.args[0]) if isinstance(record.args, tuple) and record.args else None
        if isinstance(error, web.RequestPayloadError):
            # Raised for the rest of a body after the response: the handler has rejected it.
            return
        if isinstance(error, HttpProcessingError):
            log.info("request_malformed", message="Malformed HTTP request", kind=type(error).__name__, peer=peer)
        elif record.levelno >= logging.WARNING:
            frames = [f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in _frames(error)]
            kind = type(error).__name__ if error else None
            log.error(
                "server_error", message="Unexpected error in the HTTP server", kind=kind, peer=peer, frames=frames
            )


def _frames(error: BaseException | None) -> list[traceback.FrameSummary]:
    walk = traceback.walk_tb(error.__traceback__) if error else ()
    # The source lines would be read from the disk.
    return list(traceback.StackSummary.extract(walk, lookup_lines=False))
