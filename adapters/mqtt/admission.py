"""Who connects: evidence from CONNECT and certificate, the resolver's verdict, and a tame way to be refused.

    user name `provision`            ─► a provisioner (provisioning.py): no identity, no session, little time
    user name and password           ─► ApiKey of the device that the user name names
    a client certificate             ─► ClientCertificate; a user name beside it says nothing
    nothing of these                 ─► refused

    evidence ─► wait, if this credential was refused lately ─► resolver.admit ─► the same device as the certificate's?
             ─► sessions.open ─► the will's topic allowed? ─► the broker's session ─► CONNACK

Nothing that exists is touched before `sessions.open` has succeeded: no other connection, session, will or
subscription. Every refusal of a credential is the same CONNACK, 5 or 0x87; the reason is in the log and the timeline
(registry/refusals.py). Where the core cannot answer it is 3 or 0x88, where a limit is reached 3 or 0x97.

Taming. A device that is refused usually tries again at once and for ever. The *credential* that was refused is
remembered by its look-up, so nobody can slow another device down, and its next CONNECT waits before it is judged, each
time twice as long. So a look-up is spent every few seconds at most, and a device that was let in again meanwhile waits
that long once. An *address* that is refused more often than a site ever is waits for its answer, after the look-up;
good credentials behind the same address are not held up. How many wait is bounded; beyond that they are closed.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import uuid4

from adapters.mqtt.wire_packets import Connect
from adapters.mqtt.wire_reasons import ReasonCode
from adapters.tls.admission import address_block
from registry import secrets
from registry.core import Registry
from registry.errors import RegistryError, ResourceExhausted, Unauthenticated
from registry.events import EventKind
from registry.model import ApiKey, ClientCertificate, Contact, Identity, Transport
from registry.rate_limits import RateLimiter
from registry.resolver import lookup_of

if TYPE_CHECKING:
    from adapters.mqtt.peer import Peer
    from adapters.mqtt.server import MqttServer
    from adapters.mqtt.server_limits import ServerLimits

PROVISION: Final = "provision"
_REMEMBERED: Final = 65_536
"""Refused credentials that are remembered, about 200 bytes each."""


class Admission:
    """Judges every CONNECT of a server."""

    def __init__(self, server: MqttServer, registry: Registry, limits: ServerLimits) -> None:
        self._server = server
        self._registry = registry
        self._taming = Taming(limits)
        self._limits = limits

    async def admit(self, peer: Peer, connect: Connect) -> None:
        """Accept or refuse; returns when that is done."""
        if connect.user_name == PROVISION:
            self._server.provisioning.admit(peer, connect)
            return
        contact = Contact(Transport.MQTT, peer.address, uuid4().hex)
        try:
            evidence = evidence_of(connect, peer.certificate)
        except Unauthenticated as refused:
            self._note(refused.reason, contact)
            await self._refuse(peer, ReasonCode.NOT_AUTHORIZED)
            return
        lookup = lookup_of(evidence)
        if not await self._wait(peer, self._taming.delay(lookup, self._server.now())):
            return
        try:
            await self._open(peer, connect, evidence, contact)
        except Unauthenticated:
            self._taming.refused(lookup, self._server.now())
            await self._refuse(peer, ReasonCode.NOT_AUTHORIZED)
        except ResourceExhausted:
            self._server.counters.turned_away += 1
            peer.refuse(ReasonCode.QUOTA_EXCEEDED)
        except RegistryError:  # the core is away, or full
            peer.refuse(ReasonCode.SERVER_UNAVAILABLE)
        else:
            self._taming.admitted(lookup)

    async def _open(self, peer: Peer, connect: Connect, evidence: ApiKey | ClientCertificate, contact: Contact) -> None:
        registry = self._registry
        identity = await registry.resolver.admit(evidence, contact)
        await self._agree(identity, peer, evidence, contact)
        session = await registry.sessions.open(identity, contact, peer)
        try:
            if peer.alive and not session.closed:
                peer.session = session
                await self._server.devices.admit(peer, session, connect)
        finally:
            if peer.role is None:
                peer.session = None
                registry.sessions.ended(session)
        # Of a session that has just been closed nobody is told any more, once it has ended.
        peer.refuse(ReasonCode.NOT_AUTHORIZED)

    async def _agree(
        self, identity: Identity, peer: Peer, evidence: ApiKey | ClientCertificate, contact: Contact
    ) -> None:
        """Raises Unauthenticated where a key is one device's and the connection's certificate another one's."""
        if peer.certificate is None or not isinstance(evidence, ApiKey):
            return
        holder = await self._registry.resolver.holder(ClientCertificate(peer.certificate), contact)
        if holder in (None, identity.device_id):
            return
        reason = "key of another device than the connection's certificate"
        self._note(reason, contact, identity)
        raise Unauthenticated(reason)

    def _note(self, reason: str, contact: Contact, identity: Identity | None = None) -> None:
        self._registry.refusals.note(
            tenant_id=identity.tenant_id if identity else None,
            device_id=identity.device_id if identity else None,
            kind=EventKind.AUTH_REFUSED,
            reason=reason,
            contact=contact,
            detail={"credential_id": str(identity.credential_id)} if identity else {},
        )

    async def _refuse(self, peer: Peer, reason: ReasonCode) -> None:
        counters = self._server.counters
        counters.refused += 1
        delay = self._taming.answer_delay(address_block(peer.address), self._server.now())
        if await self._wait(peer, delay):
            peer.refuse(reason)

    async def _wait(self, peer: Peer, seconds: float) -> bool:
        """Whether the peer is still there after so long; False also where too many wait already."""
        if seconds <= 0:
            return peer.alive
        counters = self._server.counters
        if counters.held >= self._limits.held:
            counters.turned_away += 1
            counters.refusals_full += 1
            peer.refuse(ReasonCode.NOT_AUTHORIZED)
            return False
        counters.held += 1
        counters.tamed += 1
        peer.tamed = True
        peer.pump()  # it may have ended its sending before
        try:
            async with asyncio.timeout(seconds):
                await peer.gone()
        except TimeoutError:
            pass
        finally:
            counters.held -= 1
            peer.tamed = False
        return peer.alive


