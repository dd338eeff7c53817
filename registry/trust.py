"""Keys that all nodes of a database share, sealed in it: made by whoever comes first, opened by everybody else.

    first start    transaction, advisory lock ─► canary opens? ─► issuer key there? ─► authorities there? ─► commit
                                                 no: another ring, stop   no: make and seal   no: make and seal

    roll-over      transaction, the same lock ─► make an issuing authority ─► the active one steps back, the new one is
                   active ─► event ca.rolled_over ─► commit ········► every node reads the authorities again

    key ring       a key is added to the file and made active ─► event ─► every sealed value is opened and sealed again,
                   in chunks ─► nothing rests under the old key ─► the old key may be dropped from the file

The canary is a known value under the ring. A node whose ring does not open it would make secrets that the others
cannot read; it must not start. All of a first start is one transaction under a lock, so two first nodes end with one
set, and a crash halfway leaves nothing.

Roll-over races with issuing on other nodes, and that is harmless: an intent is accepted only while its authority is the
active one (storage/certificates.py), so what is signed by the old authority was recorded before the roll-over. A node
that still has the old set learns of it from the event, or else from its first intent that is not accepted.
Certificates of the old authority stay valid, and it goes on signing its revocation list until it expires.

Resealing can be stopped anywhere and called again: every chunk is a transaction, and what it has done is not read
again. The file is written before anything is sealed under its new key. A node that has not read the file yet goes on
sealing under the old key, which is why dropping a key looks first whether anything rests under it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from uuid import UUID, uuid4

from asyncpg import Record
from cryptography.x509.oid import NameOID

from certs.authority import Authority, AuthorityMaterial, AuthorityRole, AuthoritySet, make_issuing, make_root, open_set
from certs.chains import describe_certificate, fingerprint
from certs.keys import PrivateKeyPem
from registry import psk
from registry.errors import Unavailable
from registry.events import SYSTEM, EventKind, NewEvent
from registry.feed import Seen
from registry.model import Actor, CredentialId, TemplateId, TenantId
from registry.operators import IssuerKey
from registry.sealing import KeyRing, KeyRingError, SealBroken, SealContext, changing, key_prefix, save
from registry.secrets import RandomBytes, Secret
from registry.storage import audit, events, trust
from registry.storage.database import Connection, Database
from registry.storage.trust import SEALED_COLUMNS, SealedColumn, SealedValue
from registry.templates import claim_psk_context

log = logging.getLogger(__name__)

RESEAL_CHUNK = 200
"""Values in one transaction of resealing: some milliseconds of locks on rows that are hardly ever changed."""
_RESEAL_PASSES = 5
"""A pass can miss what a node seals behind it under the old key; after these, what is left is told to the operator."""

_CANARY = b"gatehouse key ring canary"
_CANARY_SEAL = SealContext("canary", "system", "key-ring")


class WrongKeyRing(Exception):
    """The key ring is not the one that this database was sealed with."""


@dataclass(frozen=True, slots=True)
class Trust:
    """The opened shared keys."""

    issuer_keys: list[IssuerKey]
    """Keys of operator tokens, the one that signs first."""
    live: Authorities

    @property
    def authorities(self) -> AuthoritySet:
        """The authorities as they are now. Ask again instead of keeping it: a roll-over replaces it."""
        return self.live.current


@dataclass(frozen=True, slots=True)
class RolledOver:
    """What a roll-over did: SHA-256 fingerprints of the issuing authorities' certificates, and the new one's end."""

    active: str
    previous: str
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Resealed:
    """What resealing did. `left` counts the values that still rest under another key than the active one."""

    active: str
    resealed: int
    left: int


class Authorities:
    """The authorities of this database, opened, and kept up to date while the node runs. Follows the feed."""

    def __init__(self, database: Database, ring: KeyRing, clock: Callable[[], datetime], loaded: _Loaded) -> None:
        self._database = database
        self._ring = ring
        self._clock = clock
        self._loaded = loaded
        self._reading = asyncio.Lock()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> AuthoritySet:
        """The root, the active issuing authority, and those of before that still matter."""
        return self._loaded.authorities

    def id_of(self, authority: Authority) -> UUID:
        """The id of one of the authorities of `current`, or of an earlier `current`. Raises KeyError."""
        return self._loaded.ids[authority.fingerprint]

    def by_id(self, authority_id: UUID) -> Authority | None:
        """The opened authority of this id; None for one that has expired, or that this node has not read yet."""
        authorities = (*self.current.issuing, self.current.root)
        return next((each for each in authorities if self.id_of(each) == authority_id), None)

    async def refresh(self) -> bool:
        """Read the authorities again if there are others than before; whether there were. Raises Unavailable,
        WrongKeyRing."""
        async with self._reading, self._database.connection() as connection:
            if await trust.authority_marks(connection) == self._loaded.marks:
                return False
            rows = await trust.authorities(connection)
        try:
            self._loaded = _opened(rows, self._ring, self._clock())
        except SealBroken as broken:
            raise WrongKeyRing(f"an authority of this database does not open: {broken}") from None
        log.info("ca.reloaded", extra={"fields": {"active": self.current.active.fingerprint}})
        return True

    def refresh_soon(self) -> None:
        """The same, behind whoever asks."""
        task = asyncio.get_running_loop().create_task(self._try_refresh(), name="authorities")
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def follow(self, seen: Seen) -> None:
        """Read again what an event says has changed."""
        match seen.event.kind:
            case EventKind.CA_ROLLED_OVER:
                self.refresh_soon()
            case EventKind.KEY_RING_ROTATED:
                self._ring.refresh()
            case _:
                return

    async def restored(self) -> None:
        """The feed was away: a roll-over may have been missed."""
        self._ring.refresh()
        self.refresh_soon()

    async def stop(self) -> None:
        """Wait for a reading under way."""
        while self._background:
            await asyncio.wait(self._background)

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
        except (Unavailable, WrongKeyRing) as error:
            # The next intent that is not accepted, or the next event, tries again.
            log.warning("ca.not_reloaded", extra={"fields": {"reason": str(error)}})


async def open_trust(
    database: Database,
    ring: KeyRing,
    *,
    clock: Callable[[], datetime],
    random: RandomBytes,
    name: str = "Gatehouse",
) -> Trust:
    """Open the shared keys; make those that are not there yet. Raises WrongKeyRing, Unavailable."""
    async with database.transaction() as connection:
        await trust.lock_first_start(connection)
        await _check_canary(connection, ring)
        try:
            issuer_keys = await _issuer_keys(connection, ring, random)
            loaded = await _authorities(connection, ring, clock(), random, name)
        except SealBroken as broken:
            raise WrongKeyRing(f"a key of this database does not open: {broken}") from None
    return Trust(issuer_keys, Authorities(database, ring, clock, loaded))


async def roll_over(
    database: Database, ring: KeyRing, *, clock: Callable[[], datetime], random: RandomBytes, actor: Actor
) -> RolledOver:
    """Make a new issuing authority and let it sign everything from now on. What the old one signed stays valid.

    Duty of the caller: `hint` the feed. Raises WrongKeyRing, Unavailable, BadAuthority (the root has expired).
    """
    now = clock()
    async with database.transaction() as connection:
        await trust.lock_first_start(connection)
        try:
            before = _opened(await trust.authorities(connection), ring, now).authorities
        except SealBroken as broken:
            raise WrongKeyRing(f"an authority of this database does not open: {broken}") from None
        material = make_issuing(before.root, _organisation(before.root), now, random)
        successor = Authority(material)
        await trust.retire_issuing(connection)
        root_id = next(r["authority_id"] for r in await trust.authorities(connection) if r["kind"] == _ROOT)
        authority_id = await _insert(connection, ring, material, root_id)
        done = RolledOver(successor.fingerprint, before.active.fingerprint, successor.not_after)
        told = {"active": done.active, "previous": done.previous, "not_after": done.not_after.isoformat()}
        await audit.insert(connection, None, actor, "roll_over", "authority", str(authority_id), told)
        await events.insert(connection, NewEvent(EventKind.CA_ROLLED_OVER, SYSTEM, actor, data=told))
    return done


# -- the key ring ------------------------------------------------------------------------------------------------------


def stage_key(ring: KeyRing, path: Path, key_id: str | None = None) -> KeyRing:
    """Add a key to the ring and its file, without using it; the ring as it is in the file then.

    Where nodes have files of their own: stage here, copy the file to every node, then `rotate_key_ring` with this id.
    Raises KeyRingError.
    """
    with changing(path) as present:
        staged = present.with_new(key_id or _next_key_id(present))
        save(staged, path)
    ring.refresh()
    return staged


async def rotate_key_ring(
    database: Database, ring: KeyRing, path: Path, *, actor: Actor, key_id: str | None = None
) -> tuple[KeyRing, Resealed]:
    """Make another key the active one and seal everything under it; the ring of the file from now on.

    `key_id` names a key that was staged; without it a new key is made. The old keys stay in the ring, so nodes that
    run go on opening what they remember; `drop_key` takes one out. If it fails half-way, `reseal` goes on.
    Duty of the caller: `hint` the feed. Raises KeyRingError, WrongKeyRing, Unavailable.
    """
    async with database.connection() as connection:
        await _check_canary(connection, ring)
    with changing(path) as present:
        rotated = present.with_active(key_id) if key_id is not None else present.with_new_active(_next_key_id(present))
        save(rotated, path)
    ring.refresh()
    async with database.transaction() as connection:
        told = {"active": rotated.active}
        await audit.insert(connection, None, actor, "rotate", "key_ring", rotated.active, told)
        await events.insert(connection, NewEvent(EventKind.KEY_RING_ROTATED, SYSTEM, actor, data=told))
    return rotated, await reseal(database, rotated)


async def reseal(database: Database, ring: KeyRing) -> Resealed:
    """Seal every value under the ring's active key that is not. Again: goes on. Raises WrongKeyRing, Unavailable."""
    prefix = key_prefix(ring.active)
    total = 0
    for _ in range(_RESEAL_PASSES):
        done = 0
        for column in SEALED_COLUMNS:
            done += await _reseal_column(database, ring, column, prefix)
        total += done
        if not done:
            break
    return Resealed(ring.active, total, await _count_others(database, ring))


