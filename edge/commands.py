"""What the commands do, below their names and options (cli.py): over the local database, beside a running server.

Theory. A command opens the same services as a server, for a moment (wiring.open_registry): it attaches to the server's
embedded PostgreSQL, starts it for itself when nobody runs it, or uses the configured one. It is no node. What it
revokes is committed first; running nodes hear of it through the event table and close the sessions, and the receipt
waits for their reports. If the command dies in between, the revocation stands and only the receipt is lost.

Whoever may read the data directory (or knows the DSN and holds the key ring) is an operator of everything: there is no
token and no tenant to belong to. Changes are audited as `operator:cli:<unix user>`.

Every function here takes a complete configuration and answers nothing; what it has to say goes to standard output
through terminal.py. Failures are exceptions; cli.py turns them into one line.
"""

from __future__ import annotations

import os
import pwd
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import msgspec

from certs.chains import bundle, describe_certificate
from edge.config import Config
from edge.postgres import attach_or_start
from edge.terminal import Column, plain, show_fields, show_json, show_table, show_text
from edge.wiring import Core, migrate_database, open_registry
from registry.core import Registry
from registry.devices import DeviceFilter
from registry.errors import InvalidArgument, NotFound
from registry.model import (
    Actor,
    Credential,
    CredentialId,
    Device,
    DeviceId,
    DeviceStatus,
    Json,
    Receipt,
    Tenant,
    TenantId,
)
from registry.operators import mint
from registry.paging import MAX_LIMIT, Page
from registry.permissions import Permission, Role
from registry.sealing import KeyRing, KeyRingError, load_or_create
from registry.trust import drop_key, roll_over, rotate_key_ring, stage_key


@dataclass(frozen=True, slots=True)
class DeviceQuery:
    """Which devices to list; without a tenant, of all."""

    tenant: str | None = None
    status: DeviceStatus | None = None
    group: str | None = None
    tag: str | None = None
    profile_id: str | None = None
    site_id: str | None = None
    gateway_id: DeviceId | None = None
    q: str | None = None
    limit: int = 100


def cli_actor() -> Actor:
    """The operator at this terminal, for the audit."""
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        name = str(os.geteuid())
    return Actor(f"operator:cli:{name}", uuid4().hex)


def parse_role(text: str) -> Role:
    """Raises InvalidArgument, which names the roles there are."""
    return Role.parse(text)


def parse_permissions(texts: Iterable[str]) -> frozenset[Permission]:
    """Each word may hold several, separated by commas. Raises InvalidArgument, which names those there are."""
    words = (word.strip() for text in texts for word in text.split(","))
    return frozenset(Permission.parse(word) for word in words if word)


def parse_status(text: str) -> DeviceStatus:
    """Raises InvalidArgument, which names those there are."""
    try:
        return DeviceStatus(text)
    except ValueError:
        known = ", ".join(each.value for each in DeviceStatus)
        raise InvalidArgument(f"unknown status {plain(text)!r}; known are: {known}") from None


def parse_device_id(text: str) -> DeviceId:
    """Raises InvalidArgument."""
    return DeviceId(_uuid(text))


def parse_credential_id(text: str) -> CredentialId:
    """Raises InvalidArgument."""
    return CredentialId(_uuid(text))


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidArgument(f"{text[:64]!a} is no id; a UUID is expected") from None


# -- the database ------------------------------------------------------------------------------------------------------


async def migrate_schema(config: Config, *, as_json: bool) -> None:
    """Bring the schema up to date; say which files were applied."""
    if config.database.dsn is not None:
        applied = await migrate_database(config.database.dsn.reveal())
    else:
        async with attach_or_start(config.data_dir, owner="command", environ=os.environ) as handle:
            applied = await migrate_database(handle.dsn)
    if as_json:
        show_json({"applied": applied})
        return
    show_text("\n".join(f"applied {name}" for name in applied) or "the schema is up to date")


