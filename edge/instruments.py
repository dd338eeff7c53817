"""What a node shows of itself: the counters of its services and servers, as the metrics name them.

Theory. Nothing is counted here. Each server counts in plain integers that cost nothing; the metrics read them when
somebody asks, through the functions that are handed over here. A limit is counted where it is hit, under several names;
here they become the one label that operators know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from adapters.coap.server import CoapServer
from adapters.dtls.admission import DtlsCounters
from adapters.http.api_request import Service
from adapters.http.app import HttpApi
from adapters.http.server import HttpsServer
from adapters.mqtt.server import MqttServer
from adapters.mqtt.wire_reasons import ReasonCode
from adapters.tls.admission import TlsCounters
from edge.metrics import Metrics
from registry.core import Registry
from registry.model import Transport
from registry.observation import Limit, UplinkOutcome

MQTT_PRESENT = frozenset({"held"})
"""Of what MQTT counts, how many there are now: it falls again, and a counter that falls looks like a restart."""
COAP_PRESENT = frozenset({"peers", "serving", "observations"})
"""The same of CoAP."""


class _Uplinks(Protocol):
    """What each adapter counts of the uplinks that it submits."""

    stored: int
    duplicate: int
    rejected: int


def watch_registry(metrics: Metrics, registry: Registry) -> None:
    """What the services count."""
    metrics.watch_sessions(registry.sessions.count)
    metrics.watch_uplink_queue(lambda: registry.uplinks.queued, lambda: registry.uplinks.queued_bytes)
    metrics.watch_feed(lambda: max(registry.feed.lost_seconds(), registry.feed.lag_seconds))
    metrics.watch_limits(lambda: {Limit.UPLINK_QUEUE: registry.uplinks.turned_away})


def watch_listeners(metrics: Metrics, listeners: Mapping[Transport, TlsCounters | DtlsCounters]) -> None:
    """What became of connections and handshakes; all listeners at once, because the metrics share their names."""
    metrics.watch_listeners(lambda: {transport: each.as_dict() for transport, each in listeners.items()})


def watch_https(metrics: Metrics, app: HttpApi, server: HttpsServer) -> None:
    """Uplinks over HTTPS, and the limits of its server and of its API."""
    metrics.watch_uplinks(Transport.HTTPS, lambda: _uplinks(app.hot.counters))
    metrics.watch_limits(lambda: _limits_hit(app.service, server))


def watch_mqtt(metrics: Metrics, server: MqttServer) -> None:
    """All that the MQTT server counts."""
    counters = server.counters
    metrics.watch_uplinks(Transport.MQTT, lambda: _uplinks(counters))
    metrics.watch_mqtt(counters.as_dict, MQTT_PRESENT)
    metrics.watch_limits(lambda: _mqtt_limits_hit(server))


def watch_coap(metrics: Metrics, server: CoapServer) -> None:
    """All that the CoAP server and its message layer count."""
    counters = server.counters
    metrics.watch_uplinks(Transport.COAP, lambda: _uplinks(counters))
    metrics.watch_coap(lambda: {**server.coap_counters.as_dict(), **counters.as_dict()}, COAP_PRESENT)
    metrics.watch_limits(lambda: _coap_limits_hit(server))


def _uplinks(counters: _Uplinks) -> dict[UplinkOutcome, int]:
    return {
        UplinkOutcome.STORED: counters.stored,
        UplinkOutcome.DUPLICATE: counters.duplicate,
        UplinkOutcome.REJECTED: counters.rejected,
    }


def _limits_hit(service: Service, server: HttpsServer) -> dict[Limit, int]:
    http, tls, allowances = server.counters, server.tls_counters, service.allowances.counters
    return {
        Limit.HEADER: http.refused_headers_too_large + http.refused_target_too_long,
        Limit.BODY: http.refused_body_too_large + allowances.body,
        Limit.REQUESTS: http.refused_overload,
        Limit.SLOW_SENDER: http.refused_slow + http.stalled,
        Limit.HANDSHAKES: _handshakes_dropped(tls),
        Limit.CONNECTIONS: tls.dropped_connection_limit + tls.dropped_address_connections,
        Limit.TENANT_REQUESTS: allowances.tenant,
        Limit.KEY_REQUESTS: allowances.credential,
        Limit.OPEN_REQUESTS: allowances.address,
        Limit.PROVISIONING_ATTEMPTS: allowances.provisioning,
        Limit.FAILED_AUTHENTICATIONS: allowances.failures,
        Limit.SSE_STREAMS: service.streams.turned_away,
        Limit.UPLINK_PAYLOAD: service.intake.counters.too_large,
    }


def _handshakes_dropped(tls: TlsCounters) -> int:
    refused = tls.dropped_handshake_limit + tls.dropped_address_limit
    return refused + tls.dropped_handshake_displaced + tls.dropped_handshake_timeout


def _mqtt_limits_hit(server: MqttServer) -> dict[Limit, int]:
    counters, tls, messaging = server.counters, server.tls_counters, server.broker.messaging
    return {
        Limit.SLOW_SENDER: counters.timed_out,
        Limit.HANDSHAKES: _handshakes_dropped(tls),
        Limit.CONNECTIONS: tls.dropped_connection_limit + tls.dropped_address_connections,
        Limit.UPLINK_PAYLOAD: counters.too_large,
        Limit.PROVISIONING_ATTEMPTS: counters.provisioning_refused,
        Limit.PROVISIONING_CONNECTIONS: counters.provisioning_full + counters.provisioning_displaced,
        Limit.REFUSED_WAITING: counters.refusals_full,
        Limit.SUBSCRIPTIONS: counters.subscriptions_full,
        Limit.TOPIC: counters.topics_too_long,
        Limit.TOPIC_ALIASES: counters.ended[ReasonCode.TOPIC_ALIAS_INVALID],
        Limit.PACKET: counters.ended[ReasonCode.PACKET_TOO_LARGE],
        Limit.CLIENT_ID: counters.ended[ReasonCode.CLIENT_IDENTIFIER_NOT_VALID],
        Limit.RECEIVE_MAXIMUM: counters.ended[ReasonCode.RECEIVE_MAXIMUM_EXCEEDED],
        Limit.PUBLISH_QUEUE: messaging.turned_away,
        Limit.SESSION_QUEUE: messaging.overflowed,
        Limit.RETAINED: messaging.retained_full,
        Limit.STORED_SESSIONS: messaging.sessions_refused,
    }


def _coap_limits_hit(server: CoapServer) -> dict[Limit, int]:
    counters, coap, dtls = server.counters, server.coap_counters, server.dtls_counters.as_dict()
    return {
        Limit.BODY: coap.too_large,
        Limit.REQUESTS: coap.busy,
        Limit.SLOW_SENDER: coap.incomplete,
        Limit.HANDSHAKES: dtls["dropped_handshake_limit"]
        + dtls["dropped_address_limit"]
        + dtls["dropped_handshake_timeout"],
        Limit.CONNECTIONS: dtls["dropped_association_limit"]
        + dtls["dropped_address_associations"]
        + counters.turned_away,
        Limit.OPEN_REQUESTS: counters.open_requests,
        Limit.KEY_REQUESTS: counters.key_requests,
        Limit.TENANT_REQUESTS: counters.tenant_requests,
        Limit.PROVISIONING_ATTEMPTS: counters.provisioning_attempts,
        Limit.UPLINK_PAYLOAD: counters.too_large,
    }
