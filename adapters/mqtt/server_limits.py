"""The bounds of the MQTT server as a whole, each with its reason; those of one peer are in machine_limits.py."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from adapters.mqtt.machine_limits import MqttLimits


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Times in seconds, sizes in bytes."""

    machine: MqttLimits = field(default_factory=MqttLimits)
    provisioning: int = 500  # connections at once without credentials
    provisioning_per_address: int = 64  # of these; a rack of devices that boots together comes in turns
    provisioning_seconds: float = 60.0  # from CONNECT to the end; a claim over a slow radio takes ten
    provisioning_silence: float = 10.0  # until its first request; who only holds a place has it no longer than that
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
        """What a peer without credentials may take: one small request after the other, and of nothing more than a
        device may."""
        most = self.machine
        return replace(
            most,
            packet_bytes=min(65_536, most.packet_bytes),
            receive_maximum=min(8, most.receive_maximum),
            unreleased=min(8, most.unreleased),
            unanswered_messages=1,
            inflight=min(8, most.inflight),
            queued_messages=min(32, most.queued_messages),
            queued_bytes=min(262_144, most.queued_bytes),
            subscriptions=min(8, most.subscriptions),
            topic_aliases_in=0,
            topic_aliases_out=0,
            session_expiry=0.0,
            keep_alive=min(60, most.keep_alive or 60),
        )
