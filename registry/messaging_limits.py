"""How much brokered messaging keeps, each bound with its reason. Sizes in bytes, times in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class MessagingLimits:
    """Hitting a bound is an explicit refusal; nothing is dropped silently."""

    queued_messages: int = 1_000
    """In one session's queue. An owner numbers them with packet ids, of which there are 65,535; and a queue is loaded
    whole when its client comes back. An adapter's own bound for a session must be no lower, or messages wait."""
    queued_bytes: int = 1_048_576
    """The same in bytes."""
    full_queue_seconds: float = 10.0
    """How long a session whose queue is full, and which takes nothing, may hold up the senders of its topics before it
    is ended (full_queues.py). 0: until it expires."""
    tenant_messages: int = 1_000_000
    """In all queues of a tenant together, judged by a figure that is some seconds old: one tenant must not fill the
    disk of all."""
    tenant_bytes: int = 1_073_741_824
    """The same in bytes; a body that many queues share counts in each."""
    retained_messages: int = 10_000
    """Of a tenant, exactly: a subscription to everything is sent all of them."""
    retained_bytes: int = 67_108_864
    """The same in bytes."""
    sessions_per_device: int = 16
    """Stored: a device needs one; client ids that change with every start must not pile up."""
    batch: int = 500
    """Publications in one transaction, some ten milliseconds."""
    batch_bytes: int = 4 * 1024 * 1024
    """The same in bytes."""
    waiting: int = 10_000
    """Publications waiting for a batch."""
    waiting_bytes: int = 64 * 1024 * 1024
    """The same in bytes."""

    def __post_init__(self) -> None:
        if not 0 < self.queued_messages <= 32_767:
            raise ValueError(f"queued_messages {self.queued_messages}; packet ids allow 1 to 32767")


DEFAULT_LIMITS: Final = MessagingLimits()
