"""What happens in the core, as somebody who counts hears it: closed words, never an id, a name or an address.

The services tell an `Observer` at the moment something is decided; they neither know who listens nor wait for it.
Everything here has few values, all known here, because each becomes the label of a time series (edge/metrics.py).
Counts that an adapter keeps for itself are read from there instead.
"""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from registry.model import Transport


class AuthOutcome(Enum):
    """How an admission ended. `refused` covers unknown, wrong, expired, disabled, revoked: the log has the reason."""

    ADMITTED = "admitted"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"


class UplinkOutcome(Enum):
    """What became of an uplink. Every acknowledged one is `stored` or a `duplicate` of a stored one."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    REJECTED = "rejected"


class ClaimOutcome(Enum):
    """How a provisioning attempt ended; `existing` is the idempotent re-claim."""

    CREATED = "created"
    EXISTING = "existing"
    REFUSED = "refused"
    FAILED = "failed"


class CloseReason(Enum):
    """Why a session ended."""

    PEER = "peer"
    IDLE = "idle"
    REVOKED = "revoked"
    KICKED = "kicked"
    EXPIRED = "expired"
    TAKEN_OVER = "taken_over"
    PROTOCOL_ERROR = "protocol_error"
    DRAIN = "drain"
    OTHER = "other"


class Limit(Enum):
    """A limit that somebody ran into; most are keys of `[limits]`, and of `[mqtt]` from SUBSCRIPTIONS on."""

    HEADER = "header"
    BODY = "body"
    SLOW_SENDER = "slow_sender"
    HANDSHAKES = "handshakes"
    CONNECTIONS = "connections"
    SESSIONS = "sessions"
    SESSIONS_PER_DEVICE = "sessions_per_device"
    UPLINK_QUEUE = "uplink_queue"
    UPLINK_PAYLOAD = "uplink_payload"
    TENANT_REQUESTS = "tenant_requests"
    KEY_REQUESTS = "key_requests"
    OPEN_REQUESTS = "open_requests"
    PROVISIONING_ATTEMPTS = "provisioning_attempts"
    FAILED_AUTHENTICATIONS = "failed_authentications"
    REQUESTS = "requests"
    SSE_STREAMS = "sse_streams"
    COMMANDS = "commands"
    COMMAND_WAITS = "command_waits"
    CHILDREN = "children"
    PROVISIONING_CONNECTIONS = "provisioning_connections"
    REFUSED_WAITING = "refused_waiting"
    SUBSCRIPTIONS = "subscriptions"
    TOPIC = "topic"
    TOPIC_ALIASES = "topic_aliases"
    PACKET = "packet"
    CLIENT_ID = "client_id"
    RECEIVE_MAXIMUM = "receive_maximum"
    PUBLISH_QUEUE = "publish_queue"
    SESSION_QUEUE = "session_queue"
    RETAINED = "retained"
    STORED_SESSIONS = "stored_sessions"


class Observer(Protocol):
    """Who counts. Methods are quick and do not raise."""

    def auth_attempted(self, transport: Transport, outcome: AuthOutcome) -> None:
        """An admission was tried: a session opened, or was refused. Refused tokens of operators are among them."""

    def session_closed(self, transport: Transport, reason: CloseReason) -> None:
        """A session that had been admitted is over."""

    def revocation_torn_down(self, seconds: float) -> None:
        """All sessions of one revocation are closed on this node, so long after its commit."""

    def claim_handled(self, transport: Transport, outcome: ClaimOutcome) -> None:
        """A provisioning attempt of a well-formed request is answered."""

    def limit_hit(self, limit: Limit) -> None:
        """Somebody ran into a limit of the core."""


class Nobody:
    """Counts nothing: for commands, and for tests that look elsewhere."""

    def auth_attempted(self, transport: Transport, outcome: AuthOutcome) -> None: ...

    def session_closed(self, transport: Transport, reason: CloseReason) -> None: ...

    def revocation_torn_down(self, seconds: float) -> None: ...

    def claim_handled(self, transport: Transport, outcome: ClaimOutcome) -> None: ...

    def limit_hit(self, limit: Limit) -> None: ...


NOBODY = Nobody()
