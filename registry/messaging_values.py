"""What brokered messaging keeps and moves, as values. They know no protocol: bytes, numbers and text.

Theory
------
A *message* is what somebody published. A *stored session* is what a client left with us that must outlive a connection
and a process; it is named by (tenant, device, client id), and while it lives by a number. Whoever serves it holds an
*ownership*: that number with an epoch. Every taking raises the epoch, so what an earlier owner writes later is refused
(`SessionLost`): it is fenced off, wherever it runs and whatever it believes.

A message for a stored session is a row of its queue, named by an *ordinal* that rises in the order of commits. The row
gets a packet id when an owner takes charge of it, in the same transaction that makes it so; until then it has none.

A *route* says who wants messages: a stored session's subscription, or a node's interest on behalf of sessions that
live there. Routes of a tenant have versions; whoever follows the versions has the whole table.

All times are seconds since 1970 (UTC). `size` is in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final, NewType, Protocol

from registry.errors import FailedPrecondition, ResourceExhausted, Unavailable
from registry.model import CredentialId, DeviceId, NodeId, ProfileId, TenantId
from registry.topic_grants import TopicGrant

StoredSessionId = NewType("StoredSessionId", int)
"""A stored session for as long as it lives; a later session of the same client has another one."""

_OVERHEAD: Final = 256
"""What a message keeps in rows and objects beside its text and bytes, roughly."""


class SessionLost(FailedPrecondition):
    """The session belongs to somebody else now, or is gone. Nothing was written; close the connection."""

    def __init__(self) -> None:
        super().__init__("the session was taken over, or has ended")


class QueueFull(ResourceExhausted):
    """A receiver's queue, or the tenant's, has no room. Nothing was stored for anybody."""


class RetainedFull(QueueFull):
    """The tenant retains as much as it may. Nothing was stored for anybody."""


class RetainedReplaced(FailedPrecondition):
    """The topic has another retained message by now, or none. Nothing was stored."""

    def __init__(self) -> None:
        super().__init__("the retained message was replaced")


class OutcomeOpen(Unavailable):
    """The commit was not answered: the message may be stored or not. Acknowledge nothing, refuse nothing; close."""


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Whose session it is. Client ids are scoped to the device, devices to the tenant."""

    tenant_id: TenantId
    device_id: DeviceId
    client_id: str


@dataclass(frozen=True, slots=True)
class Ownership:
    """The right to serve a stored session, until somebody takes it with a higher epoch."""

    session_id: StoredSessionId
    epoch: int


@dataclass(frozen=True, slots=True)
class Message:
    """A published message. `properties` are the adapter's bytes, given back as they came; `expires_at` None: never."""

    topic: str
    payload: bytes = field(repr=False)
    qos: int = 0
    retain: bool = False
    properties: bytes = field(default=b"", repr=False)
    expires_at: float | None = None

    @property
    def size(self) -> int:
        """What it takes, for limits."""
        return _OVERHEAD + len(self.topic.encode()) + len(self.payload) + len(self.properties)


@dataclass(frozen=True, slots=True)
class Incoming:
    """A QoS 2 message of a stored session: its packet id is stored with it, and the two are stored once."""

    ownership: Ownership
    packet_id: int


@dataclass(frozen=True, slots=True)
class PendingWill:
    """A will whose time has come: it is taken from the store with the commit that publishes it, once. `grants`: what
    its publisher may now; it was judged long ago."""

    will_id: int
    grants: tuple[TopicGrant, ...] = ()


@dataclass(frozen=True, slots=True)
class Publication:
    """A message on its way into the broker. `device_id`: who published it."""

    tenant_id: TenantId
    device_id: DeviceId
    message: Message
    origin: Incoming | PendingWill | None = None
    """None: QoS 0 or 1, or QoS 2 of a session that is not stored."""
    sender: StoredSessionId | None = None
    """The stored session that published it, for No Local; None for one that is not stored."""


@dataclass(frozen=True, slots=True)
class Reserved:
    """A packet id that the owner of a session on this node set aside for a message that is to be stored."""

    epoch: int
    packet_id: int


