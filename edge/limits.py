"""From the configuration to the limits of each server: a key of the file, and the field that it bounds.

Theory. The servers know no configuration; they get frozen values with defaults and reasons of their own. What an
operator may have a reason to change is a key (config_limits.py, config_listeners.py), and here is the one place where
it is handed over. Fields that are not named here keep the server's default.
"""

from __future__ import annotations

from adapters.coap.limits import CoapLimits
from adapters.coap.server_limits import ServerLimits as CoapServerLimits
from adapters.dtls.admission import DtlsLimits
from adapters.http.app import HttpApiSettings
from adapters.http.limits import HttpLimits
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.server_limits import ServerLimits as MqttServerLimits
from adapters.mqtt.wire import WireLimits
from adapters.provisioning import Provisioning
from adapters.tls.admission import TlsLimits
from edge.config import Config
from registry.messaging_limits import MessagingLimits


def tls_limits(config: Config) -> TlsLimits:
    """Of every TLS listener."""
    limits = config.limits
    return TlsLimits(
        handshake_timeout=limits.tls_handshake_seconds,
        handshakes_in_flight=limits.tls_handshakes,
        handshakes_per_address=limits.tls_handshakes_per_address,
        connections=limits.connections,
        connections_per_address=limits.connections_per_address,
    )


def http_limits(config: Config) -> HttpLimits:
    """Of HTTP connections."""
    limits = config.limits
    return HttpLimits(
        max_header_bytes=limits.header_bytes,
        max_header_count=limits.header_count,
        max_body_bytes=limits.body_bytes,
        body_overrides={"/api/v1/devices/import": limits.import_body_bytes},
        max_in_flight=limits.requests,
        bodies_per_address=limits.unauthenticated_bodies_per_address,
        header_timeout=limits.header_timeout_seconds,
        anonymous_body_timeout=limits.unauthenticated_body_seconds,
        min_body_rate=limits.min_body_rate_bytes,
        keep_alive_timeout=limits.keep_alive_seconds,
        anonymous_keep_alive=limits.unauthenticated_keep_alive_seconds,
        send_timeout=limits.send_timeout_seconds,
        anonymous_send_timeout=limits.send_timeout_seconds / 4,
    )


def api_settings(config: Config, provisioning: Provisioning) -> HttpApiSettings:
    """Of the API, and what it tells devices of the other listeners."""
    limits = config.limits
    return HttpApiSettings(
        tenant_requests_per_second=limits.tenant_requests_per_second,
        tenant_requests_burst=limits.tenant_requests_burst,
        key_requests_per_second=limits.key_requests_per_second,
        key_requests_burst=limits.key_requests_burst,
        provisioning_attempts_per_second=limits.provisioning_attempts_per_second,
        provisioning_attempts_burst=limits.provisioning_attempts_burst,
        open_requests_per_second=limits.open_requests_per_second,
        open_requests_burst=limits.open_requests_burst,
        failed_authentications_per_second=limits.failed_authentications_per_second,
        failed_authentications_burst=limits.failed_authentications_burst,
        sse_streams=limits.sse_streams,
        sse_streams_per_tenant=limits.sse_streams_per_tenant,
        rotation_overlap_seconds=config.security.rotation_overlap_seconds,
        max_body_bytes=limits.body_bytes,
        open_body_bytes=limits.open_body_bytes,
        uplink_payload_bytes=limits.uplink_payload_bytes,
        mqtt=provisioning.mqtt,
        coap=provisioning.coap,
    )


