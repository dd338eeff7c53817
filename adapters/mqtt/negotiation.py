"""What a CONNECT asks for and what it is given: session expiry, keep-alive, and what CONNACK says of it. Pure.

What is given as it was asked for is not said, what is less is (5.0 §3.2.2.3). 3.1.1 has no words for any of it. Times
in seconds.
"""

from __future__ import annotations

from typing import Final

from adapters.mqtt.machine_limits import MqttLimits
from adapters.mqtt.properties import Properties
from adapters.mqtt.session_values import NEVER
from adapters.mqtt.wire_packets import Connect
from adapters.mqtt.wire_reasons import Version

_FOREVER: Final = 0xFFFF_FFFF  # a session expiry interval without end, 5.0 §3.1.2.11.2


def granted_expiry(connect: Connect, limits: MqttLimits) -> float:
    """How long the session of this CONNECT outlives its connection; `NEVER` for no end."""
    if connect.version is Version.V311:
        return 0.0 if connect.clean_start else limits.session_expiry
    return shortened_expiry(connect.properties.session_expiry_interval or 0, limits)


def shortened_expiry(interval: int, limits: MqttLimits) -> float:
    """A session expiry interval, as far as it is allowed."""
    return min(NEVER if interval == _FOREVER else float(interval), limits.session_expiry)


def kept_alive(connect: Connect, limits: MqttLimits) -> float:
    """The keep-alive that counts in 5.0; 0 for none."""
    return float(limits.keep_alive if _is_too_long(connect, limits) else connect.keep_alive)


def connack_properties(
    connect: Connect,
    limits: MqttLimits,
    expiry: float,
    client_id: str | None,
    response_information: str | None,
) -> Properties:
    """Of a CONNACK that accepts. `client_id`: an assigned one."""
    asked = connect.properties.session_expiry_interval or 0
    given = _FOREVER if expiry == NEVER else int(expiry)
    wanted = bool(connect.properties.request_response_information)  # [MQTT-3.1.2-28]
    return Properties(
        session_expiry_interval=given if given != asked else None,
        receive_maximum=limits.receive_maximum if limits.receive_maximum != 0xFFFF else None,
        maximum_packet_size=limits.packet_bytes,
        topic_alias_maximum=limits.topic_aliases_in or None,
        assigned_client_identifier=client_id,
        server_keep_alive=limits.keep_alive if _is_too_long(connect, limits) else None,
        response_information=response_information if wanted else None,
    )


def _is_too_long(connect: Connect, limits: MqttLimits) -> bool:
    most = limits.keep_alive
    return bool(most) and (connect.keep_alive == 0 or connect.keep_alive > most)