# -- tenants and tokens ------------------------------------------------------------------------------------------------


async def create_tenant(config: Config, name: str, slug: str | None) -> None:
    """Make a tenant; always JSON, so that scripts need no option."""
    async with _core(config) as core:
        tenant = await core.registry.tenants.create(name, slug, cli_actor())
    show_json({"tenant_id": str(tenant.tenant_id), "slug": tenant.slug})


async def list_tenants(config: Config, *, as_json: bool) -> None:
    """All tenants, oldest first."""
    async with _core(config) as core:
        tenants = [tenant async for tenant in _every_tenant(core.registry)]
    if as_json:
        show_json({"tenants": [document(tenant) for tenant in tenants]})
        return
    columns = (Column("TENANT ID", whole=True), Column("SLUG", whole=True), Column("NAME"), Column("CREATED"))
    show_table(columns, ((t.tenant_id, t.slug, t.name, shown_time(t.created_at)) for t in tenants))


async def mint_token(
    config: Config,
    *,
    tenant: str,
    role: Role,
    permissions: frozenset[Permission],
    ttl: timedelta,
    subject: str | None,
    as_json: bool,
) -> None:
    """Sign an operator's token for a tenant that exists; without a subject, for `cli:<unix user>`."""
    actor = cli_actor()
    async with _core(config) as core:
        found = await _find_tenant(core.registry, tenant)
        token = sign_token(config, core, found, role, permissions, ttl, subject or actor.name.removeprefix("operator:"))
    if as_json:
        show_json({"token": token, "tenant_id": str(found.tenant_id), "role": role.value})
        return
    show_text(token)


def sign_token(
    config: Config,
    core: Core,
    tenant: Tenant,
    role: Role,
    permissions: frozenset[Permission],
    ttl: timedelta,
    subject: str,
) -> str:
    """An operator's token by the newest issuer key. Raises InvalidArgument (ttl, subject)."""
    longest = timedelta(seconds=config.security.operator_token_max_seconds)
    if ttl > longest:
        raise InvalidArgument(
            f"--ttl is {ttl.total_seconds():g} s; at most {longest.total_seconds():g} s are allowed "
            "(security.operator_token_max_seconds)"
        )
    key = core.trust.issuer_keys[0]
    return mint(
        key,
        key.kid,
        subject=subject,
        tenant=str(tenant.tenant_id),
        role=role,
        permissions=permissions,
        now=core.registry.clock(),
        ttl=ttl,
        token_id=uuid4().hex,
        max_ttl=longest,
    )


# -- devices -----------------------------------------------------------------------------------------------------------


async def list_devices(config: Config, query: DeviceQuery, *, as_json: bool) -> None:
    """Devices of one tenant, or of all, up to `query.limit` of them."""
    wanted = _filter(query)
    async with _core(config) as core:
        registry = core.registry
        tenants = [await _find_tenant(registry, query.tenant)] if query.tenant else None
        if tenants is None:
            tenants = [tenant async for tenant in _every_tenant(registry)]
        found: list[tuple[Tenant, Device]] = []
        for tenant in tenants:
            found += [(tenant, device) async for device in _devices(registry, tenant, wanted, query.limit + 1)]
            if len(found) > query.limit:
                break
    more = len(found) > query.limit
    found = found[: query.limit]
    if as_json:
        show_json({"devices": [document(device) for _, device in found], "more": more})
        return
    several = len({tenant.tenant_id for tenant, _ in found}) > 1
    columns = (
        Column("DEVICE ID", whole=True),
        *((Column("TENANT"),) if several else ()),
        Column("NAME"),
        Column("HARDWARE ID"),
        Column("STATUS", whole=True),
        Column("LAST SEEN"),
    )
    show_table(
        columns,
        (
            (
                device.device_id,
                *((tenant.slug,) if several else ()),
                device.name,
                device.hardware_id,
                device.status.value,
                shown_time(device.last_seen_at),
            )
            for tenant, device in found
        ),
    )
    if more:
        show_text(f"(the first {query.limit}; --limit shows more, filters show fewer)")


