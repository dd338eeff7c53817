"""The devices that are connected to one server: who is let in to which session, and who has to give it up.

    admitted ─► will allowed? ─► alone with its session ─► older connection ended ─► taken from the store ─► CONNACK
                                                                  │                          │ gone meanwhile, refused
                                                                  └─► 0x8E, will published    └─► given back

Client ids are scoped to the device: the table of connections is by (tenant, device, client id), so a second connection
takes over one of the same device only (5.0 §3.1.4: 0x8E), on this node or another.

What can race: two CONNECTs for one session (one after the other, in their order), a taking on another node (its number
says which one is later), a revocation (looked at after each wait). What can be lost: the answer to a taking; then the
session is disowned, unless its client is back before.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final
from uuid import uuid4

import msgspec

from adapters.mqtt.authorization import Brokered, UplinkTopic, may_publish, publish_target
from adapters.mqtt.broker import Broker
from adapters.mqtt.device import DeviceRole, Key
from adapters.mqtt.messages import will_to_store
from adapters.mqtt.refusals import note_refusal
from adapters.mqtt.session_values import Message, message_of_will
from adapters.mqtt.topics import parse_name
from adapters.mqtt.uplinks import source_of, uplink_of
from adapters.mqtt.wire_packets import Connect, Will
from adapters.mqtt.wire_reasons import ReasonCode
from registry.errors import InvalidArgument, PermissionDenied, RegistryError, Unavailable
from registry.messaging_values import (
    Opening,
    OutcomeOpen,
    Ownership,
    Publication,
    SessionKey,
    SessionLost,
    StoredSessionId,
)
from registry.model import DeviceId, Transport
from registry.payloads import Source
from registry.rate_limits import RateLimiter
from registry.sessions import Session as RegistrySession
from registry.topic_grants import DeviceGrants

if TYPE_CHECKING:
    from adapters.mqtt.peer import Peer
    from adapters.mqtt.server import MqttServer

_DISOWN_AGAIN_SECONDS: Final = 1.0
_LOG_LINES_PER_SECOND: Final = 50
_EVICTED_EARLY: Final = 10_000
"""Beyond it the oldest is forgotten; a node that is never quiet hears of some with every revocation."""


class Devices:
    """The devices connected to one server."""

    def __init__(self, server: MqttServer, broker: Broker) -> None:
        self.server = server
        self.broker = broker
        self.by_key: dict[Key, DeviceRole] = {}
        self.leaving: dict[Key, asyncio.Task[None]] = {}
        """Sessions whose connection is gone and whose store does not know it yet."""
        self._opening: dict[Key, tuple[asyncio.Lock, int]] = {}
        self._log_lines = RateLimiter(_LOG_LINES_PER_SECOND, _LOG_LINES_PER_SECOND)
        self._taken_elsewhere: dict[Key, int] = {}
        """Of those that are being opened: the number of a taking on another node."""
        self._evicted_early: dict[StoredSessionId, int] = {}
        """While any are being opened: the epochs of sessions that nobody served here when another node took them."""

    async def admit(self, peer: Peer, session: RegistrySession, connect: Connect) -> None:
        """Accept a CONNECT whose credential is good, or refuse it for its will. The caller sees by `peer.role`.

        Raises ResourceExhausted (stored sessions of the device), Unavailable, SessionLost (another node has it by now).
        """
        grants = await self.broker.messaging.grants.of_device(session.tenant_id, session.device_id)
        if connect.will is not None and not await self._may_will(session, grants, connect.will):
            note_refusal(self.server, session, "will outside the device's topics")
            peer.refuse(ReasonCode.NOT_AUTHORIZED)
            return
        client_id = connect.client_id or f"gh-{uuid4().hex}"
        key = (session.tenant_id, session.device_id, client_id)
        async with self._alone(key):
            if _is_over(peer, session):  # while it waited for its turn
                return
            role = DeviceRole(self, peer, session, key, grants)
            try:
                present = await self._take(role, connect)
                await self.broker.enter(role)
            except BaseException:
                role.give_up(publish_will=False)
                raise
            if _is_over(peer, session):
                role.give_up(publish_will=not session.closed)
                return
            self.by_key[key] = role
            peer.role = role
            assigned = None if connect.client_id else client_id
            peer.machine.accept(role.mqtt, session_present=present, now=self.server.now(), client_id=assigned)
            role.connected()
            if role.taking < self._taken_elsewhere.get(key, 0):
                self._end_taken(role)
        peer.pump()

    async def _take(self, role: DeviceRole, connect: Connect) -> bool:
        """Give the role its session, from whoever had it; whether it is an earlier one that goes on."""
        before = self.by_key.get(role.key)
        if before is not None:
            self._end_taken(before)
        leaving = self.leaving.get(role.key)
        if leaving is not None:
            await asyncio.wait((leaving,))
        tenant_id, device_id, client_id = role.key
        expiry = role.peer.machine.granted_expiry(connect)
        if expiry <= 0 and connect.clean_start and not connect.client_id and connect.will is None:
            return False  # nobody can have had this session
        opening = Opening(
            SessionKey(tenant_id, device_id, client_id),
            role.session.identity.credential_id,
            connect.clean_start,
            expiry,
            None if connect.will is None else will_to_store(connect.will),
        )
        try:
            taken = await self.broker.messaging.take(opening)
        except OutcomeOpen:
            self.server.track(self.server.loop.create_task(self._disown(role.key), name="mqtt disown"))
            raise
        role.taking = taken.number
        role.will = taken.will
        role.own_session(taken.ownership, taken.resumed)
        self.broker.serve(role)
        if role.held is not None and self._evicted_early.get(role.held.session_id, 0) >= role.held.epoch:
            raise SessionLost  # another node has it since, and said so before we had our answer
        return taken.resumed is not None

    def taken_elsewhere(self, key: Key, number: int) -> None:
        """The client has connected to another node: end its connection here, if that is the older one."""
        role = self.by_key.get(key)
        if role is not None and role.taking < number:
            self.server.loop.call_soon(self._end_taken, role)
        if key in self._opening:
            self._taken_elsewhere[key] = max(number, self._taken_elsewhere.get(key, 0))

    def evicted_early(self, ownership: Ownership) -> None:
        """A session that nobody serves here is another node's: one that is being taken may be it."""
        if not self._opening:
            return
        epoch = max(ownership.epoch, self._evicted_early.pop(ownership.session_id, 0))
        self._evicted_early[ownership.session_id] = epoch
        if len(self._evicted_early) > _EVICTED_EARLY:
            del self._evicted_early[next(iter(self._evicted_early))]

    def _end_taken(self, role: DeviceRole) -> None:
        """It has left when this returns: one that has ended by itself, and is to be told in the next turn, as well."""
        self.server.counters.taken_over += role.peer.alive
        role.peer.end(ReasonCode.SESSION_TAKEN_OVER, publish_will=True)

    async def _disown(self, key: Key) -> None:
        """Nobody knows whether a session was taken, and its client was turned away: if it was, let it go again, unless
        the client is back before."""
        while True:
            async with self._alone(key):
                if key in self.by_key:
                    return
                leaving = self.leaving.get(key)
                if leaving is not None:
                    await asyncio.wait((leaving,))
                try:
                    await self.broker.messaging.disown(SessionKey(*key))
                except Unavailable:
                    pass
                else:
                    return
            await asyncio.sleep(_DISOWN_AGAIN_SECONDS)

    @asynccontextmanager
    async def _alone(self, key: Key) -> AsyncIterator[None]:
        """One CONNECT after the other for one session."""
        lock, waiting = self._opening.get(key, (None, 0))
        lock = lock or asyncio.Lock()
        self._opening[key] = lock, waiting + 1
        try:
            async with lock:
                yield
        finally:
            _, waiting = self._opening[key]
            if waiting == 1:
                del self._opening[key]
                self._taken_elsewhere.pop(key, None)
                if not self._opening:
                    self._evicted_early.clear()
            else:
                self._opening[key] = lock, waiting - 1

    def may_log(self, now: float) -> bool:
        """Whether there is room in the log for one more line about what a device did wrong."""
        return self._log_lines.take(None, now) is None

    async def speaks_for(self, session: RegistrySession, device_id: DeviceId) -> bool:
        """Whether a device may act for this one: itself, or its child."""
        if device_id == session.device_id:
            return True
        return await self.server.registry.children.is_child(session.identity, device_id)

    async def store_will(self, publication: Publication, will_id: int, message: Message) -> None:
        """Store a will on an uplink's topic, as what the device says last, or its gateway for it. Once, however often
        it is tried: it has a message id, of its own or by its number. Raises Unavailable."""
        registry, tenant_id, device_id = self.server.registry, publication.tenant_id, publication.device_id
        target = publish_target(parse_name(message.topic), device_id)
        if not isinstance(target, UplinkTopic):
            return
        via = None if target.device_id == device_id else device_id
        try:
            if via is not None and not await registry.children.belongs(tenant_id, via, target.device_id):
                raise PermissionDenied("the child is another gateway's by now")
            source = Source(tenant_id, target.device_id, Transport.MQTT, via)
            uplink = uplink_of(target, message, source, max_bytes=self.server.limits.payload_bytes)
            if uplink.message_id is None:
                uplink = msgspec.structs.replace(uplink, message_id=f"will-{will_id}")
            await registry.uplinks.submit(uplink)
        except Unavailable:
            raise
        except RegistryError:
            self.server.counters.wills_lost += 1

    async def _may_will(self, session: RegistrySession, grants: DeviceGrants, will: Will) -> bool:
        levels = parse_name(will.topic)
        target = publish_target(levels, session.device_id)
        match target:
            case UplinkTopic(device_id):
                allowed = await self.speaks_for(session, device_id)
                return allowed and _readable(will, target, session, self.server)
            case Brokered():
                return may_publish(grants.grants, levels, session.device_id)
            case _:
                return False


def _is_over(peer: Peer, session: RegistrySession) -> bool:
    return session.closed or not peer.alive


def _readable(will: Will, target: UplinkTopic, session: RegistrySession, server: MqttServer) -> bool:
    """Whether a will can be stored when its time comes: it is judged while somebody is there to be told."""
    try:
        message = message_of_will(will, server.now())
        uplink_of(target, message, source_of(session, target.device_id), max_bytes=server.limits.payload_bytes)
    except InvalidArgument:
        return False
    return True
