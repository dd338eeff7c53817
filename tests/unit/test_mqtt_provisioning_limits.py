"""A peer without credentials may take nothing more than a device may: the operator's `[mqtt]` holds for it as well.

Its own bounds are smaller ones. So of each bound it has the operator's, or a smaller one of its own, and where the
operator goes below that, the operator's.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.server_limits import ServerLimits
from adapters.mqtt.wire import WireLimits

SMALLER = {
    "packet_bytes",
    "receive_maximum",
    "unreleased",
    "inflight",
    "queued_messages",
    "queued_bytes",
    "subscriptions",
    "keep_alive",
}
FIXED = {"unanswered_messages": 1, "topic_aliases_in": 0, "topic_aliases_out": 0, "session_expiry": 0.0}
"""The least that there is."""
NUMBERS = [each.name for each in fields(MqttLimits) if each.name not in {"wire", *FIXED}]


def of_provisioners(machine: MqttLimits) -> MqttLimits:
    return ServerLimits(machine=machine).provisioning_machine


@pytest.mark.parametrize("name", NUMBERS)
def test_what_the_operator_lowers_is_low_for_who_is_nobody_too(name: str) -> None:
    assert getattr(of_provisioners(replace(MqttLimits(), **{name: 3})), name) == 3


@pytest.mark.parametrize("name", NUMBERS)
def test_what_the_operator_raises_is_raised_where_provisioning_has_no_smaller_bound(name: str) -> None:
    raised = getattr(MqttLimits(), name) + 1
    found = getattr(of_provisioners(replace(MqttLimits(), **{name: raised})), name)
    assert found < raised if name in SMALLER else found == raised


def test_the_counts_in_one_packet_are_the_operators() -> None:
    wire = WireLimits(user_properties=3, filters=5)
    assert of_provisioners(MqttLimits(wire=wire)).wire == wire


def test_what_is_fixed_and_a_keep_alive_for_who_may_have_any() -> None:
    made = of_provisioners(MqttLimits(keep_alive=0))
    assert {name: getattr(made, name) for name in FIXED} == FIXED
    assert made.keep_alive == 60