def mqtt_limits(config: Config) -> MqttServerLimits:
    """Of the MQTT server and of each of its peers."""
    mqtt = config.mqtt
    machine = MqttLimits(
        packet_bytes=mqtt.packet_bytes,
        connect_bytes=mqtt.connect_bytes,
        wire=WireLimits(user_properties=mqtt.user_properties, filters=mqtt.filters),
        topic_bytes=mqtt.topic_bytes,
        topic_levels=mqtt.topic_levels,
        client_id_bytes=mqtt.client_id_bytes,
        connect_timeout=mqtt.connect_seconds,
        packet_grace=mqtt.packet_seconds,
        min_packet_rate=mqtt.min_rate_bytes,
        write_stall=mqtt.stalled_seconds,
        keep_alive=mqtt.keep_alive_seconds,
        idle=float(mqtt.idle_seconds),
        receive_maximum=mqtt.receive_maximum,
        unreleased=mqtt.unreleased,
        unanswered_messages=mqtt.receive_maximum,
        unanswered_bytes=mqtt.unanswered_bytes,
        topic_aliases_in=mqtt.topic_aliases,
        topic_aliases_out=mqtt.topic_aliases,
        write_bytes=mqtt.unsent_bytes,
        inflight=mqtt.inflight,
        queued_messages=mqtt.queued_messages,
        queued_bytes=mqtt.queued_bytes,
        subscriptions=mqtt.subscriptions,
        session_expiry=float(mqtt.session_expiry_seconds),
    )
    return MqttServerLimits(
        machine=machine,
        provisioning=mqtt.provisioning_connections,
        provisioning_per_address=mqtt.provisioning_connections_per_address,
        provisioning_seconds=mqtt.provisioning_seconds,
        provisioning_silence=mqtt.provisioning_silent_seconds,
        provisioning_attempts=mqtt.provisioning_requests,
        provisioning_attempts_per_second=config.limits.provisioning_attempts_per_second,
        provisioning_attempts_burst=config.limits.provisioning_attempts_burst,
        taming_longest=mqtt.refused_wait_seconds,
        refusals_per_second=mqtt.refusals_per_second,
        refusals_burst=mqtt.refusals_burst,
        held=mqtt.refused_waiting,
        payload_bytes=config.limits.uplink_payload_bytes,
    )


def messaging_limits(config: Config) -> MessagingLimits:
    """Of what brokered messaging keeps."""
    return MessagingLimits(
        queued_messages=config.mqtt.queued_messages,
        queued_bytes=config.mqtt.queued_bytes,
        full_queue_seconds=config.mqtt.full_queue_seconds,
        tenant_messages=config.mqtt.tenant_queued_messages,
        tenant_bytes=config.mqtt.tenant_queued_bytes,
        retained_messages=config.mqtt.retained_messages,
        retained_bytes=config.mqtt.retained_bytes,
        sessions_per_device=config.mqtt.stored_sessions_per_device,
        waiting=config.mqtt.publish_queue,
        waiting_bytes=config.mqtt.publish_queue_bytes,
    )


def coap_server_limits(config: Config) -> CoapServerLimits:
    """Of the CoAP server."""
    coap = config.coap
    limits = config.limits
    return CoapServerLimits(
        associations_per_device=coap.associations_per_device,
        provisioning=coap.provisioning_associations,
        provisioning_seconds=coap.provisioning_seconds,
        provisioning_attempts_per_second=limits.provisioning_attempts_per_second,
        provisioning_attempts_burst=limits.provisioning_attempts_burst,
        open_requests_per_second=limits.open_requests_per_second,
        open_requests_burst=limits.open_requests_burst,
        key_requests_per_second=limits.key_requests_per_second,
        key_requests_burst=limits.key_requests_burst,
        tenant_requests_per_second=limits.tenant_requests_per_second,
        tenant_requests_burst=limits.tenant_requests_burst,
        payload_bytes=limits.uplink_payload_bytes,
    )


def coap_limits(config: Config) -> CoapLimits:
    """Of CoAP's message layer."""
    body = config.coap.body_bytes
    return CoapLimits(
        requests=config.limits.requests,
        observations_per_peer=config.coap.observations,
        body_bytes=body,
        upload_bytes_per_peer=2 * body,
        upload_bytes=max(CoapLimits().upload_bytes, 4 * body),
    )


def dtls_limits(config: Config) -> DtlsLimits:
    """Of the DTLS listener."""
    coap = config.coap
    return DtlsLimits(
        handshake_timeout=coap.handshake_seconds,
        handshakes_in_flight=coap.handshakes,
        handshakes_per_address=coap.handshakes_per_address,
        associations=coap.associations,
        associations_per_address=coap.associations_per_address,
        idle_timeout=coap.idle_seconds,
        mtu=coap.datagram_bytes,
        fallback_mtu=min(DtlsLimits().fallback_mtu, coap.datagram_bytes),
    )
