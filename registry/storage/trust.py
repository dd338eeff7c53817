"""What the nodes of one database share in trust: the ring's canary, issuer keys of operator tokens, and authorities."""

from __future__ import annotations

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
        "INSERT INTO key_ring_canary (sealed) VALUES ($1) ON CONFLICT (only_row) DO UPDATE SET sealed = EXCLUDED.sealed",
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
