"""`GET /tasks/{taskId}/logs`: the log of a task, or a part of it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Final

import attrs
from aiohttp import hdrs, web

from ccrun.api.dependencies import ApiDependencies
from ccrun.api.responses import check_query, error_response, invalid, whole_number
from ccrun.api.sse import Cursor, parse_cursor
from ccrun.api.streams import write_in_pieces
from ccrun.api.tasks import task_id_of
from ccrun.errors import BlobNotFound, FieldError, InvalidRequest, StorageError
from ccrun.store import Store
from ccrun.task import TaskId
from ccrun.task_logs import ChunkRef

#: The maximum of `tail` and `limit`. Lines can be long, but are not held in memory.
MAX_LINES: Final = 1_000_000
#: One range of bytes. Others are ignored, as RFC 9110 (14.2) allows.
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


@attrs.frozen(kw_only=True)
class _Part:
    """The lines that a request names: after a position, at most `limit`; or the last `tail`."""

    after: Cursor = attrs.field(factory=Cursor)
    limit: int | None = None
    tail: int | None = None


@attrs.frozen(kw_only=True)
class LogRoutes:
    """The handler."""

    deps: ApiDependencies

    async def logs(self, request: web.Request) -> web.StreamResponse:
        """Return what is stored now: all, the lines after a cursor, the last lines, or a range of bytes."""
        check_query(request, "after", "limit", "tail")
        task_id = task_id_of(request)
        part = _part_of(request)
        record = await self.deps.store.record(task_id)
        response = web.StreamResponse(
            headers={
                "Content-Type": "application/x-ndjson",
                "X-Accel-Buffering": "no",
                "Accept-Ranges": "bytes",
                "Vary": "Accept-Encoding",
            }
        )
        wanted = _RANGE.fullmatch(request.headers.get("Range", ""))
        # A log has no validator, so an If-Range never matches.
        if wanted and _is_range(wanted[1], wanted[2]) and part == _Part() and "If-Range" not in request.headers:
            chunks = [chunk async for chunk in _chunks(self.deps.store, task_id)]
            size = sum(chunk.size for chunk in chunks)
            found = _byte_range(wanted[1], wanted[2], size)
            if found is None:
                message = f"The log has {size} bytes, and none in this range."
                return error_response(416, message, headers={"Content-Range": f"bytes */{size}"})
            response.set_status(206)
            total = size if record.status.is_final else "*"
            response.headers["Content-Range"] = f"bytes {found.start}-{found.stop - 1}/{total}"
            response.content_length = len(found)
            pieces = self._bytes(chunks, found)
        else:
            if "gzip" in request.headers.get("Accept-Encoding", ""):
                response.enable_compression(web.ContentCoding.gzip)
            pieces = self._lines(task_id, part)
        has_body = request.method != hdrs.METH_HEAD
        # Before the response starts, so that an error of the storage has a status.
        first = await anext(pieces, b"") if has_body else b""
        await response.prepare(request)
        if has_body:
            await write_in_pieces(response, first, seconds=self.deps.timeouts.send)
            async for piece in pieces:
                await write_in_pieces(response, piece, seconds=self.deps.timeouts.send)
        await response.write_eof()
        return response

    async def _lines(self, task_id: TaskId, part: _Part) -> AsyncIterator[bytes | memoryview]:
        """Yield the lines of each chunk that are wanted."""
        after, left = part.after, part.limit
        if part.tail is not None:
            after = await self._start_of_tail(task_id, part.tail)
        async for chunk in _chunks(self.deps.store, task_id, first=max(after.chunk, 1)):
            if left == 0:
                return
            skipped = after.line if chunk.number == after.chunk else 0
            lines, count = _slice(await self._read(chunk), skipped, left)
            left = None if left is None else left - count
            yield lines

    async def _start_of_tail(self, task_id: TaskId, tail: int) -> Cursor:
        """Return the position before the last lines."""
        chunks = [chunk async for chunk in _chunks(self.deps.store, task_id)]
        for chunk in reversed(chunks):
            count = (await self._read(chunk)).count(b"\n")
            if count >= tail:
                return Cursor(chunk.number, count - tail)
            tail -= count
        return Cursor()

    async def _bytes(self, chunks: Sequence[ChunkRef], wanted: range) -> AsyncIterator[bytes | memoryview]:
        """Yield the bytes of the log in a range.

        Raises:
            StorageError: A chunk was deleted, so that the range is not complete.
        """
        start = 0
        for chunk in chunks:
            overlap = range(max(wanted.start - start, 0), min(wanted.stop - start, chunk.size))
            start += chunk.size
            if overlap:
                content = await self._read(chunk)
                if len(content) != chunk.size:
                    raise StorageError("A part of the log was deleted.")
                yield memoryview(content)[overlap.start : overlap.stop]

    async def _read(self, chunk: ChunkRef) -> bytes:
        """Return the content of a chunk, nothing if it was deleted."""
        try:
            return await self.deps.store.logs.read_chunk(chunk)
        except BlobNotFound:
            return b""


async def _chunks(store: Store, task_id: TaskId, *, first: int = 1) -> AsyncIterator[ChunkRef]:
    """Yield the chunks that are stored."""
    listing = await store.logs.listing(task_id, first=first)
    while listing.chunks:
        for chunk in listing.chunks:
            yield chunk
        if listing.record_generation is not None:
            return
        listing = await store.logs.listing(task_id, first=listing.chunks[-1].number + 1)


def _part_of(request: web.Request) -> _Part:
    """Return the part of the log that the query names.

    Raises:
        InvalidRequest: It names none.
    """
    query, errors = request.query, []
    after = parse_cursor(query.get("after", "0:0"))
    if after is None:
        errors.append(FieldError("after", "after must be the id of an event, such as 3:7"))
    counts: dict[str, int | None] = dict.fromkeys(("limit", "tail"))
    for name in counts:
        text = query.get(name)
        if text is None:
            continue
        counts[name] = whole_number(text, 1, MAX_LINES)
        if counts[name] is None:
            errors.append(FieldError(name, f"{name} must be a whole number from 1 to {MAX_LINES}"))
    if errors:
        raise InvalidRequest(errors)
    if "tail" in query and ("after" in query or "limit" in query):
        raise invalid("tail", "tail cannot be combined with after or limit")
    return _Part(after=after or Cursor(), limit=counts["limit"], tail=counts["tail"])


def _slice(content: bytes, skipped: int, limit: int | None) -> tuple[memoryview, int]:
    """Return the lines after the first ones, at most a number of them, and how many they are; 0 if there is no limit."""
    if not skipped and limit is None:
        return memoryview(content), 0
    start = 0
    for _ in range(skipped):
        start = content.find(b"\n", start) + 1
        if not start:
            return memoryview(b""), 0
    end, count = start, 0
    while end < len(content) and (limit is None or count < limit):
        end = content.find(b"\n", end) + 1 or len(content)
        count += 1
    return memoryview(content)[start:end], count


def _is_range(first: str, last: str) -> bool:
    """Return whether the two numbers of a `Range` header are a range. Others are ignored, as RFC 9110 (14.1.1) demands."""
    return bool(first or last) and not (first and last and int(last) < int(first))


def _byte_range(first: str, last: str, size: int) -> range | None:
    """Return the range of bytes for the two numbers of a `Range` header, None if the log has none of them (RFC 9110, 14.1.2)."""
    start, stop = (int(first), int(last) + 1 if last else size) if first else (size - int(last), size)
    return range(max(start, 0), min(stop, size)) or None