def evidence_of(connect: Connect, certificate: bytes | None) -> ApiKey | ClientCertificate:
    """What a CONNECT claims. Raises Unauthenticated."""
    if connect.user_name and connect.password is not None:
        try:
            presented = connect.password.decode()
        except UnicodeDecodeError:
            raise Unauthenticated("a password that is no API key") from None
        return ApiKey(secrets.digest(presented), device_id=connect.user_name)
    if certificate is not None:
        return ClientCertificate(certificate)
    raise Unauthenticated("no credential")


@dataclass(slots=True)
class _Refused:
    wait: float
    at: float


class Taming:
    """How long who was refused waits. Pure; `now` in seconds."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._refused: OrderedDict[object, _Refused] = OrderedDict()
        self._addresses = RateLimiter(limits.refusals_per_second, limits.refusals_burst)

    def delay(self, lookup: object, now: float) -> float:
        """Seconds that a CONNECT with this credential waits before it is judged."""
        known = self._refused.get(lookup)
        if known is None or now - known.at > self._limits.taming_forgotten:
            return 0.0
        return known.wait

    def refused(self, lookup: object, now: float) -> None:
        """It was refused, once more."""
        known = self._refused.pop(lookup, None)
        limits = self._limits
        if known is None or now - known.at > limits.taming_forgotten:
            wait = min(limits.taming_longest, limits.taming_first)
        else:
            wait = min(limits.taming_longest, 2 * known.wait)
        self._refused[lookup] = _Refused(wait, now)
        if len(self._refused) > _REMEMBERED:
            self._refused.popitem(last=False)

    def admitted(self, lookup: object) -> None:
        """It is good again."""
        self._refused.pop(lookup, None)

    def answer_delay(self, block: str, now: float) -> float:
        """Seconds that one more refusal of an address waits for its answer."""
        wait = self._addresses.take(block, now)
        return 0.0 if wait is None else min(self._limits.taming_longest, max(wait, self._limits.taming_first))
