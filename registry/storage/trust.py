"""What the nodes of one database share in trust: the ring's canary, issuer keys of operator tokens, and authorities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from asyncpg import Record

from registry.storage.database import Connection

FIRST_START_LOCK = 0x6761_7465_7472_7573
"""The advisory lock under which the first node makes what all share: the ASCII of "gatetrus"."""


async def lock_first_start(connection: Connection) -> None:
    """Wait until no other node is making the shared keys; held to the end of the transaction."""
    await connection.execute("SELECT pg_advisory_xact_lock($1)", FIRST_START_LOCK)


async def canary(connection: Connection) -> bytes | None:
    """The sealed value that every ring of this database must open."""
    sealed: bytes | None = await connection.fetchval("SELECT sealed FROM key_ring_canary")
    return sealed


async def put_canary(connection: Connection, sealed: bytes) -> None:
    """Keep the sealed value; replaces the one of before."""
    await connection.execute(
        """
        INSERT INTO key_ring_canary (sealed) VALUES ($1)
        ON CONFLICT (only_row) DO UPDATE SET sealed = EXCLUDED.sealed
        """,
        sealed,
    )


async def issuer_keys(connection: Connection) -> list[Record]:
    """Keys of operator tokens that are not retired, newest first: kid, public_key, sealed_key."""
    rows: list[Record] = await connection.fetch(
        """
        SELECT kid, public_key, sealed_key FROM issuer_key
        WHERE retired_at IS NULL
        ORDER BY created_at DESC, kid
        """
    )
    return rows


async def insert_issuer_key(connection: Connection, kid: str, public_key: bytes, sealed_key: bytes) -> None:
    """Add a key of operator tokens."""
    await connection.execute(
        "INSERT INTO issuer_key (kid, public_key, sealed_key) VALUES ($1, $2, $3)", kid, public_key, sealed_key
    )


async def authorities(connection: Connection) -> list[Record]:
    """The root and all issuing authorities: authority_id, kind, certificate (DER), sealed_key, active."""
    rows: list[Record] = await connection.fetch(
        "SELECT authority_id, kind, certificate, sealed_key, active FROM authority ORDER BY created_at, authority_id"
    )
    return rows


async def insert_authority(
    connection: Connection,
    authority_id: UUID,
    kind: str,
    issuer_id: UUID | None,
    certificate: bytes,
    sealed_key: bytes,
    active: bool,
) -> None:
    """Add an authority. `kind` is `root` or `issuing`; one of each kind may be active."""
    await connection.execute(
        """
        INSERT INTO authority (authority_id, kind, issuer_id, certificate, sealed_key, active)
        VALUES ($1, $2, $3, $4, $5, $6)
        """,
        authority_id,
        kind,
        issuer_id,
        certificate,
        sealed_key,
        active,
    )


async def authority_marks(connection: Connection) -> frozenset[tuple[UUID, bool]]:
    """Which authorities there are and which are active: another answer than before means that keys must be read."""
    rows = await connection.fetch("SELECT authority_id, active FROM authority")
    return frozenset((row["authority_id"], row["active"]) for row in rows)


async def retire_issuing(connection: Connection) -> None:
    """Make no issuing authority the active one; another takes its place in the same transaction."""
    await connection.execute("UPDATE authority SET active = false WHERE kind = 'issuing' AND active")


# -- sealed values -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SealedValue:
    """A sealed column of one row: `key` finds the row, `owner` and `version` are what the seal is bound to besides."""

    key: str
    owner: str
    version: int
    sealed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SealedColumn:
    """Where values rest sealed. The statements are constants: `key` is text in all of them. `hold` locks what is locked
    before the rows that `read` will find, with the same arguments."""

    name: str
    read: str
    write: str
    count: str
    hold: str | None = None


SEALED_COLUMNS = (
    SealedColumn(
        "psk",
        """
        SELECT credential_id::text AS key, tenant_id::text AS owner, version, sealed_key AS sealed FROM credential
        WHERE kind = 'psk' AND credential_id > coalesce($1::text::uuid, '00000000-0000-0000-0000-000000000000')
          AND substr(sealed_key, 1, length($2::bytea)) <> $2
        ORDER BY credential_id
        LIMIT $3
        FOR NO KEY UPDATE
        """,
        "UPDATE credential SET sealed_key = $2 WHERE credential_id = $1::text::uuid",
        "SELECT count(*) FROM credential WHERE kind = 'psk' AND substr(sealed_key, 1, length($1::bytea)) = $1",
        """
        SELECT FROM device WHERE device_id = ANY (ARRAY (
            SELECT device_id FROM credential
            WHERE kind = 'psk' AND credential_id > coalesce($1::text::uuid, '00000000-0000-0000-0000-000000000000')
              AND substr(sealed_key, 1, length($2::bytea)) <> $2
            ORDER BY credential_id
            LIMIT $3))
        ORDER BY device_id
        FOR NO KEY UPDATE
        """,
    ),
    SealedColumn(
        "claim_psk",
        """
        SELECT template_id AS key, tenant_id::text AS owner, 1 AS version, sealed_claim_psk AS sealed
        FROM provisioning_template
        WHERE template_id > coalesce($1::text, '') AND substr(sealed_claim_psk, 1, length($2::bytea)) <> $2
        ORDER BY template_id
        LIMIT $3
        FOR NO KEY UPDATE
        """,
        "UPDATE provisioning_template SET sealed_claim_psk = $2 WHERE template_id = $1",
        "SELECT count(*) FROM provisioning_template WHERE substr(sealed_claim_psk, 1, length($1::bytea)) = $1",
    ),
    SealedColumn(
        "issuer_key",
        """
        SELECT kid AS key, 'system' AS owner, 1 AS version, sealed_key AS sealed FROM issuer_key
        WHERE kid > coalesce($1::text, '') AND substr(sealed_key, 1, length($2::bytea)) <> $2
        ORDER BY kid
        LIMIT $3
        FOR NO KEY UPDATE
        """,
        "UPDATE issuer_key SET sealed_key = $2 WHERE kid = $1",
        "SELECT count(*) FROM issuer_key WHERE substr(sealed_key, 1, length($1::bytea)) = $1",
    ),
    SealedColumn(
        "authority",
        """
        SELECT authority_id::text AS key, 'system' AS owner, 1 AS version, sealed_key AS sealed FROM authority
        WHERE authority_id > coalesce($1::text::uuid, '00000000-0000-0000-0000-000000000000')
          AND substr(sealed_key, 1, length($2::bytea)) <> $2
        ORDER BY authority_id
        LIMIT $3
        FOR NO KEY UPDATE
        """,
        "UPDATE authority SET sealed_key = $2 WHERE authority_id = $1::text::uuid",
        "SELECT count(*) FROM authority WHERE substr(sealed_key, 1, length($1::bytea)) = $1",
    ),
    SealedColumn(
        "canary",
        """
        SELECT 'key-ring' AS key, 'system' AS owner, 1 AS version, sealed FROM key_ring_canary
        WHERE $1::text IS NULL AND substr(sealed, 1, length($2::bytea)) <> $2
        LIMIT $3
        FOR NO KEY UPDATE
        """,
        "UPDATE key_ring_canary SET sealed = $2 WHERE $1::text = 'key-ring'",
        "SELECT count(*) FROM key_ring_canary WHERE substr(sealed, 1, length($1::bytea)) = $1",
    ),
)
"""Every column that holds sealed values, the canary last: from then on a node without the new key does not start."""


async def not_sealed_with(
    connection: Connection, column: SealedColumn, prefix: bytes, after: str | None, limit: int
) -> list[SealedValue]:
    """The next values whose beginning is not `prefix` (which names a key of the ring), their rows locked; those of
    credentials behind their devices', as everybody locks them who changes a device's credentials."""
    if column.hold is not None:
        await connection.execute(column.hold, after, prefix, limit)
    rows = await connection.fetch(column.read, after, prefix, limit)
    return [SealedValue(row["key"], row["owner"], row["version"], row["sealed"]) for row in rows]


async def put_sealed(connection: Connection, column: SealedColumn, values: Sequence[SealedValue]) -> None:
    """Write values back, sealed anew."""
    await connection.executemany(column.write, [(each.key, each.sealed) for each in values])


async def count_sealed_with(connection: Connection, column: SealedColumn, prefix: bytes) -> int:
    """How many values of a column begin with `prefix`."""
    number: int = await connection.fetchval(column.count, prefix)
    return number