async def show_device(config: Config, device_id: DeviceId, tenant: str | None, *, as_json: bool) -> None:
    """One device with its credentials, which are shown without their secrets."""
    async with _core(config) as core:
        device = await _find_device(core.registry, device_id, tenant)
        credentials = [each async for each in _credentials(core.registry, device)]
        renew_after = await core.registry.certificates.renew_after(device.tenant_id, device.device_id)
        now = core.registry.clock()
    described = {**document(device), "renew_after": shown_time(renew_after)}
    if as_json:
        show_json({**described, "credentials": [_credential_document(each) for each in credentials]})
        return
    show_fields(described.items())
    show_text("")
    columns = (
        Column("CREDENTIAL ID", whole=True),
        Column("TYPE", whole=True),
        Column("STATE", whole=True),
        Column("EXPIRES"),
        Column("FIRST USED"),
        Column("LABEL"),
    )
    show_table(
        columns,
        (
            (
                each.credential_id,
                each.kind.value,
                _state(each, now),
                shown_time(each.expires_at),
                shown_time(each.first_used_at),
                each.label,
            )
            for each in credentials
        ),
    )


async def revoke_device(
    config: Config, device_id: DeviceId, credential_id: CredentialId | None, tenant: str | None, *, as_json: bool
) -> None:
    """End one credential of a device, or all that it can do anything with, and say which sessions were closed."""
    actor = cli_actor()
    async with _core(config) as core:
        device = await _find_device(core.registry, device_id, tenant)
        credentials = core.registry.credentials
        receipts: list[Receipt] = []
        if credential_id is not None:
            receipts.append(await credentials.revoke(device.tenant_id, device.device_id, credential_id, actor))
        else:  # again, until none is left: the device may have renewed one of them before its turn came
            while chosen := await credentials.usable(device.tenant_id, device.device_id):
                for each in chosen:
                    receipts.append(await credentials.revoke(device.tenant_id, device.device_id, each, actor))
    if as_json:
        show_json(receipt_document(device.device_id, receipts))
        return
    _show_receipts(device, receipts)


def receipt_document(device_id: DeviceId, receipts: Sequence[Receipt]) -> Json:
    """The receipt of CONTRACT §2 over all that was revoked. `credential_id` is None unless it was exactly one."""
    revoked_at = max((each.revoked_at for each in receipts), default=None)
    return {
        "device_id": str(device_id),
        "credential_id": document(receipts[0])["credential_id"] if len(receipts) == 1 else None,
        "credential_ids": [document(each)["credential_id"] for each in receipts],
        "revoked_at": shown_time(revoked_at),
        "sessions": [document(session) for each in receipts for session in each.sessions],
        "remaining": sum(each.remaining for each in receipts),
    }


def _show_receipts(device: Device, receipts: Sequence[Receipt]) -> None:
    if not receipts:
        show_text(f"nothing to revoke: {device.device_id} ({plain(device.name)}) has no credential that is good")
        return
    for receipt in receipts:
        show_text(f"revoked {receipt.credential_id} at {shown_time(receipt.revoked_at)}")
    sessions = [session for receipt in receipts for session in receipt.sessions]
    if sessions:
        columns = (Column("SESSION ID", whole=True), Column("TRANSPORT"), Column("NODE"), Column("CLOSED AFTER MS"))
        show_table(
            columns, ((s.session_id, s.transport.value, s.node_id, f"{s.closed_after_ms:.1f}") for s in sessions)
        )
    show_text(f"sessions closed: {len(sessions)}, remaining: {sum(receipt.remaining for receipt in receipts)}")


# -- keys --------------------------------------------------------------------------------------------------------------


