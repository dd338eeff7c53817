"""The one credential resolver: evidence in, an Identity out, or the same refusal for every reason.

    ApiKey ───────────┐            found?      judge(now)
    ClientCertificate ┼─► look-up ───────────► ──────────► Identity ──► sessions.open ──► recheck ──► admitted
    PskIdentity ──────┘  (cache, batch)          │ reason
      offer ► handshake ► confirm                └──► Unauthenticated(reason): one face outside

Look-ups that arrive together become one query, and first uses stand in a line. A bounded cache remembers living
credentials; the revocation feed drops entries, and while the feed is not trusted the cache is not asked. The cache can
only save the *first* look-up: before a session is admitted its credential is read again from the database, after the
session is in the table (`recheck`). So a revocation either commits before that reading, which then refuses, or after
it, and then finds the session in the table.

A PSK is needed before it is proved. `offer` gives a key for any identity: an unknown one gets a random key, so the
handshake fails exactly as it does for a wrong key. `confirm` is called when the handshake has verified. An identity is
sent in the clear and can be guessed, so `offer` never asks the cache, which would answer sooner for those that exist,
and opens a seal for every identity.

Unknown and refused credentials do the same work: one look-up by hash through the same statement, never from the cache,
not even when one expired while it was remembered.

A certificate has one more door, `admit_for_renewal`. It opens a little longer than `admit`: for some days after the
certificate's own end (`certs.renewal`), so that a device that slept through it can still ask for a successor. That is
only for certificates that this server has issued: an expired one of another authority is renewed there, and here it is
refused as an unknown one is. What the door gives is a RenewalRight, which no session takes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import assert_never
from uuid import UUID

import msgspec

from certs.chains import BadCertificate, describe_certificate
from certs.renewal import GRACE, ValidityState, validity_state
from registry import secrets
from registry.batching import Batcher
from registry.errors import Unauthenticated, Unavailable
from registry.events import EventKind
from registry.model import (
    ApiKey,
    ClientCertificate,
    Contact,
    CredentialId,
    CredentialKind,
    DeviceId,
    DeviceStatus,
    Evidence,
    Identity,
    PskIdentity,
    RenewalRight,
    Transport,
)
from registry.observation import NOBODY, AuthOutcome, Observer
from registry.ports import RefusalLog
from registry.sealing import KeyRing, SealBroken, SealContext
from registry.secrets import RandomBytes, Secret
from registry.storage import admission, certificates, credentials
from registry.storage.admission import CredentialState
from registry.storage.database import Database

_LOOKUP_BATCH = 256
"""Look-ups in one query; more only lengthens the wait of the first."""
_FORGOTTEN_KEPT = 10_000
"""Devices whose last forgetting is remembered: many times what a reading of milliseconds can overlap with."""
_FIRST_USES_AT_ONCE = 2
"""A fleet that is switched on for the first time takes two connections of the pool, not all of them."""
_LOOKUP_QUEUE = 50_000
"""Waiting look-ups: a reconnect storm of a full node; beyond it new arrivals are told to come later."""

Lookup = tuple[CredentialKind, bytes]
_DECOY = SealContext("psk", "", "")
"""Whose the sealed value is that is opened for identities that nobody has."""


class PskOffer(msgspec.Struct, frozen=True):
    """A key for a handshake that has not proved anything yet. It opens no session; `Resolver.confirm` must follow."""

    key: Secret[bytes]
    state: CredentialState | None

    def __repr__(self) -> str:
        return "PskOffer(…)"


@dataclass(slots=True)
class ResolverCounters:
    """Plain numbers for the metrics."""

    admitted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    cache_hits: int = 0
    cache_misses: int = 0


class Resolver:
    """Admits devices. One instance serves every transport of a node."""

    def __init__(
        self,
        database: Database,
        ring: KeyRing,
        refusals: RefusalLog,
        *,
        clock: Callable[[], datetime],
        random: RandomBytes,
        feed_trusted: Callable[[], bool],
        hint: Callable[[], None],
        cache_entries: int = 100_000,
        renewal_grace: timedelta = GRACE,
        observer: Observer = NOBODY,
    ) -> None:
        self._observer = observer
        self._renewal_grace = renewal_grace
        self._database = database
        self._ring = ring
        self._refusals = refusals
        self._clock = clock
        self._random = random
        self._cache = _Cache(cache_entries)
        self._feed_trusted = feed_trusted
        self._hint = hint
        self.counters = ResolverCounters()
        self._decoy = ring.seal(Secret(random(secrets.SECRET_BYTES)), _DECOY)
        self._lookups: Batcher[Lookup, CredentialState | None] = Batcher(
            "credential look-up", self._look_up, max_items=_LOOKUP_BATCH, max_queued=_LOOKUP_QUEUE, runners=2
        )
        self._rechecks: Batcher[CredentialId, CredentialState | None] = Batcher(
            "credential recheck", self._read_again, max_items=_LOOKUP_BATCH, max_queued=_LOOKUP_QUEUE, runners=2
        )
        self._recording: dict[CredentialId, asyncio.Future[None]] = {}
        self._first_uses: Batcher[tuple[CredentialState, Contact], None] = Batcher(
            "first use", self._record_first_use, max_items=1, max_queued=_LOOKUP_QUEUE, runners=_FIRST_USES_AT_ONCE
        )

    async def admit(self, evidence: ApiKey | ClientCertificate, contact: Contact) -> Identity:
        """The identity that the evidence proves. Raises Unauthenticated (alike for every reason) or Unavailable."""
        lookup = lookup_of(evidence)
        state = await self._find(lookup, contact)
        if state is None or not secrets.same(state.lookup, lookup[1]):
            raise self._refuse(None, f"unknown {lookup[0].value}", contact, claimed=_claimed(evidence))
        if isinstance(evidence, ApiKey) and evidence.device_id not in (None, str(state.device_id)):
            raise self._refuse(state, "key of another device", contact)
        return self._identity(state, contact)

    async def admit_for_renewal(self, evidence: ClientCertificate, contact: Contact) -> RenewalRight:
        """The right to ask for the certificate's successor, also within the grace after its end.

        Raises Unauthenticated (alike for every reason), Unavailable. A certificate that is not yet valid never has it,
        nor one that a rotation ended before its own date, nor an expired one that another authority has issued.
        """
        lookup = lookup_of(evidence)
        state = await self._find(lookup, contact)
        if state is None or not secrets.same(state.lookup, lookup[1]):
            raise self._refuse(None, f"unknown {lookup[0].value}", contact)
        now = self._clock()
        reason = _judge(state, now)
        in_grace = (
            reason == _EXPIRED
            and _in_grace(state, evidence.der, now, self._renewal_grace)
            and await self._issued_here(state)
        )
        if reason is not None and not in_grace:
            raise self._refuse(state, reason, contact)
        return RenewalRight(state.tenant_id, state.device_id, state.credential_id, in_grace)

    def remembers(self, evidence: ApiKey | ClientCertificate) -> bool:
        """Whether `admit` needs no look-up for it now: it admitted on this node before."""
        return self._feed_trusted() and self._cache.get(lookup_of(evidence)) is not None

    async def holder(self, evidence: ClientCertificate, contact: Contact) -> DeviceId | None:
        """Whose certificate that is, if it admits now; nothing is admitted, refused or noted. Raises Unavailable."""
        lookup = lookup_of(evidence)
        state = await self._find(lookup, contact)
        if state is None or not secrets.same(state.lookup, lookup[1]) or self.judge(state) is not None:
            return None
        return state.device_id

    async def offer(self, evidence: PskIdentity, contact: Contact) -> PskOffer:
        """A key to run a PSK handshake with, for any identity. Raises Unavailable only.

        Refusals are noted behind the caller's next step, which answers the peer: a note costs a thirtieth of what the
        peer waits for, and a wrong key, of which nothing is known yet, has none.
        """
        state = await self._read((CredentialKind.PSK, evidence.identity), contact)
        stand_in: Secret[bytes] = Secret(self._random(secrets.SECRET_BYTES))
        if state is None or state.sealed_key is None:
            self._ring.open(self._decoy, _DECOY)
            self._note_behind(None, "unknown psk", contact)
            return PskOffer(stand_in, None)
        try:
            key = self._ring.open(state.sealed_key, psk_seal(state))
        except SealBroken as broken:
            self._note_behind(state, f"sealed key does not open: {broken}", contact)
            return PskOffer(stand_in, None)
        reason = self.judge(state)
        if reason is not None:  # a peer with the right key must not learn that it was the right one
            self._note_behind(state, reason, contact)
            return PskOffer(stand_in, None)
        return PskOffer(key, state)

    async def confirm(self, offer: PskOffer, contact: Contact) -> Identity:
        """The identity behind an offer whose handshake has verified. Raises Unauthenticated."""
        if offer.state is None:
            raise self._refuse(None, "unknown psk", contact)
        return self._identity(offer.state, contact)

    def unproven(self, offer: PskOffer, contact: Contact) -> None:
        """Note for the operator that a handshake did not verify under an offer's key: the device has another one.

        Duty of the caller: the peer has been answered. An offer without a credential has been noted already.
        """
        if offer.state is not None:
            self._note(offer.state, "psk does not verify", contact)

    async def recheck(self, identity: Identity, contact: Contact) -> Identity:
        """The same identity as the database has it *now*; its first use is recorded.

        Raises Unauthenticated, Unavailable.

        Duty of the caller: the session is in the session table already.
        """
        state = await self._rechecks.submit(identity.credential_id)
        if state is None or state.device_id != identity.device_id:
            raise self._refuse(None, "credential deleted", contact, identity)
        confirmed = self._identity(state, contact)
        if not state.used or _is_news(state, contact):
            await self._first_use(state, contact)
        self.counters.admitted += 1
        return confirmed

    async def states(self, wanted: Sequence[CredentialId]) -> dict[CredentialId, CredentialState]:
        """Fresh states for the periodic sweep. Raises Unavailable."""
        async with self._database.connection() as connection:
            return await admission.by_id(connection, wanted)

    def judge(self, state: CredentialState) -> str | None:
        """Why the credential does not admit now, or None."""
        return _judge(state, self._clock())

    def forget(self, device_id: DeviceId) -> None:
        """Drop what the cache knows of a device. Called by the feed."""
        self._cache.forget(device_id)

    def forget_all(self) -> None:
        """Empty the cache: the feed was lost, so anything may have changed."""
        self._cache.clear()

    async def stop(self) -> None:
        """Finish what is under way."""
        await self._lookups.stop()
        await self._rechecks.stop()
        await self._first_uses.stop()

    # -- look-ups --------------------------------------------------------------------------------------------------

    async def _find(self, lookup: Lookup, contact: Contact) -> CredentialState | None:
        if self._feed_trusted():
            cached = self._cache.get(lookup)
            if cached is not None and self.judge(cached) is None:
                self.counters.cache_hits += 1
                return cached
        self.counters.cache_misses += 1
        asked_at = self._cache.generation
        state = await self._read(lookup, contact)
        if state is not None and self._feed_trusted() and self.judge(state) is None:
            self._cache.put(lookup, state, asked_at)
        return state

    async def _read(self, lookup: Lookup, contact: Contact) -> CredentialState | None:
        try:
            return await self._lookups.submit(lookup)
        except Unavailable:
            self._observer.auth_attempted(contact.transport, AuthOutcome.UNAVAILABLE)
            raise

    async def _look_up(self, wanted: Sequence[Lookup]) -> Sequence[CredentialState | None]:
        async with self._database.connection() as connection:
            return await admission.by_lookup(connection, wanted)

    async def _read_again(self, wanted: Sequence[CredentialId]) -> Sequence[CredentialState | None]:
        found = await self.states(wanted)
        return [found.get(each) for each in wanted]

    async def _issued_here(self, state: CredentialState) -> bool:
        async with self._database.connection() as connection:
            return await certificates.of_credential(connection, state.tenant_id, state.credential_id) is not None

    async def _first_use(self, state: CredentialState, contact: Contact) -> None:
        """Record it, or wait for who is doing so already."""
        recorded = self._recording.get(state.credential_id)
        if recorded is None:
            recorded = self._recording[state.credential_id] = self._first_uses.submit((state, contact))
            recorded.add_done_callback(lambda _: self._recording.pop(state.credential_id, None))
        await asyncio.shield(recorded)

    async def _record_first_use(self, uses: Sequence[tuple[CredentialState, Contact]]) -> Sequence[None]:
        """One at a time: it locks its device, is waited for by nobody else's, and fails alone."""
        ((state, contact),) = uses
        async with self._database.transaction() as connection:
            await credentials.mark_first_use(
                connection, state.tenant_id, state.device_id, state.credential_id, self._clock(), contact.correlation_id
            )
        self._hint()
        self._cache.forget(state.device_id)
        return (None,)

    # -- verdicts --------------------------------------------------------------------------------------------------

    def _identity(self, state: CredentialState, contact: Contact) -> Identity:
        reason = self.judge(state)
        if reason is not None:
            raise self._refuse(state, reason, contact)
        return Identity(
            tenant_id=state.tenant_id,
            device_id=state.device_id,
            credential_id=state.credential_id,
            credential_kind=state.kind,
            gateway_id=state.gateway_id,
            expires_at=state.expires_at,
        )

    def _refuse(
        self,
        state: CredentialState | None,
        reason: str,
        contact: Contact,
        identity: Identity | None = None,
        claimed: DeviceId | None = None,
    ) -> Unauthenticated:
        self._note(state, reason, contact, identity, claimed)
        return Unauthenticated(reason)

    def _note_behind(self, state: CredentialState | None, reason: str, contact: Contact) -> None:
        asyncio.get_running_loop().call_soon(self._note, state, reason, contact)

    def _note(
        self,
        state: CredentialState | None,
        reason: str,
        contact: Contact,
        identity: Identity | None = None,
        claimed: DeviceId | None = None,
    ) -> None:
        self.counters.refused[reason] = self.counters.refused.get(reason, 0) + 1
        known = state or identity
        self._refusals.note(
            tenant_id=known.tenant_id if known else None,
            device_id=known.device_id if known else claimed,
            kind=EventKind.AUTH_REFUSED,
            reason=reason,
            contact=contact,
            detail={"credential_id": str(known.credential_id)} if known else {},
        )


