"""Every key of `[mqtt]` bounds what it says, and every bound of the MQTT server is a key or is told why not.

A key that is read and goes nowhere would be a limit that an operator believes in. So each one is changed alone, and
what the server gets must change in exactly the named places. That a bound holds is tested where it is enforced; that
hitting it is counted, in tests/integration/test_mqtt_limits.py.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.wire import WireLimits
from edge import config as configuration
from edge.limits import messaging_limits, mqtt_limits
from registry.messaging_limits import MessagingLimits

PLACES: dict[str, tuple[str, ...]] = {
    "connect_seconds": ("server.machine.connect_timeout",),
    "packet_bytes": ("server.machine.packet_bytes",),
    "connect_bytes": ("server.machine.connect_bytes",),
    "packet_seconds": ("server.machine.packet_grace",),
    "stalled_seconds": ("server.machine.write_stall",),
    "min_rate_bytes": ("server.machine.min_packet_rate",),
    "client_id_bytes": ("server.machine.client_id_bytes",),
    "topic_bytes": ("server.machine.topic_bytes",),
    "topic_levels": ("server.machine.topic_levels",),
    "topic_aliases": ("server.machine.topic_aliases_in", "server.machine.topic_aliases_out"),
    "user_properties": ("server.machine.wire.user_properties",),
    "filters": ("server.machine.wire.filters",),
    "keep_alive_seconds": ("server.machine.keep_alive",),
    "idle_seconds": ("server.machine.idle",),
    "receive_maximum": ("server.machine.receive_maximum", "server.machine.unanswered_messages"),
    "unanswered_bytes": ("server.machine.unanswered_bytes",),
    "unreleased": ("server.machine.unreleased",),
    "unsent_bytes": ("server.machine.write_bytes",),
    "inflight": ("server.machine.inflight",),
    "queued_messages": ("server.machine.queued_messages", "stored.queued_messages"),
    "queued_bytes": ("server.machine.queued_bytes", "stored.queued_bytes"),
    "full_queue_seconds": ("stored.full_queue_seconds",),
    "subscriptions": ("server.machine.subscriptions",),
    "session_expiry_seconds": ("server.machine.session_expiry",),
    "stored_sessions_per_device": ("stored.sessions_per_device",),
    "publish_queue": ("stored.waiting",),
    "publish_queue_bytes": ("stored.waiting_bytes",),
    "tenant_queued_messages": ("stored.tenant_messages",),
    "tenant_queued_bytes": ("stored.tenant_bytes",),
    "retained_messages": ("stored.retained_messages",),
    "retained_bytes": ("stored.retained_bytes",),
    "provisioning_connections": ("server.provisioning",),
    "provisioning_connections_per_address": ("server.provisioning_per_address",),
    "provisioning_seconds": ("server.provisioning_seconds",),
    "provisioning_silent_seconds": ("server.provisioning_silence",),
    "provisioning_requests": ("server.provisioning_attempts",),
    "refused_wait_seconds": ("server.taming_longest",),
    "refused_waiting": ("server.held",),
    "refusals_per_second": ("server.refusals_per_second",),
    "refusals_burst": ("server.refusals_burst",),
}
ELSEWHERE = {
    "server.payload_bytes": "limits.uplink_payload_bytes",
    "server.provisioning_attempts_per_second": "limits.provisioning_attempts_per_second",
    "server.provisioning_attempts_burst": "limits.provisioning_attempts_burst",
}
FIXED = {
    "server.machine.packets_per_turn": "how the loop is shared out, no bound on anybody",
    "server.taming_first": "where the waiting begins; how far it goes is a key",
    "server.taming_forgotten": "how long a refusal is remembered; how many are is bounded in admission.py",
    "server.crowded_pause": "how a sender is slowed down, not how much it may send",
    "server.full_pause": "likewise",
    "stored.batch": "what one transaction takes; what waits for it is a key",
    "stored.batch_bytes": "likewise",
}
UNBOUNDED = {"host", "port"}


def given(tmp_path: Path, **values: float) -> configuration.Config:
    environ = {f"GATEHOUSE_{name.upper()}": f"{value:.15g}" for name, value in values.items()}
    return configuration.load(None, tmp_path / "D", environ, directory=tmp_path)


def bounds(config: configuration.Config) -> dict[str, Any]:
    """Every bound that the server and the messaging store get, by its place."""
    return {**_leaves("server", mqtt_limits(config)), **_leaves("stored", messaging_limits(config))}


def _leaves(name: str, value: Any) -> dict[str, Any]:
    if not is_dataclass(value):
        return {name: value}
    found: dict[str, Any] = {}
    for each in fields(value):
        found.update(_leaves(f"{name}.{each.name}", getattr(value, each.name)))
    return found


def test_every_key_is_a_bound_and_every_bound_a_key(tmp_path: Path) -> None:
    keys = {key.name for key in configuration.KEYS.values() if key.section == "mqtt"}
    assert keys - UNBOUNDED == set(PLACES)
    named = [place for places in PLACES.values() for place in places]
    assert sorted([*named, *ELSEWHERE, *FIXED]) == sorted(bounds(given(tmp_path)))


@pytest.mark.parametrize("key", [*PLACES])
def test_a_key_changes_what_it_says_and_nothing_else(tmp_path: Path, key: str) -> None:
    before = bounds(given(tmp_path))
    was = before[PLACES[key][0]]
    value = was - 1 if key in ("topic_bytes", "topic_levels") else was + 1  # these two cannot be raised
    after = bounds(given(tmp_path, **{f"mqtt__{key}": value}))
    assert {place: after[place] for place in after if after[place] != before[place]} == dict.fromkeys(
        PLACES[key], value
    )


@pytest.mark.parametrize(("place", "dotted"), ELSEWHERE.items())
def test_bounds_that_other_sections_set(tmp_path: Path, place: str, dotted: str) -> None:
    before = bounds(given(tmp_path))
    after = bounds(given(tmp_path, **{dotted.replace(".", "__"): before[place] + 1}))
    assert {name for name in after if after[name] != before[name]} == {place}


def test_the_defaults_of_the_file_are_those_of_the_server(tmp_path: Path) -> None:
    """But for one, which the page tells: a packet has room for an uplink of the largest size and its topic."""
    standing = {
        **_leaves("server", ServerLimits(MqttLimits(wire=WireLimits()))),
        **_leaves("stored", MessagingLimits()),
    }
    configured = bounds(given(tmp_path))
    assert {name for name in standing if standing[name] != configured[name]} == {"server.machine.packet_bytes"}
