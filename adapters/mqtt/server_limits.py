"""The bounds of the MQTT server as a whole, each with its reason; those of one peer are in machine_limits.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters.mqtt.machine_limits import MqttLimits


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Times in seconds, sizes in bytes."""

    machine: MqttLimits = field(default_factory=MqttLimits)
    provisioning: int = 500  # connections at once without credentials
    provisioning_per_address: int = 64  # of these; a rack of devices that boots together comes in turns
    provisioning_seconds: float = 60.0  # from CONNECT to the end; a claim over a slow radio takes ten
    provisioning_attempts: int = 20  # requests on one such connection
    provisioning_attempts_per_second: float = 100.0  # from one address, as over HTTPS
    provisioning_attempts_burst: int = 1_000
    taming_first: float = 0.5  # the second try of a refused credential waits so long, each further one twice as long
    taming_longest: float = 8.0  # clients give up on CONNACK after ten to thirty
    taming_forgotten: float = 120.0  # without another try
    refusals_per_second: float = 20.0  # of one address, answered at once; what comes above that waits for its answer
    refusals_burst: int = 200
    held: int = 1_000  # refused connections that wait; beyond it they are closed at once
    crowded_pause: float = 0.05  # how long a sender waits when half of the core's queue is taken: not until it is empty
    full_pause: float = 0.25  # how long reading stops when the core is full
    payload_bytes: int = 262_144  # of one uplink

    @property
    def provisioning_machine(self) -> MqttLimits:
        """What a peer without credentials may take: one small request after the other."""
        return MqttLimits(
            connect_bytes=self.machine.connect_bytes,
            packet_bytes=65_536,
            receive_maximum=8,
            unanswered_messages=1,
            inflight=8,
            queued_messages=32,
            queued_bytes=262_144,
            subscriptions=8,
            topic_aliases_in=0,
            topic_aliases_out=0,
            session_expiry=0.0,
            keep_alive=60,
        )
