"""The certificate table: what the built-in authorities intended, signed, and no longer stand behind.

A row is inserted as `intended` by a statement of its own, which is its own transaction; only who has its answer may
sign. It becomes `issued` in the transaction that also writes the credential, or `abandoned`, and never anything else
after that. A certificate ends early in two ways: `revoked_at`, now, or `ends_at`, at a time that was set when a
successor took its place. The first revocation list that names it writes its number into `listed_in`.

Lock order: device, credential, certificate. The lock on a public key comes after all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from asyncpg import Record

from registry.model import CredentialId, DeviceId, TenantId
from registry.storage.database import Connection

_KEY_LOCK = 0x6761_746B
"""The class of the advisory locks under which a public key is given to one device (ASCII "gatk")."""

_ISSUED = """
    c.authority_id, c.serial, c.tenant_id, c.device_id, c.spki_sha256, c.not_before, c.not_after, c.renew_after,
    c.fingerprint, c.der, c.credential_id
"""


@dataclass(frozen=True, slots=True)
class NewIntent:
    """A certificate that is about to be signed. `tenant_id` and `device_id` are None for a server's own."""

    authority_id: UUID
    serial: str
    tenant_id: TenantId | None
    device_id: DeviceId | None
    subject: str
    spki_sha256: bytes
    not_before: datetime
    not_after: datetime
    renew_after: datetime
    intended_at: datetime


@dataclass(frozen=True, slots=True)
class StoredCertificate:
    """A device's certificate as it was issued."""

    authority_id: UUID
    serial: str
    tenant_id: TenantId
    device_id: DeviceId
    spki_sha256: bytes
    not_before: datetime
    not_after: datetime
    renew_after: datetime
    fingerprint: bytes
    der: bytes = field(repr=False)
    credential_id: CredentialId


@dataclass(frozen=True, slots=True)
class Unfinished:
    """An intent without a certificate: its signer is at work, or died."""

    authority_id: UUID
    serial: str
    tenant_id: TenantId | None
    device_id: DeviceId | None
    intended_at: datetime


@dataclass(frozen=True, slots=True)
class EndedCertificate:
    """A certificate that a revocation list names."""

    serial: str
    ended_at: datetime
    reason: str


async def record_intents(connection: Connection, intents: Sequence[NewIntent]) -> set[tuple[UUID, str]]:
    """Write intents; the (authority, serial) of those that were accepted.

    Not accepted is one whose authority is no longer the active one, or whose serial was used before.
    """
    rows = await connection.fetch(
        """
        INSERT INTO certificate (authority_id, serial, purpose, tenant_id, device_id, subject, spki_sha256, status,
                                 not_before, not_after, renew_after, intended_at)
        SELECT u.authority_id, u.serial, CASE WHEN u.device_id IS NULL THEN 'server' ELSE 'device' END, u.tenant_id,
               u.device_id, u.subject, u.spki_sha256, 'intended', u.not_before, u.not_after, u.renew_after,
               u.intended_at
        FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::uuid[], $5::text[], $6::bytea[], $7::timestamptz[],
                    $8::timestamptz[], $9::timestamptz[], $10::timestamptz[])
            AS u (authority_id, serial, tenant_id, device_id, subject, spki_sha256, not_before, not_after, renew_after,
                  intended_at)
        JOIN authority a ON a.authority_id = u.authority_id AND a.active AND a.kind = 'issuing'
        ON CONFLICT (authority_id, serial) DO NOTHING
        RETURNING authority_id, serial
        """,
        [i.authority_id for i in intents],
        [i.serial for i in intents],
        [i.tenant_id for i in intents],
        [i.device_id for i in intents],
        [i.subject for i in intents],
        [i.spki_sha256 for i in intents],
        [i.not_before for i in intents],
        [i.not_after for i in intents],
        [i.renew_after for i in intents],
        [i.intended_at for i in intents],
    )
    return {(row["authority_id"], row["serial"]) for row in rows}