async def drop_key(database: Database, path: Path, key_id: str, *, actor: Actor) -> KeyRing:
    """Take a key out of the ring and its file; the ring without it.

    Raises KeyRingError for the active key, and while anything rests under the key: then a node still seals under it,
    or resealing has not ended. Claims whose answer was lost and derived under the key cannot be repeated afterwards.
    """
    async with database.transaction() as connection:
        counts = [await trust.count_sealed_with(connection, column, key_prefix(key_id)) for column in SEALED_COLUMNS]
        if any(counts):
            raise KeyRingError(f"{sum(counts)} values rest under the key {key_id!r}; reseal them first")
        await audit.insert(connection, None, actor, "drop_key", "key_ring", key_id)
    with changing(path) as present:
        reduced = present.without(key_id)
        save(reduced, path)
    return reduced


async def _reseal_column(database: Database, ring: KeyRing, column: SealedColumn, prefix: bytes) -> int:
    done, last = 0, None
    while True:
        async with database.transaction() as connection:
            values = await trust.not_sealed_with(connection, column, prefix, last, RESEAL_CHUNK)
            await trust.put_sealed(connection, column, [_resealed(ring, column, each) for each in values])
        done += len(values)
        if len(values) < RESEAL_CHUNK:
            return done
        last = values[-1].key