@dataclass(frozen=True, slots=True)
class Recipient:
    """A stored session that is to get the message with QoS 1 or 2; None in `reserved`: it has no connection here."""

    session_id: StoredSessionId
    qos: int
    retain: bool = False
    subscription_identifiers: tuple[int, ...] = ()
    reserved: Reserved | None = None


@dataclass(frozen=True, slots=True)
class Relay:
    """What another node is to do with the message.

    `direct`: deliver it there to every matching ordinary subscription of its sessions that are not stored, and to
    stored ones that get it with QoS 0. `shared`: texts of the shared filters for which this node was chosen; it picks
    one of its own live members for each (not stored; or stored, to get it with QoS 0).
    """

    node_id: NodeId
    direct: bool
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Routing:
    """Where one message goes beyond this node's memory. `context` is the adapter's own and comes back untouched.
    `live`: how many receivers get it from memory besides."""

    recipients: tuple[Recipient, ...] = ()
    relays: tuple[Relay, ...] = ()
    context: object = None
    live: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """A message in a session's queue. Without `packet_id` a reserved one was not used: give it back; the message comes
    by `Router.queued`, here or wherever the session's owner is."""

    session_id: StoredSessionId
    ordinal: int
    packet_id: int | None


@dataclass(frozen=True, slots=True)
class Published:
    """A committed publication. `duplicate`: it was stored before, and nothing was done now."""

    routing: Routing
    placements: tuple[Placement, ...] = ()
    gone: tuple[StoredSessionId, ...] = ()
    """Recipients that exist no more; their routes will follow."""
    duplicate: bool = False
    forbidden: bool = False
    """The router judged that the publisher may not do this any more: nothing was kept."""


@dataclass(frozen=True, slots=True)
class StoredSubscription:
    """A granted subscription. `qos` is the granted one; `retain_handling` 0, 1 or 2; `filter` may be a shared one."""

    filter: str
    qos: int
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0
    identifier: int | None = None


@dataclass(frozen=True, slots=True)
class QueuedMessage:
    """A row of a session's queue, with its packet id.

    `fresh`: it had no packet id before, so it was never sent. `released`: only PUBREL is to be sent for it.
    """

    ordinal: int
    packet_id: int
    qos: int
    retain: bool
    subscription_identifiers: tuple[int, ...]
    message: Message
    fresh: bool = True
    released: bool = False


@dataclass(frozen=True, slots=True)
class StoredSession:
    """What a session was when its last owner let go of it, or died.

    `incoming`: packet ids of QoS 2 that are stored and not released. `outgoing`: in sending order; the released ones
    behind, in the order of their release.
    """

    subscriptions: tuple[StoredSubscription, ...]
    incoming: tuple[int, ...]
    outgoing: tuple[QueuedMessage, ...]
    expiry: float


@dataclass(frozen=True, slots=True)
class StoredWill:
    """A will. `delay` and `expires_after` in seconds; the message's own `expires_at` is not used: its expiry begins
    when it is published."""

    message: Message
    delay: float = 0.0
    expires_after: float | None = None


@dataclass(frozen=True, slots=True)
class Opening:
    """A connection that was admitted and asks for its session.

    `clean`: whatever there was ends. `expiry`: how long the session outlives its connection, in seconds; infinity for
    no end. `credential_id`: with whose revocation the session is dropped.
    """

    key: SessionKey
    credential_id: CredentialId
    clean: bool
    expiry: float
    will: StoredWill | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """The answer to an `Opening`.

    `ownership` None: the session is not stored (clean, or ending with its connection), keep it in memory. `resumed`
    None: there was none, or it had to end; tell the client so (Session Present 0). Of two takings of one client, on
    whatever nodes, the later one has the higher `number`. `will`: of a session that is not stored, the right to the
    will that is: `release` it as a session.
    """

    ownership: Ownership | None
    resumed: StoredSession | None
    number: int = 0
    will: Ownership | None = None


# Routes.


@dataclass(frozen=True, slots=True)
class SessionRoute:
    """A stored session's subscription, wherever the session is."""

    session_id: StoredSessionId
    key: SessionKey
    subscription: StoredSubscription