async def finish(
    connection: Connection,
    authority_id: UUID,
    serial: str,
    der: bytes,
    fingerprint: bytes,
    credential_id: CredentialId | None,
    now: datetime,
) -> bool:
    """Keep what was signed; whether its intent was still waiting for it."""
    done = await connection.fetchval(
        """
        UPDATE certificate SET status = 'issued', der = $3, fingerprint = $4, credential_id = $5, issued_at = $6
        WHERE authority_id = $1 AND serial = $2 AND status = 'intended'
        RETURNING true
        """,
        authority_id,
        serial,
        der,
        fingerprint,
        credential_id,
        now,
    )
    return done is not None


async def withdraw(connection: Connection, authority_id: UUID, serial: str) -> None:
    """Give an intent up whose certificate was signed and shown to nobody; nothing where it was finished."""
    await connection.execute(
        "UPDATE certificate SET status = 'abandoned' WHERE authority_id = $1 AND serial = $2 AND status = 'intended'",
        authority_id,
        serial,
    )


async def forget(connection: Connection, authority_id: UUID, serial: str) -> None:
    """Delete an intent that nobody has signed; nothing where it was finished."""
    await connection.execute(
        "DELETE FROM certificate WHERE authority_id = $1 AND serial = $2 AND status = 'intended'", authority_id, serial
    )


async def unfinished(connection: Connection, before: datetime, limit: int) -> list[Unfinished]:
    """Intents that were written before a time and have no certificate, oldest first, of all tenants."""
    rows = await connection.fetch(
        """
        SELECT authority_id, serial, tenant_id, device_id, intended_at FROM certificate
        WHERE status = 'intended' AND intended_at < $1
        ORDER BY intended_at
        LIMIT $2
        """,
        before,
        limit,
    )
    return [Unfinished(**dict(row)) for row in rows]


async def abandon(connection: Connection, before: datetime, limit: int) -> int:
    """Give up intents that were written before a time; how many."""
    rows = await connection.fetch(
        """
        UPDATE certificate SET status = 'abandoned'
        WHERE (authority_id, serial) IN (
            SELECT authority_id, serial FROM certificate
            WHERE status = 'intended' AND intended_at < $1
            ORDER BY intended_at
            LIMIT $2
            FOR UPDATE SKIP LOCKED)
        RETURNING serial
        """,
        before,
        limit,
    )
    return len(rows)


async def delete_ended(connection: Connection, before: datetime, limit: int) -> int:
    """Delete rows of certificates that ended by their own date before a time; how many."""
    rows = await connection.fetch(
        """
        DELETE FROM certificate
        WHERE (authority_id, serial) IN (
            SELECT authority_id, serial FROM certificate
            WHERE not_after < $1
            ORDER BY not_after
            LIMIT $2
            FOR UPDATE SKIP LOCKED)
        RETURNING serial
        """,
        before,
        limit,
    )
    return len(rows)


async def lock_key(connection: Connection, spki_sha256: bytes) -> None:
    """Wait for, and hold, the turn to certify a public key, until the transaction ends. Take no other lock after it."""
    number = int.from_bytes(spki_sha256[:4], "big", signed=True)
    await connection.execute("SELECT pg_advisory_xact_lock($1, $2)", _KEY_LOCK, number)


async def key_is_taken(
    connection: Connection, spki_sha256: bytes, tenant_id: TenantId, device_id: DeviceId, now: datetime
) -> bool:
    """Whether a living certificate of another device of the tenant, or of a server, is for this public key."""
    found = await connection.fetchval(
        """
        SELECT true FROM certificate
        WHERE spki_sha256 = $1 AND status = 'issued' AND revoked_at IS NULL AND not_after > $4
          AND (ends_at IS NULL OR ends_at > $4)
          AND (purpose = 'server' OR (tenant_id = $2 AND device_id <> $3))
        LIMIT 1
        """,
        spki_sha256,
        tenant_id,
        device_id,
        now,
    )
    return found is not None


