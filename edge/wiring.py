"""Putting the core together: the only place that names its concrete classes.

`build` connects the services over one database, ring and node id; it starts nothing. A server then starts the feed and
the node's loops (serve.py). A command (`open_registry`) uses the same services for a moment, beside a running server or
alone: it announces no node, follows nothing, and its revocations are carried out by the nodes that follow the events.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import asyncpg

from certs.issuing import DeviceProfile
from edge.config import Config
from edge.postgres import attach_or_start
from registry.certificates import Certificates, ForeignCertificates
from registry.children import Children
from registry.claim_psk import ClaimPsks
from registry.commands import CommandLimits, Commands
from registry.core import Registry
from registry.credentials import Credentials
from registry.device_config import DeviceConfigs
from registry.devices import Devices
from registry.enrolment import Enrolment
from registry.event_log import EventLog
from registry.feed import Feed
from registry.hardware_id import PatternCache
from registry.key_claim import KeyClaim
from registry.kick import Kick
from registry.model import NodeId
from registry.node import Node
from registry.observation import NOBODY, Observer
from registry.operators import InvalidKeySet, JwksKey, OperatorVerifier, parse_jwks
from registry.presence import Presence
from registry.profiles import Profiles
from registry.refusals import Refusals
from registry.registration_tokens import RegistrationTokens
from registry.resolver import Resolver
from registry.revocation import Teardown
from registry.revocation_lists import RevocationLists
from registry.sealing import KeyRing, load_or_create
from registry.sessions import SessionTable
from registry.storage.database import Database
from registry.storage.migrate import migrate
from registry.templates import Templates
from registry.tenants import Tenants
from registry.trust import Trust, open_trust
from registry.uplinks import UplinkLimits, Uplinks

log = logging.getLogger(__name__)


class OperatorKeysProblem(Exception):
    """The configured key set of operators cannot be used; the message names the key and the reason."""


@dataclass(frozen=True, slots=True)
class Core:
    """The services, and the parts of them that have a life of their own."""

    registry: Registry
    trust: Trust
    ring: KeyRing
    database: Database
    teardown: Teardown

    async def stop_downlinks(self) -> None:
        """Finish what is under way to devices, and write down that they are gone."""
        await self.registry.commands.stop()
        await self.registry.device_configs.stop()
        await self.registry.presence.stop()

    async def stop_certificates(self) -> None:
        """Finish what is under way around certificates."""
        await self.registry.certificates.stop()
        await self.registry.revocation_lists.stop()
        await self.trust.live.stop()


def utc_now() -> datetime:
    """The clock of a running process."""
    return datetime.now(UTC)


async def migrate_database(dsn: str, *, connect_timeout: float = 10.0) -> list[str]:
    """Bring the schema up to date over a connection of its own; the names of the files applied."""
    connection = await asyncpg.connect(
        dsn, timeout=connect_timeout, server_settings={"application_name": "gatehouse-migrate"}
    )
    try:
        applied = await migrate(connection)
    except BaseException:
        connection.terminate()  # a goodbye would wait for an answer
        raise
    await connection.close(timeout=connect_timeout)
    return applied


def build(
    config: Config,
    database: Database,
    ring: KeyRing,
    trust: Trust,
    *,
    node_id: NodeId,
    clock: Callable[[], datetime] = utc_now,
    observe_batch: Callable[[int, float], None] | None = None,
    observer: Observer = NOBODY,
) -> Core:
    """All services over one database. Raises OperatorKeysProblem."""
    random = secrets.token_bytes
    feed = Feed(database, node_id)
    refusals = Refusals(database, feed, observer=observer)
    resolver = Resolver(
        database,
        ring,
        refusals,
        clock=clock,
        random=random,
        feed_trusted=lambda: feed.trusted,
        hint=feed.hint,
        cache_entries=config.security.credential_cache_entries,
        renewal_grace=timedelta(days=config.security.renewal_grace_days),
        observer=observer,
    )
    sessions = SessionTable(
        node_id,
        resolver,
        clock=clock,
        feed_lost_seconds=feed.lost_seconds,
        feed_grace_seconds=config.security.feed_grace_seconds,
        max_sessions=config.limits.sessions,
        max_per_device=config.limits.sessions_per_device,
        polite_seconds=config.security.teardown_seconds,
        observer=observer,
    )
    teardown = Teardown(database, feed, sessions, resolver, clock=clock, observer=observer)
    feed.add_follower(teardown)
    feed.add_follower(trust.live)
    node = Node(database, sessions, teardown, clock=clock, sweep_seconds=config.security.session_sweep_seconds)
    patterns = PatternCache()
    certificates = Certificates(database, trust.live, clock=clock, random=random, profile=device_profile(config))
    credentials = Credentials(
        database, key_ring=ring, clock=clock, random=random, feed=feed, teardown=teardown, issuer=certificates
    )
    commands = Commands(
        database,
        clock=clock,
        random=random,
        feed=feed,
        limits=CommandLimits(
            unfinished=config.limits.commands_per_device,
            waits=config.limits.command_waits,
        ),
        observer=observer,
    )
    device_configs = DeviceConfigs(database, clock=clock, feed=feed)
    children = Children(
        database,
        clock=clock,
        random=random,
        feed=feed,
        feed_trusted=lambda: feed.trusted,
        max_children=config.limits.children_per_gateway,
        observer=observer,
    )
    for follower in (commands, device_configs, children):
        feed.add_follower(follower)
    registry = Registry(
        tenants=Tenants(database, clock=clock, random=random),
        operators=_operator_verifier(config, trust),
        profiles=Profiles(database, clock=clock, random=random, feed=feed),
        devices=Devices(
            database, key_ring=ring, clock=clock, random=random, feed=feed, teardown=teardown, issuer=certificates
        ),
        credentials=credentials,
        templates=Templates(
            database, key_ring=ring, clock=clock, random=random, feed=feed, teardown=teardown, patterns=patterns
        ),
        key_claim=KeyClaim(
            database,
            key_ring=ring,
            clock=clock,
            random=random,
            feed=feed,
            refusals=refusals,
            patterns=patterns,
            issuer=certificates,
            observer=observer,
        ),
        claim_psks=ClaimPsks(database, ring, refusals, clock=clock, random=random),
        registration_tokens=RegistrationTokens(
            database, certificates, clock=clock, random=random, feed=feed, refusals=refusals
        ),
        certificates=certificates,
        foreign_certificates=ForeignCertificates(credentials, trust.live),
        enrolment=Enrolment(
            database,
            certificates,
            clock=clock,
            feed=feed,
            refusals=refusals,
            teardown=teardown,
            grace=timedelta(days=config.security.renewal_grace_days),
        ),
        revocation_lists=RevocationLists(database, trust.live, clock=clock),
        resolver=resolver,
        sessions=sessions,
        uplinks=Uplinks(
            database,
            limits=UplinkLimits(queue=config.limits.uplink_queue, queue_bytes=config.limits.uplink_queue_bytes),
            observe=observe_batch,
        ),
        commands=commands,
        device_configs=device_configs,
        children=children,
        presence=Presence(database, node_id, clock=clock, feed=feed),
        event_log=EventLog(database, feed, refusals),
        kick=Kick(database, sessions, teardown, clock=clock),
        node=node,
        feed=feed,
        refusals=refusals,
        clock=clock,
    )
    return Core(registry, trust, ring, database, teardown)


@asynccontextmanager
async def open_registry(config: Config, *, environ: Mapping[str, str]) -> AsyncIterator[Core]:
    """The services for one command, beside a running server or alone.

    Raises what the parts raise: PostgresUnavailable, DataDirectoryBusy, MigrationError, KeyRingError, WrongKeyRing,
    Unavailable, OperatorKeysProblem.
    """
    async with _dsn(config, environ) as dsn:
        await migrate_database(dsn)
        ring = load_or_create(config.security.key_ring)
        database = await Database.open(
            dsn,
            size=2,
            statement_timeout=config.database.statement_timeout_seconds,
            connect_timeout=config.database.connect_timeout_seconds,
        )
        try:
            trust = await open_trust(database, ring, clock=utc_now, random=secrets.token_bytes)
            core = build(config, database, ring, trust, node_id=NodeId(f"command-{uuid4().hex[:12]}"))
            try:
                yield core
            finally:
                await core.teardown.stop()
                await core.registry.uplinks.stop()
                await core.stop_downlinks()
                await core.stop_certificates()
                await core.registry.resolver.stop()
                await core.registry.claim_psks.stop()
                await core.registry.feed.close()
        finally:
            await database.close()


@asynccontextmanager
async def _dsn(config: Config, environ: Mapping[str, str]) -> AsyncIterator[str]:
    if config.database.dsn is not None:
        yield config.database.dsn.reveal()
        return
    async with attach_or_start(config.data_dir, owner="command", environ=environ) as handle:
        yield handle.dsn


def device_profile(config: Config) -> DeviceProfile:
    """How devices' certificates are made. Without a name or a fixed port they name no revocation list."""
    crl_url = config.security.crl_url
    if crl_url is None and config.https.names and config.https.port:
        host = public_host(config, config.https.host)
        crl_url = f"https://{host}:{config.https.port}/api/v1/ca/crl?issuer={{issuer}}"
    return DeviceProfile(lifetime=timedelta(days=config.security.certificate_days), crl_url=crl_url)


def public_host(config: Config, listening: str) -> str:
    """What devices call the listener: the first configured name, else the address where it is a particular one."""
    for name in config.https.names:
        if "*" not in name:
            return f"[{name}]" if ":" in name else name
    try:
        unspecified = ipaddress.ip_address(listening).is_unspecified
    except ValueError:
        return listening
    return socket.gethostname() if unspecified else listening


def _operator_verifier(config: Config, trust: Trust) -> OperatorVerifier:
    return OperatorVerifier(
        {key.kid: key.public for key in trust.issuer_keys},
        _configured_keys(config),
        accepted_issuers=frozenset(config.security.operator_issuers) or None,
        max_lifetime=timedelta(seconds=config.security.operator_token_max_seconds),
    )


def _configured_keys(config: Config) -> tuple[JwksKey, ...]:
    path = config.security.operator_jwks
    if path is None:
        return ()
    try:
        return parse_jwks(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, InvalidKeySet) as error:
        raise OperatorKeysProblem(f"security.operator_jwks: {path}: {error}") from None
