"""The credential table. Whoever changes a device's credentials holds the device's row first (storage/devices.lock)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from asyncpg import Record, UniqueViolationError

from registry.errors import AlreadyExists
from registry.events import EventKind, NewEvent
from registry.model import Actor, Credential, CredentialId, CredentialKind, DeviceId, Fingerprint, Json, TenantId
from registry.storage import audit, certificates, events
from registry.storage.database import Connection

_COLUMNS = """
    tenant_id, device_id, credential_id, kind, lookup, label, detail, not_before, expires_at, superseded_by,
    retire_on_use, revoked_at, revoked_reason, created_at, first_used_at
"""


@dataclass(frozen=True, slots=True)
class NewCredential:
    """A row to be written. `lookup` is what evidence is found by; `sealed_key` is a PSK's."""

    tenant_id: TenantId
    device_id: DeviceId
    credential_id: CredentialId
    kind: CredentialKind
    lookup: bytes = field(repr=False)
    created_at: datetime
    sealed_key: bytes | None = field(default=None, repr=False)
    version: int = 1
    label: str = ""
    detail: Mapping[str, Json] = field(default_factory=dict)
    not_before: datetime | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class UnusedSecret:
    """What a repeated claim is compared with: a living credential that was never used."""

    credential_id: CredentialId
    kind: CredentialKind
    lookup: bytes = field(repr=False)
    sealed_key: bytes | None = field(repr=False)
    version: int
    expires_at: datetime | None


async def insert(connection: Connection, new: NewCredential) -> None:
    """Write a credential. Raises AlreadyExists when a living one is found by the same evidence."""
    try:
        await connection.execute(
            """
            INSERT INTO credential (tenant_id, device_id, credential_id, kind, lookup, sealed_key, version, label,
                                    detail, not_before, expires_at, created_at)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
            """,
            new.tenant_id,
            new.device_id,
            new.credential_id,
            new.kind.value,
            new.lookup,
            new.sealed_key,
            new.version,
            new.label,
            dict(new.detail),
            new.not_before,
            new.expires_at,
            new.created_at,
        )
    except UniqueViolationError as error:
        if error.constraint_name != "credential_living_lookup":
            raise
        what = "this PSK identity" if new.kind is CredentialKind.PSK else "this certificate"
        raise AlreadyExists(f"{what} is already in use") from error


async def get(connection: Connection, tenant_id: TenantId, credential_id: CredentialId) -> Credential | None:
    """The tenant's credential of this id."""
    row = await connection.fetchrow(
        f"SELECT {_COLUMNS} FROM credential WHERE tenant_id = $1 AND credential_id = $2",  # noqa: S608  # a constant
        tenant_id,
        credential_id,
    )
    return _credential(row) if row else None


async def by_fingerprint(connection: Connection, tenant_id: TenantId, fingerprint: Fingerprint) -> Credential | None:
    """The tenant's certificate with this fingerprint: the living one, else the one that was revoked last."""
    row = await connection.fetchrow(
        f"""
        SELECT {_COLUMNS} FROM credential
        WHERE tenant_id = $1 AND kind = 'x509' AND lookup = $2
        ORDER BY revoked_at IS NOT NULL, revoked_at DESC
        LIMIT 1
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        bytes.fromhex(fingerprint),
    )
    return _credential(row) if row else None


async def living(
    connection: Connection, tenant_id: TenantId, device_ids: list[DeviceId], now: datetime
) -> list[Credential]:
    """Neither revoked nor expired credentials of these devices, oldest first."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM credential
        WHERE tenant_id = $1 AND device_id = ANY ($2::uuid[]) AND revoked_at IS NULL
          AND (expires_at IS NULL OR expires_at > $3)
        ORDER BY created_at, credential_id
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        device_ids,
        now,
    )
    return [_credential(row) for row in rows]


