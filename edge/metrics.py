"""The metrics of one process, as methods that name what happened.

Theory. A `Metrics` owns its registry, so that two of them (tests, two nodes in one process) never meet. Whoever counts
calls a method; labels are enums, so their number is known when this file is read: no device, tenant or address ever
becomes a label. The one text among them, the HTTP route, is a template of ours and capped all the same. Numbers that
live elsewhere (open sessions, queue length, the counters of the adapters) are read when the page is asked for:
`watch_…` takes a function, which must be quick and must not raise. A `Metrics` is the core's `Observer`
(registry/observation.py). Methods are safe from any thread.

Names are `gatehouse_*` in base units (seconds, bytes); counters end in `_total`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from threading import Lock

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from registry.model import Transport
from registry.observation import AuthOutcome, ClaimOutcome, CloseReason, Limit, UplinkOutcome

__all__ = ["AuthOutcome", "ClaimOutcome", "CloseReason", "Limit", "Metrics", "UplinkOutcome"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_ROUTES = 500
"""Distinct routes beyond this are counted as `other`; the API has about a hundred."""

LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Seconds, from a cached look-up to the statement timeout."""
BATCH_ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Metrics:
    """Counters, gauges and histograms of one process."""

    def __init__(self, *, version: str = "") -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        Gauge("gatehouse_build_info", "1, for the version that runs", ["version"], registry=registry).labels(
            version
        ).set(1)
        self._auth = _Tally("gatehouse_auth_attempts", "Admissions tried, by outcome", ("transport", "outcome"))
        self._closed = _Tally("gatehouse_sessions_closed", "Sessions ended, by reason", ("transport", "reason"))
        self._teardown = Histogram(
            "gatehouse_revocation_teardown_seconds",
            "From a revocation's commit to the last closed session on this node",
            buckets=LATENCY,
            registry=registry,
        )
        self._uplinks = _Tally("gatehouse_uplinks", "Uplinks by outcome", ("transport", "outcome"))
        self._batch = Histogram(
            "gatehouse_uplink_batch_rows", "Rows of one group commit", buckets=BATCH_ROWS, registry=registry
        )
        self._commit = Histogram(
            "gatehouse_uplink_commit_seconds", "Time of one group commit", buckets=LATENCY, registry=registry
        )
        self._claims = Counter(
            "gatehouse_claims", "Provisioning attempts by outcome", ["transport", "outcome"], registry=registry
        )
        self._answers = _Answers()
        self._limits = _Tally("gatehouse_limits_hit", "Limits that somebody ran into", ("limit",))
        self._restarts = _Tally("gatehouse_postgres_restarts", "Restarts of the embedded PostgreSQL after a crash", ())
        self._loops = _Tally("gatehouse_loop_restarts", "Loops of this process that failed and were started again", ())
        for tally in (
            self._auth, self._closed, self._uplinks, self._limits, self._restarts, self._loops, self._answers,
        ):  # fmt: skip
            registry.register(tally)
        self._restarts.add((), 0)
        self._loops.add((), 0)
        # A series that exists only after its first event cannot be alerted on: rate() needs the zero before it.
        for transport in (Transport.HTTPS, Transport.MQTT, Transport.COAP):
            for outcome in AuthOutcome:
                self._auth.add((transport.value, outcome.value), 0)
            for stored in UplinkOutcome:
                self._uplinks.add((transport.value, stored.value), 0)
            for claim in ClaimOutcome:
                self._claims.labels(transport.value, claim.value)
        for limit in Limit:
            self._limits.add((limit.value,), 0)

    def auth_attempted(self, transport: Transport, outcome: AuthOutcome) -> None:
        """Count one admission, resumed connections included."""
        self._auth.add((transport.value, outcome.value), 1)

    def session_closed(self, transport: Transport, reason: CloseReason) -> None:
        """Count one session that ended."""
        self._closed.add((transport.value, reason.value), 1)

    def revocation_torn_down(self, seconds: float) -> None:
        """Note how long this node took to close every session of one revocation."""
        self._teardown.observe(seconds)

    def uplinks_handled(self, transport: Transport, outcome: UplinkOutcome, count: int = 1) -> None:
        """Count uplinks; stored ones after their commit."""
        self._uplinks.add((transport.value, outcome.value), count)

    def batch_committed(self, rows: int, seconds: float) -> None:
        """Note one group commit."""
        self._batch.observe(rows)
        self._commit.observe(seconds)

    def claim_handled(self, transport: Transport, outcome: ClaimOutcome) -> None:
        """Count one provisioning attempt: key claim or token."""
        self._claims.labels(transport.value, outcome.value).inc()

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP answer. `route` is the template (`/api/v1/devices/{device_id}`), never the path; or empty."""
        self._answers.add(route, method, status, seconds)

    def limit_hit(self, limit: Limit) -> None:
        """Count somebody running into a limit."""
        self._limits.add((limit.value,), 1)

    def watch_uplinks(self, transport: Transport, read: Callable[[], Mapping[UplinkOutcome, int]]) -> None:
        """Add the uplinks that an adapter counts itself."""
        self._uplinks.watch(lambda: {(transport.value, outcome.value): n for outcome, n in read().items()})

    def watch_limits(self, read: Callable[[], Mapping[Limit, int]]) -> None:
        """Add the limits that are counted where they are hit."""
        self._limits.watch(lambda: {(limit.value,): n for limit, n in read().items()})

    def watch_loops(self, restarts: Callable[[], int]) -> None:
        """Show how often one of the process's own loops had failed and was started again."""
        self._loops.watch(lambda: {(): restarts()})

    def watch_postgres(self, restarts: Callable[[], int]) -> None:
        """Show the restarts of the embedded PostgreSQL after a crash."""
        self._restarts.watch(lambda: {(): restarts()})

    def postgres_restarted(self) -> None:
        """Count a restart of the embedded PostgreSQL after its crash."""
        self._restarts.add((), 1)

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

    def watch_mqtt(self, read: Callable[[], Mapping[str, int]], present: frozenset[str]) -> None:
        """Show what the MQTT server counts, by the counters' names; `present` are those that say how many there are."""
        self._watch_counts(
            "gatehouse_mqtt", "What happened to MQTT connections", "What MQTT has in hand", read, present
        )

    def watch_coap(self, read: Callable[[], Mapping[str, int]], present: frozenset[str]) -> None:
        """Show what the CoAP server counts, by the counters' names; `present` are those that say how many there are."""
        self._watch_counts("gatehouse_coap", "What happened to CoAP messages", "What CoAP has in hand", read, present)

    def _watch_counts(
        self, name: str, happened: str, now: str, read: Callable[[], Mapping[str, int]], present: frozenset[str]
    ) -> None:
        def collect() -> Iterable[Metric]:
            counted = CounterMetricFamily(name, happened, labels=["what"])
            there = GaugeMetricFamily(f"{name}_now", now, labels=["what"])
            for what, count in read().items():
                (there if what in present else counted).add_metric([what], count)
            yield from (counted, there)

        self._registry.register(_Read(collect))

    def render(self) -> bytes:
        """The page in the Prometheus text format, version 0.0.4 (`CONTENT_TYPE`)."""
        return generate_latest(self._registry)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        return Gauge(name, documentation, registry=self._registry)


