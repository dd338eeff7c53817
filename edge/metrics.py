"""The metrics of one process, as methods that name what happened.

Theory. A `Metrics` owns its registry, so that two of them (tests, two nodes in one process) never meet. Whoever counts
calls a method; labels are enums, so their number is known when this file is read: no device, tenant or address ever
becomes a label. The one text among them, the HTTP route, is a template of ours and capped all the same. Numbers that
live elsewhere (open sessions, queue length, the counters of a TLS listener) are read when the page is asked for:
`watch_…` takes a function, which must be quick and must not raise. Methods are safe from any thread.

Names are `gatehouse_*` in base units (seconds, bytes); counters end in `_total`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from registry.model import Transport

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_ROUTES = 500
"""Distinct routes beyond this are counted as `other`; the API has about a hundred."""

LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds, from a cached look-up to the statement timeout."""
BATCH_ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class AuthOutcome(Enum):
    """How an admission ended. `refused` covers unknown, wrong, expired, disabled, revoked: the log has the reason."""

    ADMITTED = "admitted"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"


class UplinkOutcome(Enum):
    """What became of an uplink. Every acknowledged one is `stored` or a `duplicate` of a stored one."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    REJECTED = "rejected"


class ClaimOutcome(Enum):
    """How a provisioning attempt ended; `existing` is the idempotent re-claim."""

    CREATED = "created"
    EXISTING = "existing"
    REFUSED = "refused"
    FAILED = "failed"


class CloseReason(Enum):
    """Why a session ended."""

    PEER = "peer"
    IDLE = "idle"
    REVOKED = "revoked"
    KICKED = "kicked"
    EXPIRED = "expired"
    TAKEN_OVER = "taken_over"
    PROTOCOL_ERROR = "protocol_error"
    DRAIN = "drain"
    OTHER = "other"


class Limit(Enum):
    """A configured limit (`[limits]`) that somebody ran into."""

    HEADER = "header"
    BODY = "body"
    SLOW_SENDER = "slow_sender"
    CONNECTIONS = "connections"
    SESSIONS = "sessions"
    SESSIONS_PER_DEVICE = "sessions_per_device"
    UPLINK_QUEUE = "uplink_queue"
    UPLINK_PAYLOAD = "uplink_payload"
    TENANT_REQUESTS = "tenant_requests"
    KEY_REQUESTS = "key_requests"
    PROVISIONING_ATTEMPTS = "provisioning_attempts"
    SSE_STREAMS = "sse_streams"


class Metrics:
    """Counters, gauges and histograms of one process."""

    def __init__(self, *, version: str = "") -> None:
        self._registry = registry = CollectorRegistry()
        self._routes: set[str] = set()
        ProcessCollector(registry=registry)
        Gauge("gatehouse_build_info", "1, for the version that runs", ["version"], registry=registry).labels(
            version
        ).set(1)
        self._auth = Counter(
            "gatehouse_auth_attempts", "Admissions tried, by outcome", ["transport", "outcome"], registry=registry
        )
        self._closed = Counter(
            "gatehouse_sessions_closed", "Sessions ended, by reason", ["transport", "reason"], registry=registry
        )
        self._teardown = Histogram(
            "gatehouse_revocation_teardown_seconds",
            "From a revocation's commit to the last closed session on this node",
            buckets=LATENCY,
            registry=registry,
        )
        self._uplinks = Counter("gatehouse_uplinks", "Uplinks by outcome", ["transport", "outcome"], registry=registry)
        self._batch = Histogram(
            "gatehouse_uplink_batch_rows", "Rows of one group commit", buckets=BATCH_ROWS, registry=registry
        )
        self._commit = Histogram(
            "gatehouse_uplink_commit_seconds", "Time of one group commit", buckets=LATENCY, registry=registry
        )
        self._claims = Counter(
            "gatehouse_claims", "Provisioning attempts by outcome", ["transport", "outcome"], registry=registry
        )
        self._requests = Counter(
            "gatehouse_http_requests", "HTTP requests answered", ["route", "method", "status"], registry=registry
        )
        self._request_seconds = Histogram(
            "gatehouse_http_request_seconds",
            "From a request's last header to its answer's last byte",
            ["route", "method"],
            buckets=LATENCY,
            registry=registry,
        )
        self._limits = Counter("gatehouse_limits_hit", "Limits that somebody ran into", ["limit"], registry=registry)
        self._restarts = Counter(
            "gatehouse_postgres_restarts", "Restarts of the embedded PostgreSQL after a crash", registry=registry
        )
        # A series that exists only after its first event cannot be alerted on: rate() needs the zero before it.
        for transport in (Transport.HTTPS, Transport.MQTT, Transport.COAP):
            for outcome in AuthOutcome:
                self._auth.labels(transport.value, outcome.value)
            for stored in UplinkOutcome:
                self._uplinks.labels(transport.value, stored.value)
            for claim in ClaimOutcome:
                self._claims.labels(transport.value, claim.value)
        for limit in Limit:
            self._limits.labels(limit.value)

    def auth_attempted(self, transport: Transport, outcome: AuthOutcome) -> None:
        """Count one admission, resumed connections included."""
        self._auth.labels(transport.value, outcome.value).inc()

    def session_closed(self, transport: Transport, reason: CloseReason) -> None:
        """Count one session that ended."""
        self._closed.labels(transport.value, reason.value).inc()

    def revocation_torn_down(self, seconds: float) -> None:
        """Note how long this node took to close every session of one revocation."""
        self._teardown.observe(seconds)

    def uplinks_handled(self, transport: Transport, outcome: UplinkOutcome, count: int = 1) -> None:
        """Count uplinks; stored ones after their commit."""
        self._uplinks.labels(transport.value, outcome.value).inc(count)

    def batch_committed(self, rows: int, seconds: float) -> None:
        """Note one group commit."""
        self._batch.observe(rows)
        self._commit.observe(seconds)

    def claim_handled(self, transport: Transport, outcome: ClaimOutcome) -> None:
        """Count one provisioning attempt: key claim or token."""
        self._claims.labels(transport.value, outcome.value).inc()

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP answer. `route` is the template (`/api/v1/devices/{device_id}`), never the path; or empty."""
        known = self._route(route)
        verb = method if method in METHODS else "other"
        self._requests.labels(known, verb, str(status) if 100 <= status <= 599 else "other").inc()
        self._request_seconds.labels(known, verb).observe(seconds)

    def limit_hit(self, limit: Limit) -> None:
        """Count somebody running into a limit."""
        self._limits.labels(limit.value).inc()

    def postgres_restarted(self) -> None:
        """Count a restart of the embedded PostgreSQL after its crash."""
        self._restarts.inc()

    def watch_sessions(self, read: Callable[[], Mapping[Transport, int]]) -> None:
        """Show the open sessions of this node; transports that `read` leaves out are 0."""

        def collect() -> Iterable[Metric]:
            family = GaugeMetricFamily("gatehouse_sessions_open", "Sessions open on this node", labels=["transport"])
            now = read()
            for transport in Transport:
                family.add_metric([transport.value], now.get(transport, 0))
            yield family

        self._registry.register(_Read(collect))

    def watch_uplink_queue(self, length: Callable[[], int], size: Callable[[], int]) -> None:
        """Show what waits for the group commit, in uplinks and in bytes."""
        self._gauge("gatehouse_uplink_queue_length", "Uplinks that wait for the group commit").set_function(length)
        self._gauge("gatehouse_uplink_queue_bytes", "Payload that waits for the group commit").set_function(size)

    def watch_feed(self, lag_seconds: Callable[[], float]) -> None:
        """Show how long ago this node was last level with the event table: revocations may be late by that much."""
        self._gauge("gatehouse_feed_lag_seconds", "Time since this node had seen every event").set_function(lag_seconds)

    def watch_dropped_logs(self, dropped: Callable[[], int]) -> None:
        """Show the log lines that were lost."""

        def collect() -> Iterable[Metric]:
            yield CounterMetricFamily("gatehouse_log_lines_dropped", "Log lines that were lost", value=dropped())

        self._registry.register(_Read(collect))

    def watch_listeners(self, read: Callable[[], Mapping[Transport, Mapping[str, int]]]) -> None:
        """Show the counters of the TLS listeners: `TlsCounters.as_dict()` by transport.

        `established` and each `dropped_…` is an outcome; `open` and `handshaking` are how many there are now.
        """

        def collect() -> Iterable[Metric]:
            outcomes = CounterMetricFamily(
                "gatehouse_tls_connections", "TLS connections by what became of them", labels=["transport", "outcome"]
            )
            resumed = CounterMetricFamily("gatehouse_tls_resumed", "Resumed TLS handshakes", labels=["transport"])
            present = GaugeMetricFamily(
                "gatehouse_tls_connections_now", "TLS connections there are", labels=["transport", "state"]
            )
            for transport, counts in read().items():
                for name, count in counts.items():
                    if name == "established" or name.startswith("dropped_"):
                        outcomes.add_metric([transport.value, name.removeprefix("dropped_")], count)
                    if name == "resumed":
                        resumed.add_metric([transport.value], count)
                    if name in ("open", "handshaking"):
                        present.add_metric([transport.value, name], count)
            yield from (outcomes, resumed, present)

        self._registry.register(_Read(collect))

    def render(self) -> bytes:
        """The page in the Prometheus text format, version 0.0.4 (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        return Gauge(name, documentation, registry=self._registry)

    def _route(self, route: str) -> str:
        if route in self._routes:
            return route
        if not route or len(self._routes) >= MAX_ROUTES:
            return "other"
        self._routes.add(route)
        return route


class _Read(Collector):
    """A collector whose numbers live elsewhere."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read yet."""
        return ()
