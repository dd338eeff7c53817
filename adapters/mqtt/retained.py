"""Retained messages that one session's new subscriptions are owed: sent one after the other, by one task at most.

    SUBSCRIBE granted ─► owe ─► (by filter, in order) ─► topics that match ─► messages in portions ─► deliver or enqueue
                                       ▲                                               │ no room: wait, look again
                                       └── subscribed again: starts from the beginning ┘

Every SUBSCRIBE is owed every retained message that matches (5.0 §3.8.4), and a client may ask for them without end. So
what is owed is kept by filter: who asks again before all was sent gets all of it once more, from the beginning, and not
twice over. What waits is bounded by the session's subscriptions, and what runs is one task.

A stored session gets QoS 1 and 2 through its queue in the store, like any message. Nothing is dropped for want of room:
a peer that does not read is cut by the machine (`write_stall`); one that does not acknowledge keeps but itself waiting.

What can race: the subscription is replaced or removed while its messages are read; sending stops at the next one. A
message is replaced, or cleared, between its reading and its sending: what replaced it may have been sent already, and
is to be the last word. So it is read again; that it was replaced is told by the store, which looks while it holds the
session, or by what is sent meanwhile (`replaced`). What is being stored when the sending begins may have been routed
before the subscription stood: it is waited for, as far as this node stores it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from adapters.mqtt.messages import from_store
from adapters.mqtt.session import Untaken
from adapters.mqtt.session_values import Subscription, retained_delivery_of
from adapters.mqtt.topics import matches
from adapters.mqtt.wire_packets import QoS
from adapters.mqtt.wire_reasons import ReasonCode
from registry.errors import RegistryError
from registry.messaging_values import Retained, RetainedReplaced

if TYPE_CHECKING:
    from adapters.mqtt.device import DeviceRole

AT_ONCE: Final = 50
"""Messages read at a time."""
ROOM_SECONDS: Final = 5.0
"""How long a message waits for its receiver to acknowledge something, before it is looked at again."""
SLOW_SECONDS: Final = 0.05
"""The same of QoS 0, for the receiver's network to take something."""


class RetainedMessages:
    """Those of one session."""

    __slots__ = ("_owed", "_read", "_replaced", "_role", "_sending")

    def __init__(self, role: DeviceRole) -> None:
        self._role = role
        self._owed: dict[str, Subscription] = {}
        self._sending = False
        self._read: frozenset[str] = frozenset()
        """Topics whose messages are read, or being read, and not all sent."""
        self._replaced: frozenset[str] = frozenset()
        """Of these, the ones that have another message by now."""

    def replaced(self, topic: str) -> None:
        """A message that is retained under this topic is being sent, by itself."""
        if topic in self._read:
            self._replaced |= {topic}

    def owe(self, subscription: Subscription) -> None:
        """A subscription is granted, and SUBACK is on its way."""
        text = subscription.filter.text
        self._owed.pop(text, None)
        self._owed[text] = subscription
        if not self._sending:
            self._sending = True
            self._role.peer.start(self._send_all())

    async def _send_all(self) -> None:
        try:
            while self._owed and self._role.peer.alive:
                await self._send(self._owed.pop(next(iter(self._owed))))
        except RegistryError:  # what was sent is not known; the client asks again
            self._role.peer.end(ReasonCode.SERVER_BUSY, publish_will=True)
        finally:
            self._sending = False
            self._read = self._replaced = frozenset()

    async def _send(self, subscription: Subscription) -> None:
        """Raises SessionLost, Unavailable."""
        role, levels = self._role, subscription.filter.levels
        messaging = role.broker.messaging
        await messaging.published()
        topics = await messaging.retained_topics(role.tenant_id, _prefix(levels))
        wanted = [topic for topic in topics if matches(levels, tuple(topic.split("/")))]
        for start in range(0, len(wanted), AT_ONCE):
            self._read, self._replaced = frozenset(wanted[start : start + AT_ONCE]), frozenset()
            for kept in await messaging.retained(role.tenant_id, wanted[start : start + AT_ONCE]):
                if not await self._give(subscription, kept):
                    return

    async def _give(self, subscription: Subscription, kept: Retained) -> bool:
        """Whether the connection still lives and wants it."""
        role, topic = self._role, kept.message.topic
        while role.peer.alive and role.mqtt.subscriptions.get(subscription.filter.text) is subscription:
            if topic in self._replaced:
                self._replaced -= {topic}
                now = await role.broker.messaging.retained(role.tenant_id, [topic])
                if not now:
                    return True
                (kept,) = now
                continue
            delivery = retained_delivery_of(from_store(kept.message, role.server.ahead), subscription)
            if role.ownership is not None and delivery.qos is not QoS.AT_MOST_ONCE:
                try:
                    if await role.broker.enqueue(role, role.ownership, delivery, kept):
                        return True
                except RetainedReplaced:
                    self._replaced |= {topic}
                    continue
                await role.room(ROOM_SECONDS)
                continue
            match role.mqtt.deliver(delivery, role.server.now()):
                case Untaken.QUEUE_FULL:
                    await role.room(ROOM_SECONDS)
                case Untaken.SLOW:
                    await role.room(SLOW_SECONDS)
                case _:
                    role.peer.poke()
                    return True
        return False


def _prefix(levels: tuple[str, ...]) -> str:
    """The filter up to its first wildcard: what every topic that it matches begins with."""
    fixed: list[str] = []
    for level in levels:
        if level == "#":  # `sport/#` matches `sport` as well
            return "/".join(fixed)
        if level == "+":
            return "/".join(fixed) + ("/" if fixed else "")
        fixed.append(level)
    return "/".join(fixed)
