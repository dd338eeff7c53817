"""Requests of a device that have an answer: its certificate renewed, a child attached to it.

The same fields and errors as over HTTP. What the core refuses is an answer; what it cannot say now is none, and raises.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import msgspec

from adapters.mqtt.refusals import MAX_TEXT
from adapters.mqtt.session_values import Message
from adapters.mqtt.uplinks import payload_of
from adapters.provisioning import error_answer, issued_fields
from registry.children import NewChild
from registry.errors import InvalidArgument, RegistryError, Unavailable
from registry.model import Contact, Transport

if TYPE_CHECKING:
    from adapters.mqtt.device import DeviceRole


async def renewed(role: DeviceRole, message: Message) -> dict[str, object]:
    """A CSR in, a certificate out. Raises Unavailable."""
    contact = Contact(Transport.MQTT, role.peer.address, uuid4().hex)
    try:
        issued = await role.registry.enrolment.renew(role.session.identity, _csr(message), contact, same_subject=False)
    except Unavailable:
        raise
    except RegistryError as error:
        return dict(error_answer(error, contact.correlation_id))
    return {"status": "ok", "device_id": role.own, **issued_fields(issued)}


async def child_attached(role: DeviceRole, message: Message) -> dict[str, object]:
    """A child of this gateway, made or found. Raises Unavailable."""
    correlation_id = uuid4().hex
    try:
        child = _child(message, role.server.limits.payload_bytes)
        attached = await role.registry.children.attach(role.session.identity, child, correlation_id)
    except Unavailable:
        raise
    except RegistryError as error:
        return dict(error_answer(error, correlation_id))
    return {"status": "ok", "device_id": attached.device_id, "created": attached.created}


class _CsrRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    csr: str


def _csr(message: Message) -> bytes:
    """The request in a message: PEM or DER as they are, or `{"csr": PEM}`. Raises InvalidArgument."""
    if not message.payload.lstrip().startswith(b"{"):
        return message.payload
    try:
        return msgspec.json.decode(message.payload, type=_CsrRequest).csr.encode()
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"the request is refused: {str(error)[:MAX_TEXT]}", field="csr") from None


class _ChildRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    hardware_id: str
    name: str | None = None
    firmware: str | None = None
    tags: dict[str, str] = msgspec.field(default_factory=dict)
    meta: dict[str, Any] = msgspec.field(default_factory=dict)


def _child(message: Message, max_bytes: int) -> NewChild:
    """What a gateway says of a child. Raises InvalidArgument."""
    try:
        read = msgspec.convert(payload_of(message, max_bytes=max_bytes).value, _ChildRequest)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"the child is refused: {str(error)[:MAX_TEXT]}") from None
    return NewChild(read.hardware_id, read.name, read.firmware, read.tags, read.meta)