async def of_key(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId, spki_sha256: bytes, now: datetime
) -> StoredCertificate | None:
    """The device's newest certificate for a public key whose credential lives."""
    row = await connection.fetchrow(
        f"""
        SELECT {_ISSUED}
        FROM certificate c JOIN credential d ON d.tenant_id = c.tenant_id AND d.credential_id = c.credential_id
        WHERE c.spki_sha256 = $3 AND c.tenant_id = $1 AND c.device_id = $2 AND c.status = 'issued'
          AND d.revoked_at IS NULL AND (d.expires_at IS NULL OR d.expires_at > $4)
        ORDER BY c.issued_at DESC, c.serial
        LIMIT 1
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        device_id,
        spki_sha256,
        now,
    )
    return StoredCertificate(**dict(row)) if row else None


async def of_credential(
    connection: Connection, tenant_id: TenantId, credential_id: CredentialId
) -> StoredCertificate | None:
    """The certificate that was issued as a credential; None for a foreign one, and for other credentials."""
    row = await connection.fetchrow(
        f"SELECT {_ISSUED} FROM certificate c WHERE c.tenant_id = $1 AND c.credential_id = $2",  # noqa: S608
        tenant_id,
        credential_id,
    )
    return StoredCertificate(**dict(row)) if row else None


async def renew_after(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId, now: datetime
) -> datetime | None:
    """When the device is advised to renew: that of its living certificate which lasts longest."""
    found: datetime | None = await connection.fetchval(
        """
        SELECT renew_after FROM certificate
        WHERE tenant_id = $1 AND device_id = $2 AND status = 'issued' AND revoked_at IS NULL AND not_after > $3
          AND (ends_at IS NULL OR ends_at > $3)
        ORDER BY not_after DESC, issued_at DESC
        LIMIT 1
        """,
        tenant_id,
        device_id,
        now,
    )
    return found


async def count_since(connection: Connection, tenant_id: TenantId, device_id: DeviceId, since: datetime) -> int:
    """How many certificates the device was issued since a time."""
    number: int = await connection.fetchval(
        "SELECT count(*) FROM certificate WHERE tenant_id = $1 AND device_id = $2 AND issued_at > $3",
        tenant_id,
        device_id,
        since,
    )
    return number


# -- ends --------------------------------------------------------------------------------------------------------------


async def end(
    connection: Connection, tenant_id: TenantId, credential_id: CredentialId, now: datetime, reason: str
) -> None:
    """Revoke the certificate of a credential that is revoked, if the credential has one of ours."""
    await connection.execute(
        """
        UPDATE certificate SET revoked_at = $3, revocation_reason = $4
        WHERE tenant_id = $1 AND credential_id = $2 AND revoked_at IS NULL
        """,
        tenant_id,
        credential_id,
        now,
        reason,
    )


async def end_at(
    connection: Connection, tenant_id: TenantId, credential_id: CredentialId, ends_at: datetime, reason: str
) -> None:
    """Say when the certificate of a superseded credential ends, where that is before its own end."""
    await connection.execute(
        """
        UPDATE certificate SET ends_at = $3, revocation_reason = $4
        WHERE tenant_id = $1 AND credential_id = $2 AND revoked_at IS NULL AND not_after > $3
        """,
        tenant_id,
        credential_id,
        ends_at,
        reason,
    )


async def end_of_device(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId, now: datetime, reason: str
) -> None:
    """Revoke every certificate of a device."""
    await connection.execute(
        """
        UPDATE certificate SET revoked_at = $3, revocation_reason = $4
        WHERE tenant_id = $1 AND device_id = $2 AND revoked_at IS NULL AND status = 'issued'
        """,
        tenant_id,
        device_id,
        now,
        reason,
    )


# -- revocation lists --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ListState:
    """Of an authority's list: its number and dates (0 and None before the first), and whether something is missing."""

    number: int
    this_update: datetime | None
    next_update: datetime | None
    lacks: bool


_TO_LIST = """
    status = 'issued' AND listed_in IS NULL AND (revoked_at IS NOT NULL OR ends_at IS NOT NULL)
    AND authority_id = $1 AND not_after > $2 AND (revoked_at IS NOT NULL OR ends_at <= $2)
"""


async def list_state(connection: Connection, authority_id: UUID, now: datetime, *, hold: bool = False) -> ListState:
    """The state of an authority's list. `hold` keeps the list for this transaction: nobody else takes a number."""
    if hold:
        await connection.execute(
            """
            INSERT INTO revocation_list (authority_id, number, der, this_update, next_update)
            VALUES ($1, 0, '', '-infinity', '-infinity')
            ON CONFLICT (authority_id) DO NOTHING
            """,
            authority_id,
        )
        await connection.execute("SELECT FROM revocation_list WHERE authority_id = $1 FOR UPDATE", authority_id)
    row = await connection.fetchrow(
        f"""
        SELECT l.number, nullif(l.this_update, '-infinity') AS this_update,
               nullif(l.next_update, '-infinity') AS next_update,
               EXISTS (SELECT FROM certificate WHERE {_TO_LIST}) AS lacks
        FROM (VALUES (1)) AS one LEFT JOIN revocation_list l ON l.authority_id = $1
        """,  # noqa: S608  # the condition is a constant of this file
        authority_id,
        now,
    )
    assert row is not None
    return ListState(row["number"] or 0, row["this_update"], row["next_update"], row["lacks"])


async def take_into_list(connection: Connection, authority_id: UUID, now: datetime, number: int) -> None:
    """Note for every ended certificate that no list has named yet that the list of this number does.

    One that somebody changes this very moment is left to the next list, which is then due at once: the list's signing
    takes a while, and whoever ends several certificates holds them in an order of his own.
    """
    await connection.execute(
        f"""
        UPDATE certificate SET listed_in = $3
        WHERE {_TO_LIST} AND serial = ANY (ARRAY (
            SELECT serial FROM certificate WHERE {_TO_LIST} FOR NO KEY UPDATE SKIP LOCKED))
        """,  # noqa: S608  # a constant of this file
        authority_id,
        now,
        number,
    )


async def take_out_of_lists(connection: Connection, authority_id: UUID, now: datetime) -> None:
    """Note for certificates that a list has named before their end that none has."""
    await connection.execute(
        """
        UPDATE certificate SET listed_in = NULL
        WHERE authority_id = $1 AND listed_in IS NOT NULL AND revoked_at IS NULL AND ends_at > $2
        """,
        authority_id,
        now,
    )


async def listed(connection: Connection, authority_id: UUID, valid_after: datetime | None) -> list[EndedCertificate]:
    """What an authority's list has to name: all that were taken into one and had not ended by their own date by then.

    `valid_after` is when the list before this one was made (None: there was none): a certificate leaves only after a
    list that was made after its own end has named it (RFC 5280 §3.3).
    """
    rows = await connection.fetch(
        """
        SELECT serial, least(revoked_at, ends_at) AS ended_at, coalesce(revocation_reason, '') AS reason
        FROM certificate
        WHERE authority_id = $1 AND listed_in IS NOT NULL AND ($2::timestamptz IS NULL OR not_after >= $2)
        """,
        authority_id,
        valid_after,
    )
    return [EndedCertificate(**dict(row)) for row in rows]


async def put_list(
    connection: Connection, authority_id: UUID, number: int, der: bytes, this_update: datetime, next_update: datetime
) -> None:
    """Keep a new list. The caller holds it (`list_state`)."""
    await connection.execute(
        """
        UPDATE revocation_list SET number = $2, der = $3, this_update = $4, next_update = $5 WHERE authority_id = $1
        """,
        authority_id,
        number,
        der,
        this_update,
        next_update,
    )


async def latest_list(connection: Connection, authority_id: UUID) -> tuple[int, bytes, datetime, datetime] | None:
    """Number, DER, and both dates of an authority's latest list."""
    row: Record | None = await connection.fetchrow(
        "SELECT number, der, this_update, next_update FROM revocation_list WHERE authority_id = $1 AND number > 0",
        authority_id,
    )
    return (row["number"], row["der"], row["this_update"], row["next_update"]) if row else None
