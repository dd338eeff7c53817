"""What a device observes: its configuration, and the queue of its commands (RFC 7641).

    GET /config   Observe 0 ─► the present one; a notification with each newer one, the newest only
    GET /commands Observe 0 ─► the first unfinished command, or nothing; a notification with each further one

Configuration is a state, so what was replaced meanwhile is passed over, as the RFC wants it. Commands are a queue: each
must arrive, in order, and a notification that a newer one took the place of would be lost. So `/commands` shows one
command at a time. The next is sent when the client has acknowledged the one before; then that counts as delivered. At
most one is on its way. Those that wait here may be cancelled, expire, or be answered after a GET meanwhile: what the
core no longer counts as unconfirmed is passed over when its turn comes.

An observation that ends, by the client, its silence or its association, loses nothing: the core keeps commands until
they are answered, and the next GET or registration begins with the first unfinished one. So a command arrives at least
once, and is known by its `command_id`.

A session that is closed gets nothing more, though its association may stand for a moment yet.
"""

from __future__ import annotations

from collections import deque

from aiocoap.numbers.codes import Code
from msgspec.structs import replace

from adapters.coap.formats import content
from adapters.coap.ports import Observation, Response
from registry.commands import Command, CommandAttachment, Commands, encode_command
from registry.device_config import ConfigAttachment, DeviceConfig, DeviceConfigs, encode_config
from registry.sessions import Session


def config_response(config: DeviceConfig, content_format: int) -> Response:
    """2.05 with a configuration; its version is the ETag."""
    return content(encode_config(config), content_format, etag=config_tag(config))


def config_tag(config: DeviceConfig) -> bytes:
    """The ETag of a configuration: 1 to 8 bytes (RFC 7252 §5.10.6)."""
    return config.version.to_bytes(8, "big").lstrip(b"\0") or b"\0"


def command_response(command: Command | None, content_format: int) -> Response:
    """2.05 with a command; without a payload where there is none. It is nobody's to cache: it changes by itself."""
    if command is None:
        return Response(Code.CONTENT, max_age=0)
    return content(encode_command(command), content_format, max_age=0)


class ConfigObserver:
    """Sends newer configurations (registry.device_config.ConfigListener)."""

    def __init__(self, configs: DeviceConfigs, session: Session, observation: Observation, content_format: int) -> None:
        self._configs = configs
        self._session = session
        self._observation = observation
        self._format = content_format
        self._attachment: ConfigAttachment | None = None

    def start(self, present: DeviceConfig) -> None:
        """Take the observation; `present` is what the registration is answered with."""
        session = self._session
        self._attachment = self._configs.attach(session.tenant_id, session.device_id, self, seen=present.version)
        self._observation.accept(self._cancelled)

    def configure(self, config: DeviceConfig) -> None:
        if not self._session.closed:
            self._observation.notify(config_response(config, self._format))

    def _cancelled(self) -> None:
        if self._attachment is not None:
            self._configs.detach(self._attachment)
            self._attachment = None


class CommandObserver:
    """Sends commands one after the other (registry.commands.CommandListener)."""

    def __init__(self, commands: Commands, session: Session, observation: Observation, content_format: int) -> None:
        self._commands = commands
        self._session = session
        self._observation = observation
        self._format = content_format
        self._attachment: CommandAttachment | None = None
        self._waiting: deque[Command] = deque()
        self._on_its_way: Command | None = None

    def start(self, first: Command | None, *, behind: int) -> Response:
        """Take the observation; the registration's answer. `first` is the first command whose `seq` is beyond `behind`.

        A command is answered separately: were the answer lost, the next command would be taken for it.
        """
        session = self._session
        behind = behind if first is None else first.seq
        self._attachment = self._commands.attach(session.tenant_id, session.device_id, self, behind=behind)
        self._observation.accept(self._cancelled)
        return replace(command_response(first, self._format), separate=first is not None)

    def deliver(self, command: Command) -> None:
        self._waiting.append(command)
        if self._on_its_way is None:
            self._send_next()

    def _send_next(self) -> None:
        self._on_its_way = self._next_wanted()
        if self._on_its_way is not None:
            self._observation.notify(command_response(self._on_its_way, self._format), self._delivered)

    def _next_wanted(self) -> Command | None:
        while self._attachment is not None and self._waiting and not self._session.closed:
            command = self._waiting.popleft()
            if command.command_id in self._attachment.unconfirmed:
                return command
        return None

    def _delivered(self) -> None:
        if self._attachment is not None and self._on_its_way is not None:
            self._commands.delivered(self._attachment, self._on_its_way.command_id)
        self._send_next()

    def _cancelled(self) -> None:
        self._waiting.clear()
        if self._attachment is not None:
            self._commands.detach(self._attachment)
            self._attachment = None