class _Read(Collector):
    """A collector whose numbers live elsewhere."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read yet."""
        return ()


class _Tally(Collector):
    """A counter that sums what it is told and what is counted elsewhere, by label values."""

    def __init__(self, name: str, documentation: str, labels: tuple[str, ...]) -> None:
        self._name = name
        self._documentation = documentation
        self._labels = labels
        self._told: dict[tuple[str, ...], int] = {}
        self._reads: list[Callable[[], Mapping[tuple[str, ...], int]]] = []
        self._lock = Lock()

    def add(self, values: tuple[str, ...], count: int) -> None:
        with self._lock:
            self._told[values] = self._told.get(values, 0) + count

    def watch(self, read: Callable[[], Mapping[tuple[str, ...], int]]) -> None:
        self._reads.append(read)

    def collect(self) -> Iterable[Metric]:
        with self._lock:
            sums = dict(self._told)
        for read in self._reads:
            for values, count in read().items():
                sums[values] = sums.get(values, 0) + count
        family = CounterMetricFamily(self._name, self._documentation, labels=self._labels)
        for values, count in sums.items():
            family.add_metric(values, count)
        yield family

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not read yet."""
        return ()


class _Answers(Collector):
    """HTTP answers and their times, by labels. Told of every answer of the node, so telling it is a few additions."""

    def __init__(self) -> None:
        self._routes: set[str] = set()
        self._series: dict[tuple[str, str, int], _Series] = {}
        self._counts: dict[tuple[str, str, str], _Series] = {}
        self._lock = Lock()

    def add(self, route: str, method: str, status: int, seconds: float) -> None:
        place = bisect_left(LATENCY, seconds)
        with self._lock:
            series = self._series.get((route, method, status)) or self._found(route, method, status)
            series.seconds += seconds
            series.buckets[place] += 1

    def _found(self, route: str, method: str, status: int) -> _Series:
        labels = (
            self._route(route),
            method if method in METHODS else "other",
            str(status) if 100 <= status <= 599 else "other",
        )
        series = self._counts.setdefault(labels, _Series())
        if labels == (route, method, str(status)):  # nobody's own words: as few as the labels
            self._series[route, method, status] = series
        return series

    def _route(self, route: str) -> str:
        if route in self._routes:
            return route
        if not route or len(self._routes) >= MAX_ROUTES:
            return "other"
        self._routes.add(route)
        return route

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "gatehouse_http_requests", "HTTP requests answered", labels=["route", "method", "status"]
        )
        times = HistogramMetricFamily(
            "gatehouse_http_request_seconds",
            "From a request's last header to its answer's last byte",
            labels=["route", "method"],
        )
        sums: dict[tuple[str, str], _Series] = {}
        with self._lock:
            for labels, series in self._counts.items():
                requests.add_metric(labels, sum(series.buckets))
                total = sums.setdefault(labels[:2], _Series())
                total.seconds += series.seconds
                total.buckets = [one + other for one, other in zip(total.buckets, series.buckets, strict=True)]
        for route_and_method, total in sums.items():
            reached = [*map(floatToGoString, LATENCY), "+Inf"]
            times.add_metric(
                route_and_method, list(zip(reached, accumulate(total.buckets), strict=True)), sum_value=total.seconds
            )
        yield from (requests, times)

    def describe(self) -> Iterable[Metric]:
        """Nothing: the families are those of `collect`."""
        return ()


@dataclass(slots=True)
class _Series:
    """Answers of one kind: how many took up to each of LATENCY, or longer, and all their seconds."""

    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(LATENCY) + 1))