def _claimed(evidence: ApiKey | ClientCertificate) -> DeviceId | None:
    """Which device a peer says it is, beside evidence that is nobody's."""
    if not isinstance(evidence, ApiKey) or evidence.device_id is None:
        return None
    try:
        return DeviceId(UUID(evidence.device_id))
    except ValueError:
        return None


_NOT_SEEN = frozenset({DeviceStatus.PENDING, DeviceStatus.REGISTERED})
_TELL_PRESENCE = frozenset({Transport.MQTT})
"""Transports whose sessions presence.py hears of: it makes their offline devices active again, many at a time."""


def _is_news(state: CredentialState, contact: Contact) -> bool:
    """Whether being here now changes the device's status at once."""
    if state.device_status is DeviceStatus.OFFLINE:
        return contact.transport not in _TELL_PRESENCE
    return state.device_status in _NOT_SEEN


def lookup_of(evidence: Evidence) -> Lookup:
    """What evidence is found by."""
    match evidence:
        case ApiKey(digest=digest):
            return CredentialKind.API_KEY, digest
        case ClientCertificate(der=der):
            return CredentialKind.X509, sha256(der).digest()
        case PskIdentity(identity=identity):
            return CredentialKind.PSK, identity
        case _:
            assert_never(evidence)


def psk_seal(state: CredentialState) -> SealContext:
    """What a device's PSK is bound to."""
    return SealContext("psk", str(state.tenant_id), str(state.credential_id), state.version)