async def usable(
    connection: Connection, tenant_id: TenantId, device_ids: list[DeviceId], now: datetime
) -> list[Credential]:
    """The living credentials of these devices, and those that are good for nothing but a successor: certificates of
    ours that have ended by their own date. For how long that is nodes are told by their configuration, which may
    change; who revokes means all of them. Oldest first."""
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM credential c
        WHERE tenant_id = $1 AND device_id = ANY ($2::uuid[]) AND revoked_at IS NULL
          AND (expires_at IS NULL OR expires_at > $3 OR EXISTS (
               SELECT FROM certificate own
               WHERE own.credential_id = c.credential_id AND own.not_after <= c.expires_at))
        ORDER BY created_at, credential_id
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        device_ids,
        now,
    )
    return [_credential(row) for row in rows]


async def unused(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId, now: datetime, limit: int
) -> list[UnusedSecret]:
    """Living API keys and PSKs of a device that were never used, oldest first."""
    rows = await connection.fetch(
        """
        SELECT credential_id, kind, lookup, sealed_key, version, expires_at FROM credential
        WHERE tenant_id = $1 AND device_id = $2 AND revoked_at IS NULL AND first_used_at IS NULL
          AND kind IN ('api_key', 'psk') AND (expires_at IS NULL OR expires_at > $3)
        ORDER BY created_at, credential_id
        LIMIT $4
        """,
        tenant_id,
        device_id,
        now,
        limit,
    )
    return [
        UnusedSecret(
            credential_id=row["credential_id"],
            kind=CredentialKind(row["kind"]),
            lookup=row["lookup"],
            sealed_key=row["sealed_key"],
            version=row["version"],
            expires_at=row["expires_at"],
        )
        for row in rows
    ]


async def read(
    connection: Connection,
    tenant_id: TenantId,
    device_id: DeviceId | None,
    kind: CredentialKind | None,
    after: tuple[datetime, UUID] | None,
    limit: int,
) -> list[Credential]:
    """Credentials behind (created_at, credential_id), in that order; of one device, or of all."""
    # Only what is asked for stands in the statement, so that the planner sees what it may use an index for.
    where, arguments = "tenant_id = $1", list[object]([tenant_id, limit])
    if device_id is not None:
        arguments.append(device_id)
        where += f" AND device_id = ${len(arguments)}"
    if kind is not None:
        arguments.append(kind.value)
        where += f" AND kind = ${len(arguments)}"
    if after is not None:
        arguments += after
        where += f" AND (created_at, credential_id) > (${len(arguments) - 1}, ${len(arguments)})"
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM credential
        WHERE {where}
        ORDER BY created_at, credential_id
        LIMIT $2
        """,  # noqa: S608  # constants of this file
        *arguments,
    )
    return [_credential(row) for row in rows]


async def supersede(
    connection: Connection,
    tenant_id: TenantId,
    credential_id: CredentialId,
    successor: CredentialId,
    expires_at: datetime | None,
    retire_on_use: bool,
) -> None:
    """Give a credential an end and say what takes its place; a certificate of ours that ends early will be listed."""
    await connection.execute(
        """
        UPDATE credential SET superseded_by = $3, expires_at = $4, retire_on_use = $5
        WHERE tenant_id = $1 AND credential_id = $2
        """,
        tenant_id,
        credential_id,
        successor,
        expires_at,
        retire_on_use,
    )
    if expires_at is not None:
        await certificates.end_at(connection, tenant_id, credential_id, expires_at, "superseded")


async def revoke(
    connection: Connection, credential: Credential, now: datetime, reason: str, actor: Actor
) -> int | None:
    """End a credential, with its event and its audit row; the event's number, or None when it had ended before."""
    done = await connection.fetchval(
        """
        UPDATE credential SET revoked_at = $3, revoked_reason = $4
        WHERE tenant_id = $1 AND credential_id = $2 AND revoked_at IS NULL
        RETURNING true
        """,
        credential.tenant_id,
        credential.credential_id,
        now,
        reason,
    )
    if done is None:
        return None
    if credential.kind is CredentialKind.X509:
        await certificates.end(connection, credential.tenant_id, credential.credential_id, now, reason)
    await audit.insert(
        connection,
        credential.tenant_id,
        actor,
        "revoke",
        "credential",
        str(credential.credential_id),
        {"device_id": str(credential.device_id), "kind": credential.kind.value, "reason": reason},
    )
    return await events.insert(
        connection,
        NewEvent(
            EventKind.CREDENTIAL_REVOKED,
            credential.tenant_id,
            actor,
            device_id=credential.device_id,
            credential_id=credential.credential_id,
            data={"kind": credential.kind.value, "reason": reason},
        ),
    )


