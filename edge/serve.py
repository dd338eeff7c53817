"""A running node: what starts in which order, what readiness means, and how it leaves.

    start   PostgreSQL (embedded) → migrations → key ring → shared trust → services → feed (node lock) → node joins
            → TLS credentials → ops port → MQTT → CoAP → HTTPS → ready line
    ready   database answers lately, feed is trusted, listeners listen, not draining
    stop    not ready → listeners drain → queued uplinks commit → sessions end → loops stop → node leaves → database

A step that fails undoes the ones before it, in reverse; nothing is left running. The ready line is the only thing on
stdout; logs are on stderr. SIGTERM and SIGINT drain; a second one hurries: it cuts the drain short, and is never a
crash, because what was acknowledged is committed already.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import asyncpg
import msgspec

from adapters.coap.server import CoapServer
from adapters.dtls.admission import DtlsCounters
from adapters.dtls.context import DtlsContext
from adapters.http.app import create_app
from adapters.http.server import HttpsServer
from adapters.http.upgrade import WebSocketRoute
from adapters.mqtt.server import MqttServer
from adapters.mqtt.websocket import SUBPROTOCOL, WebSockets
from adapters.provisioning import Endpoint, Provisioning
from adapters.tls.admission import TlsCounters
from adapters.tls.context import ServerCredentials, TlsContext
from edge import garbage, logs
from edge.config import Coap, Config, Https, Mqtt, Ops
from edge.instruments import watch_coap, watch_https, watch_listeners, watch_mqtt, watch_registry
from edge.limits import (
    api_settings,
    coap_limits,
    coap_server_limits,
    dtls_limits,
    http_limits,
    messaging_limits,
    mqtt_limits,
    tls_limits,
)
from edge.metrics import Metrics
from edge.ops import CheckResult, OpsServer
from edge.postgres import DataDirectoryBusy, EmbeddedPostgres, PostgresUnavailable
from edge.server_certificate import CHECK_SECONDS, CertificateProblem, ServerCertificate
from edge.stop_signals import StopSignals
from edge.supervision import Supervisor
from edge.wiring import Core, OperatorKeysProblem, build, migrate_database, public_host, utc_now
from registry.certificates import Certificates
from registry.core import Registry
from registry.errors import Unavailable
from registry.feed import NodeBusy
from registry.messaging import Messaging
from registry.model import NodeId, Transport
from registry.retention import Retention, RetentionSettings
from registry.sealing import KeyRingError, load_or_create
from registry.storage.database import Database, is_away
from registry.storage.migrate import MigrationError
from registry.trust import WrongKeyRing, open_trust

log = logging.getLogger(__name__)

CHAIN_FILE = "ca-chain.pem"
MQTT_PATH = "/mqtt"
"""Where MQTT over WebSocket is on the HTTPS port; what clients assume when nothing is said."""
AUTHORITIES_SECONDS = 1.0
"""How often a look into memory tells whether the authorities have changed."""
FIRST_RETENTION_SECONDS = 5.0
RETENTION_SECONDS = 3600.0
TICKET_KEY_SECONDS = 86_400.0
"""Ticket keys live as long as a TLS context; who steals one may read what was resumed with it, for a day at most."""
PROBE_SECONDS = 1.0
"""How often the database is asked whether it answers, for readiness."""
DATABASE_WAIT_SECONDS = 60.0
"""How long a starting node waits for an external database that is still starting itself."""


class StartError(Exception):
    """The node cannot start; the message says why in words for the operator."""


class Server:
    """One node."""

    def __init__(self, config: Config, *, environ: Mapping[str, str] | None = None) -> None:
        self._config = config
        self._environ = os.environ if environ is None else environ
        self._stack = AsyncExitStack()
        self._supervisor = Supervisor()
        self._metrics = Metrics(version=version("gatehouse"))
        self._core: Core | None = None
        self._https: HttpsServer | None = None
        self._mqtt: MqttServer | None = None
        self._coap: CoapServer | None = None
        self._postgres: EmbeddedPostgres | None = None
        self._database_answered = 0.0
        self._draining = False
        self._hurry = asyncio.Event()
        self.dsn = ""

    @property
    def registry(self) -> Registry:
        """The services, once started."""
        assert self._core is not None, "not started"
        return self._core.registry

    @property
    def metrics(self) -> Metrics:
        """The node's metrics."""
        return self._metrics

    async def start(self) -> dict[str, int]:
        """Start everything; the bound port of each listener. Raises StartError, and then nothing is left running."""
        try:
            return await self._start()
        except BaseException as error:
            await self._stack.aclose()
            if isinstance(error, _EXPECTED):
                raise StartError(str(error)) from error
            if isinstance(error, OSError):
                raise StartError(_told(error)) from error
            raise

    async def stop(self) -> None:
        """Drain and leave. Safe to call once after `start`."""
        self._draining = True
        await self._stack.aclose()

    def hurry(self) -> None:
        """Cut the drain short."""
        self._hurry.set()

    # -- starting, one step each -----------------------------------------------------------------------------------

    async def _start(self) -> dict[str, int]:
        config = self._config
        enter = self._stack.enter_async_context
        config.data_dir.mkdir(parents=True, exist_ok=True)
        self.dsn = await enter(self._database_server())
        applied = await self._migrate()
        if applied:
            log.info("schema.migrated", extra={"fields": {"files": applied}})
        ring = load_or_create(config.security.key_ring)
        database = await enter(self._open_database())
        trust = await open_trust(database, ring, clock=utc_now, random=os.urandom)
        self._core = core = build(
            config,
            database,
            ring,
            trust,
            node_id=NodeId(config.node.id),
            observe_batch=self._metrics.batch_committed,
            observer=self._metrics,
        )
        await enter(self._running_core(core))
        certificate = ServerCertificate(config, trust, core.registry.certificates, utc_now)
        chain = config.data_dir / CHAIN_FILE
        certificate.write_chain(chain)
        ops = await enter(self._ops_listener())  # before the others, so that it outlives them and tells of the drain
        credentials = await certificate.load()
        https_context = _tls_context(credentials, "http/1.1", "gatehouse https")
        mqtt_context = _tls_context(credentials, "mqtt", "gatehouse mqtt")
        coap_context = _dtls_context(credentials)
        provisioning = Provisioning(  # the ports are the bound ones once the listeners listen
            core.registry,
            Endpoint(public_host(config, config.mqtt.host), config.mqtt.port),
            Endpoint(public_host(config, config.coap.host), config.coap.port),
        )
        mqtt = await enter(self._mqtt_listener(core, mqtt_context, provisioning))
        coap = await enter(self._coap_listener(core, coap_context, provisioning))
        https = await enter(self._https_listener(core, https_context, provisioning))
        contexts = (https_context, mqtt_context, coap_context)
        self._supervisor.keep("certificate", lambda: _renew(certificate, contexts, chain))
        ports = {"https": https, "mqtt": mqtt, "coap": coap, "ops": ops}
        log.info("node.ready", extra={"fields": {"node": config.node.id, "ports": ports}})
        return ports

    @asynccontextmanager
    async def _database_server(self) -> AsyncIterator[str]:
        if self._config.database.dsn is not None:
            yield self._config.database.dsn.reveal()
            return
        async with EmbeddedPostgres(self._config.data_dir, owner="serve", environ=self._environ) as postgres:
            self._postgres = postgres
            yield postgres.dsn

    async def _migrate(self) -> list[str]:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (DATABASE_WAIT_SECONDS if self._postgres is None else 0.0)
        while True:
            try:
                return await migrate_database(self.dsn, connect_timeout=self._config.database.connect_timeout_seconds)
            except (asyncpg.PostgresError, OSError, TimeoutError) as error:
                if loop.time() > deadline or not is_away(error):
                    raise StartError(f"database.dsn: the database cannot be used: {error}") from error
                log.info("database.waiting", extra={"fields": {"reason": type(error).__name__}})
                await asyncio.sleep(0.5)

    @asynccontextmanager
    async def _open_database(self) -> AsyncIterator[Database]:
        database = await Database.open(
            self.dsn,
            size=self._config.database.pool,
            statement_timeout=self._config.database.statement_timeout_seconds,
            connect_timeout=self._config.database.connect_timeout_seconds,
        )
        try:
            yield database
        finally:
            await database.close()

    @asynccontextmanager
    async def _running_core(self, core: Core) -> AsyncIterator[None]:
        registry, supervisor = core.registry, self._supervisor
        kept = self._config.telemetry
        retention = Retention(
            core.database,
            RetentionSettings(
                retention_days=kept.retention_days, event_days=kept.event_days, audit_days=kept.audit_days
            ),
        )
        await retention.make_partitions()
        await registry.feed.start()
        await registry.node.join()
        supervisor.keep("feed", registry.feed.run)
        supervisor.keep("node", registry.node.run)
        supervisor.keep("refusals", registry.refusals.run)
        supervisor.keep("commands", registry.commands.run)
        supervisor.keep("presence", registry.presence.run)
        supervisor.keep("retention", lambda: _every_hour(retention, registry.certificates))
        supervisor.keep("probe", lambda: self._probe(core.database))
        watch_registry(self._metrics, registry)
        self._metrics.watch_loops(lambda: supervisor.restarts)
        postgres = self._postgres
        if postgres is not None:
            self._metrics.watch_postgres(lambda: postgres.restarts)
        try:
            yield
        finally:
            await registry.uplinks.stop()
            await core.teardown.stop()
            await supervisor.stop()
            await core.stop_downlinks()
            await core.stop_certificates()
            await registry.resolver.stop()
            await registry.claim_psks.stop()
            try:
                await registry.refusals.flush_all()
            except Unavailable:
                log.warning("refusals.unwritten", extra={"fields": {}})
            await registry.node.leave()
            await registry.feed.close()

    @asynccontextmanager
    async def _mqtt_listener(self, core: Core, context: TlsContext, provisioning: Provisioning) -> AsyncIterator[int]:
        config = self._config
        messaging = Messaging(
            core.database,
            NodeId(config.node.id),
            clock=time.time,
            random=os.urandom,
            limits=messaging_limits(config),
        )
        self._mqtt = server = MqttServer(
            core.registry, messaging, provisioning, context, limits=mqtt_limits(config), tls_limits=tls_limits(config)
        )
        await messaging.start(server.broker)
        core.registry.feed.add_follower(messaging)
        loops = Supervisor()  # its own: it is to end before the store leaves, and that before the database
        loops.keep("messaging", messaging.run)
        self._stack.push_async_callback(_leave, messaging, loops)
        port = await _listening("mqtt", config.mqtt, server.start)
        provisioning.mqtt = Endpoint(public_host(config, config.mqtt.host), port)
        watch_mqtt(self._metrics, server)
        try:
            yield port
        finally:
            self._draining = True
            core.registry.sessions.drain()
            await self._drain(server)

    @asynccontextmanager
    async def _coap_listener(self, core: Core, context: DtlsContext, provisioning: Provisioning) -> AsyncIterator[int]:
        config = self._config
        self._coap = server = CoapServer(
            core.registry,
            provisioning,
            context,
            limits=coap_server_limits(config),
            coap_limits=coap_limits(config),
            dtls_limits=dtls_limits(config),
        )
        port = await _listening("coap", config.coap, server.start)
        provisioning.coap = Endpoint(public_host(config, config.coap.host), port)
        watch_coap(self._metrics, server)
        try:
            yield port
        finally:
            self._draining = True
            core.registry.sessions.drain()
            await self._drain(server)

    @asynccontextmanager
    async def _https_listener(self, core: Core, context: TlsContext, provisioning: Provisioning) -> AsyncIterator[int]:
        app = create_app(core.registry, api_settings(self._config, provisioning), self._metrics)
        self._https = server = HttpsServer(
            app.asgi,
            context,
            limits=http_limits(self._config),
            tls_limits=tls_limits(self._config),
            hot=app.hot,
            upgrades=self._upgrades(),
        )
        watch_https(self._metrics, app, server)
        watch_listeners(self._metrics, self._listeners(server))
        port = await _listening("https", self._config.https, server.start)
        try:
            yield port
        finally:
            self._draining = True
            core.registry.sessions.drain()
            core.registry.commands.drain()
            app.service.streams.end()
            await self._drain(server)

    def _listeners(self, https: HttpsServer) -> dict[Transport, TlsCounters | DtlsCounters]:
        assert self._mqtt is not None, "MQTT starts first"
        assert self._coap is not None, "CoAP starts first"
        return {
            Transport.HTTPS: https.tls_counters,
            Transport.MQTT: self._mqtt.tls_counters,
            Transport.COAP: self._coap.dtls_counters,
        }

    def _upgrades(self) -> dict[str, WebSocketRoute]:
        """MQTT on the HTTPS port. Its server outlives this port's, so its peers are drained in MQTT's own words."""
        assert self._mqtt is not None, "MQTT starts first"
        origins = frozenset(self._config.https.websocket_origins)
        return {MQTT_PATH: WebSocketRoute(SUBPROTOCOL, WebSockets(self._mqtt).take, origins)}

    @asynccontextmanager
    async def _ops_listener(self) -> AsyncIterator[int]:
        ops = OpsServer(self._metrics, self._readiness)
        port = await _listening("ops", self._config.ops, ops.start)
        try:
            yield port
        finally:
            await ops.close()

    async def _drain(self, server: HttpsServer | MqttServer | CoapServer) -> None:
        """Let what is in flight finish, unless somebody is in a hurry."""
        polite = asyncio.ensure_future(server.drain(self._config.node.drain_seconds))
        hurried = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait({polite, hurried}, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not polite.done():
            polite.cancel()
            await asyncio.wait({polite})
            await server.drain(0.0)

    # -- while it runs ---------------------------------------------------------------------------------------------

    async def _probe(self, database: Database) -> None:
        while True:
            try:
                async with database.connection() as connection:
                    await connection.fetchval("SELECT 1", timeout=5)
                self._database_answered = asyncio.get_running_loop().time()
            except Unavailable:
                log.warning("database.away", extra={"fields": {}})
            await asyncio.sleep(PROBE_SECONDS)

    def _readiness(self) -> Mapping[str, CheckResult]:
        assert self._core is not None
        feed = self._core.registry.feed
        silent = asyncio.get_running_loop().time() - self._database_answered
        return MappingProxyType(
            {
                "database": _check(silent < 5 * PROBE_SECONDS, f"no answer for {silent:.0f} s"),
                "feed": _check(feed.trusted, f"not followed for {feed.lost_seconds():.0f} s"),
                "https": _check(self._https is not None and not self._draining, "draining"),
                "mqtt": _check(self._mqtt is not None and not self._draining, "draining"),
                "coap": _check(self._coap is not None and not self._draining, "draining"),
            }
        )


async def serve(config: Config) -> int:
    """Serve until SIGTERM or SIGINT; the exit code."""
    server = Server(config)
    signals = StopSignals(server.hurry)
    signals.listen()
    with logs.configure(config.logs.level) as running_logs:
        _raise_file_limit()
        server.metrics.watch_dropped_logs(lambda: running_logs.dropped)
        starting = asyncio.ensure_future(server.start())
        asking = asyncio.ensure_future(signals.asked.wait())
        await asyncio.wait({starting, asking}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
            signals.ignore()
            return 0
        asking.cancel()
        ports = await starting
        garbage.settle()
        sys.stdout.write(msgspec.json.encode({"ready": ports}).decode() + "\n")
        sys.stdout.flush()
        await signals.asked.wait()
        log.info("node.draining", extra={"fields": {"node": config.node.id}})
        await server.stop()
        log.info("node.stopped", extra={"fields": {"node": config.node.id}})
    signals.ignore()
    return 0


_EXPECTED = (
    DataDirectoryBusy,
    PostgresUnavailable,
    MigrationError,
    KeyRingError,
    WrongKeyRing,
    Unavailable,
    NodeBusy,
    OperatorKeysProblem,
    CertificateProblem,
)
"""Failures that an operator can understand and mend; anything else is a bug and shows its traceback."""


async def _listening(
    section: str, where: Https | Mqtt | Coap | Ops, start: Callable[[str, int], Awaitable[int]]
) -> int:
    try:
        return await start(where.host, where.port)
    except OSError as error:
        place = f"{where.host} port {where.port} ({section}.host, {section}.port)"
        raise StartError(f"cannot listen on {place}: {error.strerror or error}") from error


def _told(error: OSError) -> str:
    """What went wrong with a file, in one line."""
    return str(error) if error.filename is None else f"{error.filename}: {error.strerror}"


async def _leave(messaging: Messaging, loops: Supervisor) -> None:
    await loops.stop()
    await messaging.stop()


async def _every_hour(retention: Retention, certificates: Certificates) -> None:
    pause = FIRST_RETENTION_SECONDS
    while True:
        await asyncio.sleep(pause)
        try:
            await _tidy(retention, certificates)
            pause = RETENTION_SECONDS
        except Unavailable as error:
            pause = FIRST_RETENTION_SECONDS
            log.warning("retention.postponed", extra={"fields": {"reason": str(error)}})


async def _tidy(retention: Retention, certificates: Certificates) -> None:
    tidied = await certificates.tidy()
    if tidied.abandoned or tidied.deleted:
        counts = {"abandoned": tidied.abandoned, "deleted": tidied.deleted}
        log.info("certificates.tidied", extra={"fields": counts})
    report = await retention.run_once(utc_now())
    if report.dropped or report.deleted or report.locked:
        fields = {"dropped": report.dropped, "locked": report.locked, "deleted": report.deleted}
        log.info("retention.done", extra={"fields": fields})


def _raise_file_limit() -> None:
    """Every connection is a descriptor, and many shells allow 1,024 where the hard limit is far higher."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning("limits.open_files", extra={"fields": {"soft": soft, "hard": hard, "reason": str(error)}})


async def _renew(certificate: ServerCertificate, contexts: Sequence[TlsContext | DtlsContext], chain: Path) -> None:
    """Keep what the listeners show, and the file of what to trust, up to date."""
    loop = asyncio.get_running_loop()
    replaced = checked = loop.time()
    while True:
        await asyncio.sleep(AUTHORITIES_SECONDS)
        unwritten = ""
        try:
            rolled_over = certificate.write_chain(chain)
        except OSError as error:  # a full disk: it is tried again, and the listeners do not wait for it
            rolled_over, unwritten = False, _told(error)
        if not rolled_over and loop.time() - checked < CHECK_SECONDS:
            continue
        checked = loop.time()
        if unwritten:
            log.error("certificate.chain_unwritten", extra={"fields": {"reason": unwritten}})
        if not certificate.due() and loop.time() - replaced < TICKET_KEY_SECONDS:
            continue
        try:
            credentials = await certificate.load()
            for context in contexts:
                context.replace(credentials)
            replaced = loop.time()
            log.info("certificate.replaced", extra={"fields": {}})
        except (CertificateProblem, Unavailable, ValueError) as error:
            log.error("certificate.unusable", extra={"fields": {"reason": str(error)}})


def _check(ok: bool, reason: str) -> CheckResult:
    return CheckResult(True) if ok else CheckResult(False, reason)


def _tls_context(credentials: ServerCredentials, protocol: str, name: str) -> TlsContext:
    try:
        return TlsContext(credentials, alpn=(protocol.encode(),), session_name=name.encode())
    except ValueError as error:
        raise StartError(f"https.certificate: {error}") from None


def _dtls_context(credentials: ServerCredentials) -> DtlsContext:
    try:
        return DtlsContext(credentials)
    except ValueError as error:
        raise StartError(f"https.certificate: {error}") from None