def _judge(state: CredentialState, now: datetime) -> str | None:
    if state.revoked:
        return "credential revoked"
    if state.device_status is DeviceStatus.INACTIVE:
        return "device inactive"
    if state.not_before is not None and state.not_before > now:
        return "credential not yet valid"
    if state.expires_at is not None and state.expires_at <= now:
        return _EXPIRED
    return None


_EXPIRED = "credential expired"
"""Judged last: who has this reason has no other one."""


def _in_grace(state: CredentialState, der: bytes, now: datetime, grace: timedelta) -> bool:
    """Whether an expired certificate ended by its own date, not by a rotation's, and less than `grace` ago."""
    try:
        own = describe_certificate(der)
    except BadCertificate:
        return False
    if state.expires_at is None or state.expires_at < own.not_after:
        return False
    return validity_state(own.not_before, own.not_after, now, grace) in (ValidityState.VALID, ValidityState.GRACE)


class _Cache:
    """Living credentials by look-up, least recently used first out; dropped by device.

    A reading may be under way while its device is forgotten; what it then brings is stale. So every forgetting gets a
    number, the latest number of each device is kept for a while, and `put` refuses a state that was asked for before.
    """

    __slots__ = ("_by_device", "_entries", "_floor", "_forgotten", "_limit", "generation")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[Lookup, CredentialState] = OrderedDict()
        self._by_device: dict[DeviceId, set[Lookup]] = {}
        self._forgotten: OrderedDict[DeviceId, int] = OrderedDict()
        self._floor = 0
        self.generation = 0
        """Counts forgettings; taken before a reading and given to `put` with what it brought."""

    def get(self, lookup: Lookup) -> CredentialState | None:
        state = self._entries.get(lookup)
        if state is not None:
            self._entries.move_to_end(lookup)
        return state

    def put(self, lookup: Lookup, state: CredentialState, asked_at: int) -> None:
        if self._limit <= 0 or asked_at < max(self._floor, self._forgotten.get(state.device_id, 0)):
            return
        self._drop(lookup)
        self._entries[lookup] = state
        self._by_device.setdefault(state.device_id, set()).add(lookup)
        if len(self._entries) > self._limit:
            self._drop(next(iter(self._entries)))

    def forget(self, device_id: DeviceId) -> None:
        self.generation += 1
        self._forgotten[device_id] = self.generation
        self._forgotten.move_to_end(device_id)
        if len(self._forgotten) > _FORGOTTEN_KEPT:
            _, self._floor = self._forgotten.popitem(last=False)
        for lookup in list(self._by_device.get(device_id, ())):
            self._drop(lookup)

    def clear(self) -> None:
        self.generation += 1
        self._floor = self.generation
        self._forgotten.clear()
        self._entries.clear()
        self._by_device.clear()

    def _drop(self, lookup: Lookup) -> None:
        state = self._entries.pop(lookup, None)
        if state is None:
            return
        siblings = self._by_device[state.device_id]
        siblings.discard(lookup)
        if not siblings:
            del self._by_device[state.device_id]
