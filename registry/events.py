"""What happens, as values: an event is written in the transaction that makes it true, and read by cursor (feed.py).

Kinds in `TEARDOWN` end sessions: every node follows them, whether or not a hint reached it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from uuid import UUID

from registry.model import Actor, CredentialId, DeviceId, Json, SessionId, TenantId


class EventKind(Enum):
    """The names on the wire (CONTRACT §2, `GET /events`)."""

    DEVICE_REGISTERED = "device.registered"
    DEVICE_PROVISIONED = "device.provisioned"
    DEVICE_ACTIVATED = "device.activated"
    DEVICE_UPDATED = "device.updated"
    DEVICE_DEACTIVATED = "device.deactivated"
    DEVICE_CONNECTED = "device.connected"
    DEVICE_DISCONNECTED = "device.disconnected"
    DEVICE_DELETED = "device.deleted"
    CREDENTIAL_ISSUED = "credential.issued"
    CREDENTIAL_ROTATED = "credential.rotated"
    CREDENTIAL_REVOKED = "credential.revoked"
    COMMAND_QUEUED = "command.queued"
    COMMAND_DELIVERED = "command.delivered"
    COMMAND_FINISHED = "command.finished"
    COMMAND_EXPIRED = "command.expired"
    COMMAND_CANCELLED = "command.cancelled"
    CONFIG_CHANGED = "config.changed"
    CONFIG_REPORTED = "config.reported"
    SESSION_CLOSED = "session.closed"
    SESSION_KICKED = "session.kicked"
    AUTH_REFUSED = "auth.refused"
    PROVISIONING_REFUSED = "provisioning.refused"
    PROFILE_UPDATED = "profile.updated"
    PROFILE_DELETED = "profile.deleted"
    IMPORT_FINISHED = "import.finished"
    CA_ROLLED_OVER = "ca.rolled_over"
    KEY_RING_ROTATED = "key_ring.rotated"


SYSTEM = TenantId(UUID(int=0))
"""Whose the events of the whole database are: no tenant's. Nodes follow them; no operator's list shows them."""


TEARDOWN = frozenset(
    {
        EventKind.CREDENTIAL_REVOKED,
        EventKind.DEVICE_DEACTIVATED,
        EventKind.DEVICE_DELETED,
        EventKind.SESSION_KICKED,
    }
)


@dataclass(frozen=True, slots=True)
class NewEvent:
    """An event to be written. `data` is shown to operators: no secrets, no hashes."""

    kind: EventKind
    tenant_id: TenantId
    actor: Actor
    device_id: DeviceId | None = None
    credential_id: CredentialId | None = None
    session_id: SessionId | None = None
    data: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where an event stands in the order of the feed: its transaction, then its number."""

    xid: int
    seq: int

    def __str__(self) -> str:
        return f"{self.xid}-{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Position:
        """The position of its text form. Raises ValueError."""
        xid, dash, seq = text.partition("-")
        if not (dash and xid.isascii() and xid.isdigit() and seq.isascii() and seq.isdigit()):
            raise ValueError("a position is two numbers joined by a dash")
        position = cls(int(xid), int(seq))
        if position.xid >= 2**63 or position.seq >= 2**63:
            raise ValueError("a position's numbers are below 2**63")
        return position


START = Position(0, 0)
"""Before the first event."""


@dataclass(frozen=True, slots=True)
class Event:
    """A committed event."""

    position: Position
    event_id: UUID
    name: str
    """The kind's name. A newer node of the same database may write kinds that this program does not know."""
    tenant_id: TenantId
    at: datetime
    device_id: DeviceId | None
    credential_id: CredentialId | None
    session_id: SessionId | None
    actor: str
    correlation_id: str
    data: Mapping[str, Json]

    @property
    def kind(self) -> EventKind | None:
        """The kind, if this program knows it."""
        return _KINDS.get(self.name)


_KINDS = {kind.value: kind for kind in EventKind}
