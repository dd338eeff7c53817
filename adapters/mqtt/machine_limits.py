"""The bounds of one connection and one session, each with its reason. Times in seconds, sizes in bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapters.mqtt.topics import MAX_TOPIC_BYTES, MAX_TOPIC_LEVELS
from adapters.mqtt.wire import WireLimits


@dataclass(frozen=True, slots=True)
class MqttLimits:
    """What one peer may take. The server multiplies by its connections."""

    connect_bytes: int = 32_768  # before anybody is known: ids, a key and a will of a few KB
    packet_bytes: int = 262_144  # afterwards; announced as Maximum Packet Size
    wire: WireLimits = field(default_factory=WireLimits)
    topic_bytes: int = MAX_TOPIC_BYTES
    topic_levels: int = MAX_TOPIC_LEVELS
    client_id_bytes: int = 256  # the protocol asks for 23; people use UUIDs and names
    connect_timeout: float = 10.0  # from the first byte that could be sent to a whole CONNECT
    packet_grace: float = 20.0  # for a packet that has begun, plus the time that its bytes take at
    min_packet_rate: int = 64  # bytes per second, in both directions; NB-IoT at its worst does a few hundred
    write_stall: float = 20.0  # a peer that takes next to nothing of what we write for this long is cut
    keep_alive: int = 3_600  # asked of clients of 5.0 that want more or none; a dead peer must not stay for ever
    idle: float = 86_400.0  # silence of a client that asked for no keep-alive, or a longer one; 0 allows any
    receive_maximum: int = 256  # incoming QoS 1 and 2 that are not acknowledged; feeds a whole group commit
    unreleased: int = 1_024  # incoming QoS 2 of 3.1.1, which has no receive maximum, waiting for PUBREL
    unanswered_messages: int = 256  # incoming messages of any QoS being stored; then reading stops
    unanswered_bytes: int = 1_048_576
    packets_per_turn: int = 64  # taken from one peer before the others have their turn: a few milliseconds at most
    topic_aliases_in: int = 16  # x topic_bytes each
    topic_aliases_out: int = 16
    inflight: int = 128  # outgoing QoS 1 and 2 on the way, at most; the client's Receive Maximum may say less
    write_bytes: int = 65_536  # encoded and not yet taken by the network; then QoS 0 is dropped and the rest waits
    queued_messages: int = 1_000  # outgoing QoS 1 and 2 of a session, on the way ones included
    queued_bytes: int = 1_048_576
    subscriptions: int = 128  # of a session; a gateway needs about one for each child
    session_expiry: float = 7 * 86_400.0  # the longest that a session outlives its connection, and 3.1.1's

    def __post_init__(self) -> None:
        if not 0 < self.queued_messages < 32_768:
            raise ValueError(f"queued_messages {self.queued_messages}; packet ids allow 1 to 32767")
        if not 0 < self.receive_maximum <= 0xFFFF:
            raise ValueError(f"receive_maximum {self.receive_maximum}; the protocol allows 1 to 65535")
        if self.unanswered_messages < 1 or self.inflight < 1:
            raise ValueError("unanswered_messages and inflight are at least 1")
        if not 0 <= self.topic_aliases_in <= 0xFFFF:
            raise ValueError(f"topic_aliases_in {self.topic_aliases_in}; the protocol allows 0 to 65535")
        if not 0 <= self.keep_alive <= 0xFFFF:
            raise ValueError(f"keep_alive {self.keep_alive}; the protocol allows 0 (any) to 65535")
        if self.idle < 0:
            raise ValueError(f"idle {self.idle}; seconds, or 0 for any")
