"""The shell looks at a connection's timer only when a deadline can have come closer: `timer_stands` must say when.

A walk through what moves deadlines, in an order of a seeded chance; after each step, as long as `timer_stands`, no
deadline may lie before the one that was told last.
"""

from __future__ import annotations

import random

import pytest

from adapters.mqtt.connection import Connection
from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.session import Session
from adapters.mqtt.wire import encode
from adapters.mqtt.wire_packets import Connect, Ping, Publish, QoS
from adapters.mqtt.wire_reasons import PacketType, Version

STEPS = 400
PUBLISH = encode(Publish("site/a", b"x" * 40, QoS.AT_MOST_ONCE), Version.V5)
PING = encode(Ping(PacketType.PINGREQ), Version.V5)


def taken(connection: Connection, now: float) -> None:
    """As the shell does: all events, all output."""
    while connection.next_event(now) is not None or connection.data_to_send(now):
        pass


@pytest.mark.parametrize("seed", range(20))
def test_a_deadline_that_stands_never_comes_closer(seed: int) -> None:
    chance = random.Random(seed)
    connection, now = Connection(MqttLimits(), 0.0), 0.0
    connection.receive(encode(Connect(Version.V5, "one", keep_alive=60), Version.V5), now)
    told = connection.next_timer()
    taken(connection, now)
    assert not connection.timer_stands  # the next state has deadlines of its own
    connection.accept(Session(connection.limits), session_present=False, now=now)
    assert not connection.timer_stands
    rest = b""
    seen: set[str] = set()
    for _ in range(STEPS):
        now += chance.random()
        step = chance.choice(("whole", "part", "rest", "stall", "taking", "flow"))
        match step:
            case "whole" if not rest:
                connection.receive(PUBLISH, now)
            case "part" if not rest:
                cut = chance.randrange(1, len(PUBLISH))
                connection.receive(PUBLISH[:cut], now)
                rest = PUBLISH[cut:]
            case "rest" if rest:
                connection.receive(rest + PING, now)
                rest = b""
            case "stall":
                connection.pause_writing(now)
            case "taking":
                connection.taking(now)
            case "flow":
                connection.resume_writing(now)
            case _:
                continue
        taken(connection, now)
        seen.add(step)
        stood = connection.timer_stands
        due = connection.next_timer()
        assert due is not None
        assert told is not None
        if stood:
            assert due >= told, f"{step}: {due} is before {told}"
        told = due
        assert connection.timer_stands
    assert seen == {"whole", "part", "rest", "stall", "taking", "flow"}
