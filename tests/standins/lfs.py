"""A stand-in for the server of Git LFS: the batch API with basic transfers, as part of `GitHttp`.

https://github.com/git-lfs/git-lfs/tree/main/docs/api
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from typing import Any, Final

import attrs
import pytest
from aiohttp import web

MEDIA_TYPE: Final = "application/vnd.git-lfs+json"
#: Part of the actions, as that of a storage behind the server.
OBJECT_TOKEN: Final = "made-up-token-of-an-object"
_OBJECT: Final = re.compile(r"/lfs-objects/([0-9a-f]{64})(/verify)?$")

needs_lfs: Final = pytest.mark.skipif(shutil.which("git-lfs") is None, reason="git-lfs is not installed")


@attrs.define
class LfsServer:
    """The objects of all repositories of a server, by ID.

    Args:
        rejects: Whether uploads are rejected with 507.
    """

    objects: dict[str, bytes] = attrs.field(factory=dict)
    rejects: bool = False
    #: The operations of the batch requests.
    operations: list[str] = attrs.field(factory=list)

    def add(self, content: bytes) -> str:
        """Store an object, and return its pointer."""
        oid = hashlib.sha256(content).hexdigest()
        self.objects[oid] = content
        return pointer(content)

    def handles(self, path: str) -> bool:
        """Return whether a request is for this server."""
        return path.endswith("/info/lfs/objects/batch") or _OBJECT.search(path) is not None

    def needs_login(self, path: str) -> bool:
        """Return whether a request needs the credential of the repository."""
        return _OBJECT.search(path) is None

    async def handle(self, request: web.BaseRequest, base: str) -> web.StreamResponse:
        """Respond to a request.

        Args:
            base: The URL of the server.
        """
        match = _OBJECT.search(request.path)
        if match is None:
            body = json.loads(await request.read())
            self.operations.append(body["operation"])
            answer = {
                "transfer": "basic",
                "objects": [self._actions(body["operation"], o, base) for o in body["objects"]],
            }
            return web.Response(text=json.dumps(answer), content_type=MEDIA_TYPE)
        if request.headers.get("Authorization") != OBJECT_TOKEN:
            return web.Response(status=403)
        oid = match[1]
        if request.method == "PUT":
            content = await request.read()
            if self.rejects or hashlib.sha256(content).hexdigest() != oid:
                return web.Response(
                    status=507, text=json.dumps({"message": "The quota is exceeded."}), content_type=MEDIA_TYPE
                )
            self.objects[oid] = content
            return web.Response()
        return web.Response(body=self.objects[oid]) if request.method == "GET" else web.Response()

    def _actions(self, operation: str, wanted: dict[str, Any], base: str) -> dict[str, Any]:
        oid, header = wanted["oid"], {"Authorization": OBJECT_TOKEN}
        target = {"href": f"{base}/lfs-objects/{oid}", "header": header}
        if operation == "download" and oid not in self.objects:
            return {**wanted, "error": {"code": 404, "message": "Object does not exist on the server"}}
        if operation == "upload" and oid in self.objects:
            return wanted
        actions = {operation: target}
        if operation == "upload":
            actions["verify"] = {**target, "href": f"{base}/lfs-objects/{oid}/verify"}
        return {**wanted, "actions": actions}


def pointer(content: bytes) -> str:
    """Return the pointer that git has in place of a file."""
    oid = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n"
