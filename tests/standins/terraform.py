"""A stand-in for Google's Terraform provider. It can plan, but creates nothing.

The stand-in serves the schema of the real provider with version 5 of Terraform's plugin protocol. Terraform checks the names and
types of arguments, and which ones are required or read-only. It does not check what the code of Google's provider would: the
format of values, and arguments that exclude each other.
https://developer.hashicorp.com/terraform/plugin/terraform-plugin-protocol
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc

#: The nesting modes of blocks in the protocol.
_NESTING: Final = {"single": 1, "list": 2, "set": 3}
#: The part of the provider's own schema that the configuration uses.
_PROVIDER: Final = {
    "attributes": {name: {"type": "string", "optional": True} for name in ("project", "region")},
    "blocks": {},
}
#: Computed attributes that other resources use, as patterns of the resource's arguments.
_COMPUTED: Final[Mapping[tuple[str, str], str]] = {
    ("google_cloud_run_v2_service", "uri"): "https://{name}.example",
    ("google_kms_crypto_key", "id"): "{key_ring}/cryptoKeys/{name}",
    ("google_kms_key_ring", "id"): "projects/{project}/locations/{location}/keyRings/{name}",
    ("google_project_iam_custom_role", "name"): "projects/{project}/roles/{role_id}",
    ("google_service_account", "email"): "{account_id}@{project}.iam.gserviceaccount.com",
    ("google_service_account", "member"): "serviceAccount:{account_id}@{project}.iam.gserviceaccount.com",
}

Schema = Mapping[str, Any]


@contextlib.contextmanager
def google(resources: Mapping[str, Schema], *, project: str) -> Iterator[dict[str, str]]:
    """Run the provider; yield the environment variables by which Terraform finds it.

    Args:
        resources: The schema of each resource, by its type.
        project: The project of resources that do not set one.
    """
    methods: dict[str, Callable[[bytes], bytes]] = {
        "GetSchema": lambda _: _schema(resources),
        "PrepareProviderConfig": lambda request: _field(1, _fields(request)[1]),
        "ValidateResourceTypeConfig": lambda _: b"",
        "Configure": lambda _: b"",
        "PlanResourceChange": lambda request: _plan(resources, project, _fields(request)),
        "Stop": lambda _: b"",
    }
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                "tfplugin5.Provider",
                {name: grpc.unary_unary_rpc_method_handler(_handler(method)) for name, method in methods.items()},
            )
        ]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        address = {"Network": "tcp", "String": f"127.0.0.1:{port}"}
        running = {"Protocol": "grpc", "ProtocolVersion": 5, "Pid": os.getpid(), "Test": True, "Addr": address}
        yield {"TF_REATTACH_PROVIDERS": json.dumps({"hashicorp/google": running})}
    finally:
        server.stop(None).wait()


def _handler(method: Callable[[bytes], bytes]) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    return lambda request, _: method(request)


# --- responses ---------------------------------------------------------------------------------------------------------


def _schema(resources: Mapping[str, Schema]) -> bytes:
    entries = [
        _field(2, _field(1, name.encode()) + _field(2, _field(2, _block(each)))) for name, each in resources.items()
    ]
    return _field(1, _field(2, _block(_PROVIDER))) + b"".join(entries)


def _block(schema: Schema) -> bytes:
    attributes = [
        _field(1, name.encode())
        + _field(2, json.dumps(attribute["type"]).encode())
        + b"".join(
            _field(number, 1)
            for number, mode in ((4, "required"), (5, "optional"), (6, "computed"))
            if attribute.get(mode)
        )
        for name, attribute in schema["attributes"].items()
    ]
    blocks = [
        _field(1, name.encode())
        + _field(2, _block(block))
        + _field(3, _NESTING[block["nesting"]])
        + (b"" if block["nesting"] == "single" else _field(4, int(block["required"])))
        + (b"" if block["nesting"] == "single" or block["many"] else _field(5, 1))
        for name, block in schema["blocks"].items()
    ]
    return b"".join([_field(2, each) for each in attributes] + [_field(3, each) for each in blocks])


def _plan(resources: Mapping[str, Schema], project: str, request: Mapping[int, bytes]) -> bytes:
    kind = request[1].decode()
    planned = dict(_unpacked(_fields(request[3])[1]))
    computed = {name for name, attribute in resources[kind]["attributes"].items() if attribute.get("computed")}
    if "project" in computed and planned["project"] is None:
        planned["project"] = project
    for (each, name), pattern in _COMPUTED.items():
        if each == kind and name in computed:
            planned[name] = pattern.format(**planned)
    # Field 1 is the planned state. Field 5 marks a provider of the legacy SDK, which may leave computed attributes unknown.
    return _field(1, _field(2, json.dumps(planned).encode())) + _field(5, 1)


# --- the needed parts of protocol buffers and MessagePack --------------------------------------------------------------


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])


def _field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _fields(message: bytes) -> dict[int, bytes]:
    """Return the fields that are messages, strings or bytes; of several with one number, the last."""
    found, at = {}, 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while at < len(message):
        key = number()
        size = number()
        if key & 7 == 2:
            found[key >> 3] = message[at : at + size]
            at += size
    return found


#: Number of bytes of the length, or format of the value, by the first byte.
_LENGTHS: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_NUMBERS: Final = dict(
    zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True)
)
_CONSTANTS: Final = {0xC0: None, 0xC2: False, 0xC3: True}


def _unpacked(packed: bytes) -> Any:
    """Decode a value. A value that is unknown until Terraform applies the plan is an error."""
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return packed[at - size : at]

    def value() -> Any:
        (first,) = take(1)
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 0x100
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            return struct.unpack(_NUMBERS[first], take(struct.calcsize(_NUMBERS[first])))[0]
        if first < 0xC0:
            kind, size = first & (0xE0 if first >= 0xA0 else 0xF0), first & (0x1F if first >= 0xA0 else 0x0F)
        elif first in _LENGTHS:
            kind, size = first, int.from_bytes(take(_LENGTHS[first]), "big")
        else:
            raise ValueError(f"unknown or unsupported value ({first:#x})")
        match kind:
            case 0x80 | 0xDE | 0xDF:
                return {value(): value() for _ in range(size)}
            case 0x90 | 0xDC | 0xDD:
                return [value() for _ in range(size)]
            case _:
                return take(size).decode()

    return value()
