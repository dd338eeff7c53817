"""Keys that all nodes of a database share, sealed in it: made by whoever comes first, opened by everybody else.

    transaction, advisory lock ─► canary opens? ─► issuer key there? ─► authorities there? ─► commit
                                   no: another ring, stop   no: make and seal   no: make and seal

The canary is a known value under the ring. A node whose ring does not open it would make secrets that the others
cannot read; it must not start. All of it is one transaction under a lock, so two first nodes end with one set, and a
crash halfway leaves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

from certs.authority import Authority, AuthorityMaterial, AuthorityRole, AuthoritySet, make_issuing, make_root, open_set
from certs.chains import fingerprint
from certs.keys import PrivateKeyPem
from registry.operators import IssuerKey
from registry.sealing import KeyRing, SealBroken, SealContext
from registry.secrets import RandomBytes, Secret
from registry.storage import trust
from registry.storage.database import Connection, Database

_CANARY = b"gatehouse key ring canary"
_CANARY_SEAL = SealContext("canary", "system", "key-ring")


class WrongKeyRing(Exception):
    """The key ring is not the one that this database was sealed with."""


@dataclass(frozen=True, slots=True)
class Trust:
    """The opened shared keys."""

    issuer_keys: list[IssuerKey]
    """Keys of operator tokens, the one that signs first."""
    authorities: AuthoritySet


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
            authorities = await _authorities(connection, ring, clock(), random, name)
        except SealBroken as broken:
            raise WrongKeyRing(f"a key of this database does not open: {broken}") from None
    return Trust(issuer_keys, authorities)


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


async def _authorities(
    connection: Connection, ring: KeyRing, now: datetime, random: RandomBytes, name: str
) -> AuthoritySet:
    rows = await trust.authorities(connection)
    if not rows:
        root = make_root(name, now, random)
        root_id = await _insert(connection, ring, root, None)
        issuing = make_issuing(Authority(root), name, now, random)
        await _insert(connection, ring, issuing, root_id)
        return open_set([root, issuing])
    materials = [
        AuthorityMaterial(
            AuthorityRole(row["kind"]),
            row["certificate"],
            PrivateKeyPem(ring.open(row["sealed_key"], _authority_seal(row["authority_id"])).reveal()),
        )
        for row in rows
    ]
    active = next(row["certificate"] for row in rows if row["active"] and row["kind"] == AuthorityRole.ISSUING.value)
    return open_set(materials, fingerprint(active))


async def _insert(connection: Connection, ring: KeyRing, material: AuthorityMaterial, issuer_id: UUID | None) -> UUID:
    authority_id = uuid4()
    sealed = ring.seal(Secret(material.private_key.reveal()), _authority_seal(authority_id))
    await trust.insert_authority(
        connection, authority_id, material.role.value, issuer_id, material.certificate_der, sealed, active=True
    )
    return authority_id


def _issuer_seal(kid: str) -> SealContext:
    return SealContext("operator-issuer-key", "system", kid)


def _authority_seal(authority_id: UUID) -> SealContext:
    return SealContext("authority-key", "system", str(authority_id))
