"""What the API is made of, and how long it waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

import attrs

from ccrun.api.dispatch import Dispatcher
from ccrun.api.feed import Feed
from ccrun.api.request import Defaults
from ccrun.jobs import Jobs
from ccrun.results import Isolation
from ccrun.seal import KeyWrapper
from ccrun.store import Store
from ccrun.task import Secret

#: Makes a context that is open while the app runs.
Companion = Callable[[], AbstractAsyncContextManager[object]]


@attrs.frozen(kw_only=True)
class ApiTimeouts:
    """How long the API waits, in seconds."""

    #: Between two comments on an idle stream, which keep proxies from closing it and reveal readers that have left.
    heartbeat: float = 15.0
    #: For a reader to accept one piece of a stream. Then it is disconnected; it can resume with its cursor.
    send: float = 60.0
    #: For the state of an execution, before a record is returned as it is stored.
    settle: float = 2.0
    #: Between the disconnection of a client of `/run` and the cancellation of its task.
    abandon: float = 30.0
    #: For a request body: 10 MiB over a slow mobile connection.
    body: float = 60.0
    #: For the storage and the key service to answer `GET /ready`.
    ready: float = 5.0


@attrs.frozen(kw_only=True)
class ApiDependencies:
    """What the app is made of.

    Args:
        defaults: Values for what a request leaves out.
        tokens: The bearer tokens that are accepted. When there are none, the platform authorizes requests.
        loopback_only: The service listens on loopback without a token, so it accepts only requests to names of loopback.
        max_request_bytes: The maximum size of a body.
        unavailable: The error for every request that needs a setting that is missing.
        callbacks_unavailable: The error for requests with a callback, when callbacks are not configured.
        project_id: The Google Cloud project of the traces in the log.
        backend: The name of the backend, for `/health?verbose=true`.
        companions: What runs while the app runs.
        isolation: How the agents on this machine are isolated; None where they run elsewhere.
        max_streams: The maximum number of open streams. Each keeps a connection, which counts as an open file.
    """

    store: Store
    jobs: Jobs
    wrapper: KeyWrapper
    dispatcher: Dispatcher
    feed: Feed
    defaults: Defaults
    tokens: Sequence[Secret] = ()
    loopback_only: bool = False
    max_request_bytes: int
    unavailable: str | None = None
    callbacks_unavailable: str | None = None
    project_id: str | None = None
    backend: str
    timeouts: ApiTimeouts = attrs.field(factory=ApiTimeouts)
    companions: Sequence[Companion] = ()
    max_streams: int = 10_000
    isolation: Isolation | None = None