def _resealed(ring: KeyRing, column: SealedColumn, value: SealedValue) -> SealedValue:
    context = _context(column, value)
    try:
        return replace(value, sealed=ring.seal(ring.open(value.sealed, context), context))
    except SealBroken as broken:
        raise WrongKeyRing(f"a value of {column.name} ({value.key}) does not open: {broken}") from None


def _context(column: SealedColumn, value: SealedValue) -> SealContext:
    """What a sealed value is bound to, the same as where it is sealed first."""
    match column.name:
        case "psk":
            tenant_id, credential_id = TenantId(UUID(value.owner)), CredentialId(UUID(value.key))
            return psk.seal_context(tenant_id, credential_id, value.version)
        case "claim_psk":
            return claim_psk_context(TenantId(UUID(value.owner)), TemplateId(value.key))
        case "issuer_key":
            return _issuer_seal(value.key)
        case "authority":
            return _authority_seal(UUID(value.key))
        case "canary":
            return _CANARY_SEAL
        case _:
            raise AssertionError(f"nobody said what {column.name} is bound to")


async def _count_others(database: Database, ring: KeyRing) -> int:
    total = 0
    async with database.connection() as connection:
        for key_id in ring.key_ids:
            if key_id != ring.active:
                for column in SEALED_COLUMNS:
                    total += await trust.count_sealed_with(connection, column, key_prefix(key_id))
    return total