async def show_authorities(config: Config, *, as_json: bool) -> None:
    """The built-in CA's chain, issuing authority first: what devices need to trust this server and each other."""
    async with _core(config) as core:
        chain = core.trust.authorities.chain
    described = [describe_certificate(der) for der in chain]
    if as_json:
        certificates = [
            {
                "subject": each.subject,
                "issuer": each.issuer,
                "serial": each.serial_hex,
                "not_before": shown_time(each.not_before),
                "not_after": shown_time(each.not_after),
                "sha256": each.fingerprint,
            }
            for each in described
        ]
        show_json({"ca_chain": bundle(chain).decode("ascii"), "certificates": certificates})
        return
    # Text before the boundary line is allowed in a PEM file (RFC 7468 §2), so this output can be saved as one.
    for der, each in zip(chain, described, strict=True):
        show_text(f"{plain(each.subject)}, until {each.not_after:%Y-%m-%d}, SHA-256 {each.fingerprint}")
        show_text(bundle((der,)).decode("ascii").strip())


async def roll_over_authority(config: Config, *, as_json: bool) -> None:
    """Make a new issuing authority; running nodes issue with it from now on, and certificates of before stay valid."""
    async with _core(config) as core:
        done = await roll_over(
            core.database, core.ring, clock=core.registry.clock, random=secrets.token_bytes, actor=cli_actor()
        )
        core.registry.feed.hint()
    if as_json:
        show_json({"active": done.active, "previous": done.previous, "not_after": shown_time(done.not_after)})
        return
    show_text(f"the issuing authority is now {done.active}, until {done.not_after:%Y-%m-%d}")
    show_text(f"certificates of the one before, {done.previous}, stay valid; clients that trust the root need nothing")


async def rotate_sealing_key(config: Config, key_id: str | None, *, as_json: bool) -> None:
    """Seal everything under another key: a staged one (`key_id`), or a new one. Raises KeyRingError."""
    path = config.security.key_ring
    async with _core(config) as core:
        _, done = await rotate_key_ring(core.database, core.ring, path, actor=cli_actor(), key_id=key_id)
        core.registry.feed.hint()
    if as_json:
        show_json({"path": str(path), "active": done.active, "resealed": done.resealed, "left": done.left})
        return
    show_text(f"{plain(done.active)} is the active key of {path}; {done.resealed} values were sealed again")
    if done.left:
        show_text(f"{done.left} values rest under older keys, because a node still seals under one: rotate again later")
    show_text("nodes with a key ring file of their own need the new file; older keys stay in it until they are dropped")


def stage_sealing_key(config: Config, key_id: str | None, *, as_json: bool) -> None:
    """Add a key that opens but does not seal yet, for several nodes with files of their own. Raises KeyRingError."""
    path = config.security.key_ring
    _key_ids(path)
    ring = load_or_create(path)
    staged = stage_key(ring, path, key_id)
    new = staged.key_ids[-1]
    if as_json:
        show_json({"path": str(path), "staged": new, "active": staged.active})
        return
    show_text(
        f"{plain(new)} is in {path}, not active: copy the file to every node, then rotate with --key {plain(new)}"
    )


async def drop_sealing_key(config: Config, key_id: str, *, as_json: bool) -> None:
    """Take a key out of the ring that nothing rests under. Raises KeyRingError."""
    path = config.security.key_ring
    async with _core(config) as core:
        reduced = await drop_key(core.database, path, key_id, actor=cli_actor())
        core.registry.feed.hint()
    if as_json:
        show_json({"path": str(path), "dropped": key_id, "key_ids": sorted(reduced.key_ids)})
        return
    show_text(f"{plain(key_id)} is no longer in {path}")


def show_key_ring(config: Config, *, as_json: bool) -> None:
    """The ids of the key-encryption keys; never a key. Raises KeyRingError."""
    path = config.security.key_ring
    active, key_ids = _key_ids(path)
    if as_json:
        show_json({"path": str(path), "active": active, "key_ids": key_ids})
        return
    show_text(f"{path}")
    for key_id in key_ids:
        show_text(f"{plain(key_id)}{'  (active)' if key_id == active else ''}")