async def mark_first_use(
    connection: Connection,
    tenant_id: TenantId,
    device_id: DeviceId,
    credential_id: CredentialId,
    now: datetime,
    correlation_id: str,
) -> None:
    """An admitted contact: note the credential's first use and bring the device to life. Call it in a transaction, when
    the credential was never used or the device is pending, registered or offline; again does no harm.

    A first use ends the predecessors that were to retire on it (`credential.revoked` each, which closes their
    sessions). The device becomes `active` unless an operator holds it in maintenance or inactive; its very first
    contact is the event `device.activated`. A credential that was revoked meanwhile changes nothing.
    """
    actor = Actor(f"device:{device_id}", correlation_id)
    seen = await connection.fetchrow(
        "SELECT activated_at FROM device WHERE tenant_id = $1 AND device_id = $2 FOR NO KEY UPDATE",
        tenant_id,
        device_id,
    )
    if seen is None:
        return
    used = await connection.fetchrow(
        f"""
        SELECT {_COLUMNS} FROM credential
        WHERE tenant_id = $1 AND credential_id = $2 AND device_id = $3 AND revoked_at IS NULL
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        credential_id,
        device_id,
    )
    if used is None:
        return
    if used["first_used_at"] is None:
        await connection.execute(
            "UPDATE credential SET first_used_at = $3 WHERE tenant_id = $1 AND credential_id = $2",
            tenant_id,
            credential_id,
            now,
        )
        for predecessor in await _to_retire(connection, tenant_id, credential_id):
            await revoke(connection, predecessor, now, "retired: its successor was used", actor)
    await connection.execute(
        """
        UPDATE device
        SET status = CASE WHEN status IN ('pending', 'registered', 'offline') THEN 'active' ELSE status END,
            activated_at = coalesce(activated_at, $3), last_seen_at = $3
        WHERE tenant_id = $1 AND device_id = $2
        """,
        tenant_id,
        device_id,
        now,
    )
    if seen["activated_at"] is None:
        await events.insert(
            connection,
            NewEvent(EventKind.DEVICE_ACTIVATED, tenant_id, actor, device_id=device_id, credential_id=credential_id),
        )


async def _to_retire(connection: Connection, tenant_id: TenantId, successor: CredentialId) -> list[Credential]:
    rows = await connection.fetch(
        f"""
        SELECT {_COLUMNS} FROM credential
        WHERE superseded_by = $2 AND tenant_id = $1 AND retire_on_use AND revoked_at IS NULL
        ORDER BY created_at, credential_id
        """,  # noqa: S608  # the columns are a constant of this file
        tenant_id,
        successor,
    )
    return [_credential(row) for row in rows]


def _credential(row: Record) -> Credential:
    kind = CredentialKind(row["kind"])
    lookup: bytes = row["lookup"]
    return Credential(
        tenant_id=row["tenant_id"],
        device_id=row["device_id"],
        credential_id=row["credential_id"],
        kind=kind,
        label=row["label"],
        detail=row["detail"],
        identity=lookup.decode("ascii", "replace") if kind is CredentialKind.PSK else None,
        fingerprint=Fingerprint(lookup.hex()) if kind is CredentialKind.X509 else None,
        not_before=row["not_before"],
        expires_at=row["expires_at"],
        superseded_by=row["superseded_by"],
        retire_on_use=row["retire_on_use"],
        revoked_at=row["revoked_at"],
        revoked_reason=row["revoked_reason"],
        created_at=row["created_at"],
        first_used_at=row["first_used_at"],
    )
