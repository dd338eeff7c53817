"""What comes down to one connection: commands and configuration of its device, and of children that it subscribed for.

    a filter for `…/commands` is granted ─► Commands.attach ─► deliver ─► PUBLISH ─► PUBACK ─► Commands.delivered
    a filter for `…/config` is granted   ─► DeviceConfigs.attach ─► the present one, then each newer one

Nothing of this is kept in the MQTT session: the core keeps commands until they are answered and the configuration for
ever, and attaching brings what is unfinished (retained meaning, as CONTRACT §3 says; hence once for each SUBSCRIBE of a
configuration). So a command is delivered at least once, in order, and known by its `command_id`; QoS 1 at most. Where
the connection has no room now, it is tried again: commands from the first that was not sent, the newest configuration
only. A command above the client's Maximum Packet Size is passed over: it stays queued, for a connection that takes it.

A message's topic is spelled as the filter that asked for it: `devices/me/…` for who subscribed so, because clients
hand messages out by matching their own filters.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from adapters.mqtt.authorization import COMMANDS, CONFIG, ME, Downlink
from adapters.mqtt.properties import Properties
from adapters.mqtt.session import Untaken
from adapters.mqtt.session_values import Delivery, Message, Subscription
from adapters.mqtt.topics import matches
from adapters.mqtt.wire_packets import QoS
from registry.commands import Command, CommandAttachment, encode_command
from registry.device_config import ConfigAttachment, DeviceConfig, encode_config
from registry.model import CommandId, DeviceId

if TYPE_CHECKING:
    from adapters.mqtt.device import DeviceRole

AGAIN_SECONDS: Final = 2.0
"""What could not be sent (the session's queue is full, or the peer does not read) is tried again after this, or when
a delivery of the session is done."""
_JSON: Final = Properties(payload_format_indicator=1, content_type="application/json")


class Downlinks:
    """Those of one connection."""

    __slots__ = ("_keys", "_lines", "_role", "waiting")

    def __init__(self, role: DeviceRole) -> None:
        self._role = role
        self.waiting: set[_Line] = set()
        """Those that could not send."""
        self._lines: dict[DeviceId, _Line] = {}
        self._keys = 0

    def opened(self, asked: Downlink, subscription: Subscription) -> None:
        """A filter is granted: attach what it matches."""
        line = self._lines.get(asked.device_id)
        if line is None:
            line = self._lines[asked.device_id] = _Line(self, self._role, asked.device_id)
        line.opened(asked, subscription)

    def closed(self, asked: Downlink) -> None:
        """A filter is gone."""
        line = self._lines.get(asked.device_id)
        if line is not None and line.closed(asked):
            del self._lines[asked.device_id]

    def close(self) -> None:
        """The connection is gone."""
        for line in self._lines.values():
            line.detach()
        self._lines.clear()

    def finished(self, key: int, *, arrived: bool) -> bool:
        """A delivery of this key is done, or was given up; whether it was one of ours."""
        return any(line.finished(key, arrived=arrived) for line in self._lines.values())

    def room(self) -> None:
        """There may be room now for what could not be sent."""
        for line in tuple(self.waiting):
            line.room()

    def next_key(self) -> int:
        """A name for a delivery. Negative: the broker's are not."""
        self._keys -= 1
        return self._keys


class _Line:
    """One device's, as a listener of its commands and its configuration."""

    def __init__(self, owner: Downlinks, role: DeviceRole, device_id: DeviceId) -> None:
        self._owner = owner
        self._role = role
        self._device_id = device_id
        self._subscribed: dict[str, tuple[Downlink, Subscription]] = {}
        self._commands: CommandAttachment | None = None
        self._config: ConfigAttachment | None = None
        self._in_flight: dict[int, CommandId] = {}
        self._unsent: DeviceConfig | None = None
        """The newest configuration, where there was no room for it."""
        self._retry: asyncio.TimerHandle | None = None
        self._given = 0
        """The `seq` of the last command that was sent."""
        self._retry_commands: asyncio.TimerHandle | None = None
        """Where there was no room for the one behind it."""

    def opened(self, asked: Downlink, subscription: Subscription) -> None:
        self._subscribed[asked.filter.text] = asked, subscription
        registry, role = self._role.registry, self._role
        tenant_id = role.session.tenant_id
        via = None if self._device_id == role.own else role.own
        if COMMANDS in asked.tails and self._commands is None:
            self._given = 0
            self._commands = registry.commands.attach(tenant_id, self._device_id, self, via=via)
        if CONFIG in asked.tails:  # each time, as a retained message would come
            if self._config is not None:
                registry.device_configs.detach(self._config)
            self._config = registry.device_configs.attach(tenant_id, self._device_id, self, via=via)

    def closed(self, asked: Downlink) -> bool:
        """Whether nothing is left."""
        self._subscribed.pop(asked.filter.text, None)
        if self._commands is not None and self._way(COMMANDS) is None:
            self._role.registry.commands.detach(self._commands)
            self._commands = None
            self._forget_retry()
        if self._config is not None and self._way(CONFIG) is None:
            self._role.registry.device_configs.detach(self._config)
            self._config = None
            self._forget_unsent()
        return not self._subscribed

    def detach(self) -> None:
        registry = self._role.registry
        if self._commands is not None:
            registry.commands.detach(self._commands)
        if self._config is not None:
            registry.device_configs.detach(self._config)
        self._commands = self._config = None
        self._forget_unsent()
        self._forget_retry()

    def finished(self, key: int, *, arrived: bool) -> bool:
        command_id = self._in_flight.pop(key, None)
        if command_id is None:
            return False
        if self._commands is not None:
            commands = self._role.registry.commands
            (commands.delivered if arrived else commands.passed_over)(self._commands, command_id)
        return True

    # What the core calls (registry.commands.CommandListener, registry.device_config.ConfigListener) -------------------

    def deliver(self, command: Command) -> None:
        if self._retry_commands is not None:
            return  # there was no room for one before it, with which it comes again
        key = self._owner.next_key()
        taken = self._send(COMMANDS, encode_command(command), key)
        if taken is None or (isinstance(taken, Untaken) and taken is not Untaken.TOO_LARGE):
            self._retry_commands = self._role.server.loop.call_later(AGAIN_SECONDS, self._again)
            return
        self._given = command.seq
        self._in_flight[key] = command.command_id
        if taken in (0, Untaken.TOO_LARGE):  # QoS 0: it has left, or never will, and nobody will say that it arrived
            self.finished(key, arrived=taken == 0)

    def configure(self, config: DeviceConfig) -> None:
        self._forget_unsent()
        taken = self._send(CONFIG, encode_config(config), self._owner.next_key())
        if taken is Untaken.QUEUE_FULL or taken is Untaken.SLOW:
            self._unsent = config
            self._owner.waiting.add(self)
            self._retry = self._role.server.loop.call_later(AGAIN_SECONDS, self.room)

    def room(self) -> None:
        """Try again what there was no room for."""
        if self._unsent is not None:
            self.configure(self._unsent)

    def _forget_unsent(self) -> None:
        self._unsent = None
        self._owner.waiting.discard(self)
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None

    def _forget_retry(self) -> None:
        if self._retry_commands is not None:
            self._retry_commands.cancel()
            self._retry_commands = None

    def _again(self) -> None:
        self._retry_commands = None
        if self._commands is None:
            return
        commands, via = self._role.registry.commands, self._commands.via
        commands.detach(self._commands)
        self._commands = commands.attach(
            self._role.session.tenant_id, self._device_id, self, via=via, behind=self._given
        )

    def _send(self, tail: tuple[str, ...], payload: bytes, key: int) -> int | Untaken | None:
        way = self._way(tail)
        if way is None or self._role.session.closed:
            return None
        topic, subscription = way
        qos = min(subscription.qos, QoS.AT_LEAST_ONCE)
        identifiers = () if subscription.identifier is None else (subscription.identifier,)
        delivery = Delivery(Message(topic, payload, qos, properties=_JSON), qos, False, identifiers, key)
        taken = self._role.mqtt.deliver(delivery, self._role.server.now())
        self._role.peer.poke()
        return taken

    def _way(self, tail: tuple[str, ...]) -> tuple[str, Subscription] | None:
        """The topic and the subscription that something goes down by."""
        found: tuple[str, Subscription] | None = None
        for asked, subscription in self._subscribed.values():
            if tail not in asked.tails:
                continue
            by_name = matches(asked.filter.levels, ("devices", str(self._device_id), *tail))
            name = str(self._device_id) if by_name else ME
            if found is None or subscription.qos > found[1].qos:
                found = "/".join(("devices", name, *tail)), subscription
        return found