def _key_ids(path: Path) -> tuple[str, list[str]]:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise KeyRingError(f"{path} does not exist yet; the first start makes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise KeyRingError(f"{path}: {error.strerror if isinstance(error, OSError) else 'not text'}") from None
    try:
        ring = KeyRing.from_json(text)
    except KeyRingError as error:
        raise KeyRingError(f"{path}: {error}") from None
    return ring.active, sorted(ring.key_ids)


# -- reading -----------------------------------------------------------------------------------------------------------


def _core(config: Config) -> AbstractAsyncContextManager[Core]:
    return open_registry(config, environ=os.environ)


async def _every_tenant(registry: Registry) -> AsyncIterator[Tenant]:
    cursor = None
    while True:
        listing = await registry.tenants.list(Page(MAX_LIMIT, cursor))
        for tenant in listing.items:
            yield tenant
        cursor = listing.next_cursor
        if cursor is None:
            return


async def _find_tenant(registry: Registry, claim: str) -> Tenant:
    try:
        return await registry.tenants.find(claim)
    except NotFound:
        raise NotFound(f"no tenant has the slug or id {claim[:64]!a} (gatehouse tenant list)") from None


async def _devices(registry: Registry, tenant: Tenant, wanted: DeviceFilter, most: int) -> AsyncIterator[Device]:
    cursor, left = None, most
    while left > 0:
        listing = await registry.devices.list(tenant.tenant_id, wanted, Page(min(left, MAX_LIMIT), cursor))
        for device in listing.items:
            yield device
        cursor, left = listing.next_cursor, left - len(listing.items)
        if cursor is None:
            return


async def _credentials(registry: Registry, device: Device) -> AsyncIterator[Credential]:
    cursor = None
    while True:
        listing = await registry.credentials.list(device.tenant_id, device.device_id, Page(MAX_LIMIT, cursor))
        for credential in listing.items:
            yield credential
        cursor = listing.next_cursor
        if cursor is None:
            return


async def _find_device(registry: Registry, device_id: DeviceId, tenant: str | None) -> Device:
    """The device of that id; without a tenant it is looked for in each, as ids are unique over all of them."""
    if tenant is not None:
        return await registry.devices.get((await _find_tenant(registry, tenant)).tenant_id, device_id)
    async for candidate in _every_tenant(registry):
        device = await _device_or_none(registry, candidate.tenant_id, device_id)
        if device is not None:
            return device
    raise NotFound(f"no device {device_id} in any tenant")


async def _device_or_none(registry: Registry, tenant_id: TenantId, device_id: DeviceId) -> Device | None:
    try:
        return await registry.devices.get(tenant_id, device_id)
    except NotFound:
        return None


def _filter(query: DeviceQuery) -> DeviceFilter:
    return DeviceFilter(
        status=query.status,
        group=query.group,
        tag=query.tag,
        profile_id=query.profile_id,
        site_id=query.site_id,
        gateway_id=query.gateway_id,
        q=query.q,
    )


# -- showing -----------------------------------------------------------------------------------------------------------


def document(value: object) -> Json:
    """A value of the core as JSON types, with the API's field names."""
    return msgspec.to_builtins(value)


def shown_time(at: datetime | None) -> str | None:
    """RFC 3339 in UTC, to the second."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if at is not None else None


def _credential_document(credential: Credential) -> Json:
    shown = document(credential)
    renamed = {("credential_type" if name == "kind" else name): value for name, value in shown.items()}
    return {name: value for name, value in renamed.items() if name != "tenant_id"}  # the device's line has it


def _state(credential: Credential, now: datetime) -> str:
    if credential.revoked_at is not None:
        return "revoked"
    if credential.expires_at is not None and credential.expires_at <= now:
        return "expired"
    return "retiring" if credential.superseded_by is not None else "living"