@dataclass(frozen=True, slots=True)
class NodeRoute:
    """Another node has sessions alive with this filter.

    `stored` False: they are not stored; relay every matching message. True: they are; relay only what they get with
    QoS 0, that is where min(message's, `qos`) is 0 (the rest reaches them through their queues).
    """

    node_id: NodeId
    filter: str
    stored: bool
    qos: int


Route = SessionRoute | NodeRoute


@dataclass(frozen=True, slots=True)
class RouteChange:
    """A route that is there (new, or with other options), or is not any more."""

    route: Route
    removed: bool


@dataclass(frozen=True, slots=True)
class Arrival:
    """A message that another node's relay brings. See `Relay` for what is to be done."""

    tenant_id: TenantId
    device_id: DeviceId
    message: Message
    direct: bool
    shared: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Retained:
    """A topic's retained message, and who published it."""

    device_id: DeviceId
    message: Message


class Eviction(Enum):
    """Why a session is its owner's no more."""

    TAKEN = auto()
    """By its client, over another node; or it was dropped."""
    FULL = auto()
    """It was ended, because its queue stayed full."""
    LOST = auto()
    """The owner was taken for dead, or cannot know what is stored: whoever takes it next finds that."""


class Router(Protocol):
    """What the adapter does for the store. Every call is synchronous, quick, and must not raise;
    what does raise costs its own publication or session only."""

    def changed(self, tenant_id: TenantId, changes: Sequence[RouteChange], *, whole: bool) -> None:
        """Routes of a tenant. `whole`: these are all there are; forget what was known. Else apply in order; an entry
        may repeat what is known already. This node's own `NodeRoute`s are left out."""

    def route(self, publication: Publication) -> Routing | None:
        """Where it goes, by the routes as they stand; reserves packet ids for sessions that are connected here.

        None: its publisher may not publish this any more (a will, mostly). May be called again for the same publication
        after `abandoned`.
        """

    async def will_due(self, publication: Publication) -> bool:
        """A will (`PendingWill`) is about to be published. Whether it is no broker's message: then it is kept elsewhere
        when this returns, and `route` gives it nobody. It may be called again for the same will, on another node too.
        Raises Unavailable: then later."""

    def abandoned(self, publication: Publication, routing: Routing) -> None:
        """Nothing was stored with this routing: give back what it reserved."""

    def committed(self, publication: Publication, published: Published) -> Iterator[None]:
        """It is stored. Called in the order of commits, before the future of `publish` is done: deliver here,
        one receiver in each step. Taken to its end before the next is begun. Between the steps connections may end, and
        sessions change their owner."""

    def reserve(self, ownership: Ownership, size: int) -> int | None:
        """A packet id for a message that was queued elsewhere, or None: not served here any more, or no room now."""

    def unreserve(self, ownership: Ownership, packet_id: int) -> None:
        """It could not be recorded: give it back. Unknown ones are ignored."""

    def queued(self, ownership: Ownership, queued: QueuedMessage) -> None:
        """A message of the queue is now in charge of this owner under the reserved packet id: send it."""

    def arrived(self, arrival: Arrival) -> Iterator[None]:
        """A relayed message for sessions of this node. Called once for each, in the order of one sender; in steps, as
        `committed`."""

    def evicted(self, ownership: Ownership, *, why: Eviction = Eviction.TAKEN) -> None:
        """The session is this node's no more, or its memory may differ from the store: close its connection at once and
        publish no will from memory. `release` it as after any loss; `SessionLost` is then no surprise."""

    def taken(self, key: SessionKey, number: int) -> None:
        """This client has connected to another node, in a taking of this number: close an older connection here, also
        one that is about to be accepted (MQTT 5.0 §3.1.4). Of a stored session `evicted` tells as well."""

    def grants_changed(self, tenant_id: TenantId, profile_id: ProfileId) -> None:
        """The topic grants of a profile are other ones now: judge live sessions again, then offline and retained."""

    def device_changed(self, tenant_id: TenantId, device_id: DeviceId) -> None:
        """A device has another profile, or is deleted: judge its live sessions again, then offline and retained."""