def _next_key_id(ring: KeyRing) -> str:
    taken = set(ring.key_ids)
    return next(f"k{number}" for number in range(1, len(taken) + 2) if f"k{number}" not in taken)


# -- opening -----------------------------------------------------------------------------------------------------------

_ROOT = AuthorityRole.ROOT.value


@dataclass(frozen=True, slots=True)
class _Loaded:
    """Opened authorities, their ids by fingerprint, and what the table looked like."""

    authorities: AuthoritySet
    ids: Mapping[str, UUID]
    marks: frozenset[tuple[UUID, bool]]


async def _check_canary(connection: Connection, ring: KeyRing) -> None:
    sealed = await trust.canary(connection)
    if sealed is None:
        await trust.put_canary(connection, ring.seal(Secret(_CANARY), _CANARY_SEAL))
        return
    try:
        ring.open(sealed, _CANARY_SEAL)
    except SealBroken as broken:
        raise WrongKeyRing(
            f"this key ring is not the one that the database was sealed with ({broken}); "
            "every node of a database needs the same ring ([security] key_ring)"
        ) from None


async def _issuer_keys(connection: Connection, ring: KeyRing, random: RandomBytes) -> list[IssuerKey]:
    rows = await trust.issuer_keys(connection)
    if rows:
        return [IssuerKey.from_bytes(ring.open(row["sealed_key"], _issuer_seal(row["kid"]))) for row in rows]
    key = IssuerKey.generate(random)
    await trust.insert_issuer_key(connection, key.kid, key.public.raw, ring.seal(key.to_bytes(), _issuer_seal(key.kid)))
    return [key]


async def _authorities(connection: Connection, ring: KeyRing, now: datetime, random: RandomBytes, name: str) -> _Loaded:
    rows = await trust.authorities(connection)
    if not rows:
        root = make_root(name, now, random)
        root_id = await _insert(connection, ring, root, None)
        await _insert(connection, ring, make_issuing(Authority(root), name, now, random), root_id)
        rows = await trust.authorities(connection)
    return _opened(rows, ring, now)


def _opened(rows: Sequence[Record], ring: KeyRing, now: datetime) -> _Loaded:
    """The authorities that still matter at `now`: all but issuing ones of before that have expired, whose leaves have
    expired with them. Raises SealBroken."""
    materials = [
        AuthorityMaterial(
            AuthorityRole(row["kind"]),
            row["certificate"],
            PrivateKeyPem(ring.open(row["sealed_key"], _authority_seal(row["authority_id"])).reveal()),
        )
        for row in rows
        if row["active"] or row["kind"] == _ROOT or _lives(row["certificate"], now)
    ]
    active = next(row["certificate"] for row in rows if row["active"] and row["kind"] == AuthorityRole.ISSUING.value)
    return _Loaded(
        open_set(materials, fingerprint(active)),
        MappingProxyType({fingerprint(row["certificate"]): row["authority_id"] for row in rows}),
        frozenset((row["authority_id"], row["active"]) for row in rows),
    )


def _lives(certificate: bytes, now: datetime) -> bool:
    return describe_certificate(certificate).not_after >= now


async def _insert(connection: Connection, ring: KeyRing, material: AuthorityMaterial, issuer_id: UUID | None) -> UUID:
    authority_id = uuid4()
    sealed = ring.seal(Secret(material.private_key.reveal()), _authority_seal(authority_id))
    await trust.insert_authority(
        connection, authority_id, material.role.value, issuer_id, material.certificate_der, sealed, active=True
    )
    return authority_id


def _organisation(authority: Authority) -> str:
    """The name that the authorities of this database share."""
    found = authority.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return str(found[0].value) if found else "Gatehouse"


def _issuer_seal(kid: str) -> SealContext:
    return SealContext("operator-issuer-key", "system", kid)


def _authority_seal(authority_id: UUID) -> SealContext:
    return SealContext("authority-key", "system", str(authority_id))
