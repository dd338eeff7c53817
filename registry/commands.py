"""Commands to devices: queued by operators, delivered in order until answered, each finished once.

The statuses and the steps between them are a table (command_steps.py); what has no entry is refused. Every step locks
the command's row, so of two answers, of an answer and a cancellation, of a delivery and an expiry, the first to lock
decides and the other sees it. The first answer stands: repeating it, or sending another, changes nothing and is told
the status that stands.

Persistent from the answer to the operator until `expires_at`. Delivered *at least* once: an unanswered command comes
again whenever the device comes back, in the order of queueing, and a device knows repetitions by `command_id`. What
can be lost: the mark that a command was delivered (it is then delivered again). What can happen: a command that is
cancelled or expires while it is on its way is executed all the same, and its answer is refused.

Three ways down, one order (`seq`, counted under the device's lock):

    attach(listener)    a live session on this node: everything unfinished now, and each new command as it is queued on
                        any node (the event feed); at most `window` at a time that the transport has not confirmed
    next(wait)          a poll: the first unfinished command, waiting for one if need be
    the feed            wakes both; followed by cursor, so that a lost hint is a delay

Expiry is judged by the clock when a command is read or answered, and written by a sweep every second, by one node.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final, Protocol, assert_never
from uuid import UUID

from registry import fields
from registry.batching import Batcher
from registry.command_payloads import (
    MAX_ERROR_CODE,
    MAX_ERROR_MESSAGE,
    CommandResponse,
    Failed,
    Succeeded,
    encode_command,
    response_from,
)
from registry.command_steps import STEPS, Step, event_of, stepped
from registry.downlinks import Attachment, Downlinks
from registry.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from registry.events import EventKind
from registry.feed import Seen
from registry.model import Actor, CommandId, DeviceId, Json, SessionId, TenantId
from registry.observation import NOBODY, Limit, Observer
from registry.paging import Listing, Page, decode_cursor, listing
from registry.payloads import Payload, Source, payload_from_json
from registry.ports import Clock, EventHint
from registry.secrets import RandomBytes
from registry.storage import audit, devices, events
from registry.storage import commands as storage
from registry.storage.commands import UNFINISHED, Command, CommandError, CommandStatus, Wanted
from registry.storage.database import Connection, Database

__all__ = [
    "MAX_ERROR_CODE",
    "MAX_ERROR_MESSAGE",
    "Command",
    "CommandError",
    "CommandResponse",
    "CommandStatus",
    "Commands",
    "Failed",
    "Succeeded",
    "encode_command",
    "response_from",
]

METHOD: Final = r"[A-Za-z][A-Za-z0-9_.:/-]{0,127}"
"""What a method may be called: a name for a topic, a log line and a switch statement."""
DEFAULT_TTL: Final = timedelta(days=1)
MAX_TTL: Final = timedelta(days=90)
"""A command that nobody has fetched in a season is a surprise, not a wish."""
MAX_WAIT_SECONDS: Final = 60.0
"""Proxies and NATs forget silent connections soon after a minute."""
EXPIRY_SECONDS: Final = 1.0
_EXPIRED_AT_ONCE: Final = 500
_MARKED_AT_ONCE: Final = 500
_MARKS_QUEUED: Final = 50_000
"""Marks that wait for the database; beyond it they are lost, and their commands are delivered once more."""

_METHOD = re.compile(METHOD)


@dataclass(frozen=True, slots=True)
class CommandLimits:
    """What commands may take up. An answer may be as large as an uplink's payload; who reads it checks that."""

    params_bytes: int = 32_768
    """JSON of `params`: what a constrained device can be expected to take, with room to spare."""
    unfinished: int = 1_000
    """Commands of one device: above what any operator has in mind for one that is away for a day."""
    window: int = 16
    """Commands given to a live session that its transport has not confirmed: the rest stays in the database."""
    waits: int = 20_000
    """Polls that wait on one node, about 10 KB each."""


_OVER: Final = frozenset({EventKind.COMMAND_FINISHED, EventKind.COMMAND_EXPIRED, EventKind.COMMAND_CANCELLED})
_NEWS: Final = frozenset({EventKind.COMMAND_QUEUED, EventKind.DEVICE_UPDATED})
"""After these a device may have something to fetch: a command, or a gateway that may fetch for it."""


@dataclass(frozen=True, slots=True)
class NewCommand:
    """A command to be queued. It ends at `expires_at`, or after `ttl_seconds`, or after a day."""

    method: str
    params: Payload = field(default_factory=lambda: payload_from_json(b"{}"))
    expires_at: datetime | None = None
    ttl_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class CommandFilter:
    """Which commands to list; every part that is given must hold."""

    status: CommandStatus | None = None
    method: str | None = None


class CommandListener(Protocol):
    """A live session that takes commands."""

    def deliver(self, command: Command) -> None:
        """Send it down, or queue it for sending. Must not raise and must not wait.

        Once the peer has it, call `Commands.delivered`; more than the window does not come before.
        """
        ...


@dataclass(slots=True, eq=False)
class CommandAttachment(Attachment):
    """A listener's place, as `Commands.attach` gave it."""

    listener: CommandListener
    cursor: int = 0
    unconfirmed: set[CommandId] = field(default_factory=set)


class Commands:
    """The commands of all devices, and the live sessions of this node that take them. Follows the feed."""

    def __init__(
        self,
        database: Database,
        *,
        clock: Clock,
        random: RandomBytes,
        feed: EventHint,
        limits: CommandLimits = CommandLimits(),  # frozen
        observer: Observer = NOBODY,
    ) -> None:
        self.limits = limits
        self._database = database
        self._clock = clock
        self._random = random
        self._feed = feed
        self._observer = observer
        self._downlinks: Downlinks[CommandAttachment] = Downlinks("commands down", self._serve)
        self._marks: Batcher[CommandId, Command | None] = Batcher(
            "command marks", self._mark, max_items=_MARKED_AT_ONCE, max_queued=_MARKS_QUEUED
        )
        self._waits: dict[DeviceId, set[asyncio.Event]] = {}
        self._waiting: set[SessionId] = set()
        self._draining = False

    # -- operators -------------------------------------------------------------------------------------------------

    async def queue(self, tenant_id: TenantId, device_id: DeviceId, new: NewCommand, actor: Actor) -> Command:
        """Queue a command; it is stored when this returns.

        Raises NotFound, InvalidArgument, ResourceExhausted (the device has its limit of unfinished ones), Unavailable.
        """
        now = self._clock()
        if _METHOD.fullmatch(new.method) is None:
            raise InvalidArgument(
                f"method is {fields.shown(new.method)}; allowed are 1 to 128 of A-Z a-z 0-9 _ . : / -, "
                "beginning with a letter",
                field="method",
            )
        size = len(new.params.text.encode())
        if size > self.limits.params_bytes:
            raise InvalidArgument(
                f"params has {size} bytes; allowed are up to {self.limits.params_bytes}", field="params"
            )
        expires_at = _expiry(new, now)
        most = self.limits.unfinished
        async with self._database.transaction() as connection:
            await devices.lock(connection, tenant_id, device_id)
            if await storage.count_unfinished(connection, device_id, most) >= most:
                self._observer.limit_hit(Limit.COMMANDS)
                raise ResourceExhausted(f"the device has its {most} unfinished commands")
            command = await storage.insert(
                connection,
                command_id=CommandId(fields.fresh_uuid(self._random)),
                tenant_id=tenant_id,
                device_id=device_id,
                method=new.method,
                params=new.params.text,
                created_by=actor.name,
                created_at=now,
                expires_at=expires_at,
            )
            await events.insert(connection, event_of(command, actor))
            await _audit(connection, "create", command, actor)
        self._feed.hint()
        return command

    async def get(self, tenant_id: TenantId, device_id: DeviceId, command_id: CommandId) -> Command:
        """Raises NotFound, Unavailable."""
        async with self._database.connection() as connection:
            command = await storage.get(connection, tenant_id, device_id, command_id)
        if command is None:
            raise _not_found()
        return command

    async def list(
        self, tenant_id: TenantId, device_id: DeviceId, wanted: CommandFilter, page: Page
    ) -> Listing[Command]:
        """A device's commands, the newest first. Raises NotFound (no such device), InvalidArgument, Unavailable."""
        before = decode_cursor(page.cursor, int)[0] if page.cursor is not None else None
        async with self._database.connection() as connection:
            rows = await storage.read(
                connection, tenant_id, device_id, wanted.status, wanted.method, before, page.limit + 1
            )
            if not rows and await devices.get(connection, tenant_id, device_id) is None:
                raise NotFound("no such device in this tenant")
        return listing(rows, page, lambda command: (command.seq,))

    async def cancel(self, tenant_id: TenantId, device_id: DeviceId, command_id: CommandId, actor: Actor) -> Command:
        """Cancel what is not finished; cancelling again changes nothing.

        Raises NotFound, FailedPrecondition (it is finished), Unavailable. A device that has it already may still
        execute it; its answer is then refused.
        """
        async with self._database.transaction() as connection:
            command = await self._locked(connection, tenant_id, device_id, command_id)
            if command.status is CommandStatus.CANCELLED:
                return command
            after = await self._taken(connection, command, Step.CANCEL, actor)
            if after.status is CommandStatus.CANCELLED:
                await _audit(connection, "cancel", after, actor)
        self._feed.hint()
        if after.status is not CommandStatus.CANCELLED:
            raise _refused(after, "cancelled")
        return after

    # -- devices ---------------------------------------------------------------------------------------------------

    async def answer(
        self, source: Source, command_id: CommandId, response: CommandResponse, correlation_id: str
    ) -> Command:
        """A device's answer; it is stored when this returns. The first one stands, later ones change nothing.

        Raises NotFound, FailedPrecondition (expired or cancelled), Unavailable. Duty of the caller: `source.via` may
        speak for the device (`Children.is_child`).
        """
        speaker = source.via or source.device_id
        actor = Actor(f"device:{speaker}", correlation_id)
        async with self._database.transaction() as connection:
            command = await self._locked(connection, source.tenant_id, source.device_id, command_id)
            if command.status in (CommandStatus.SUCCEEDED, CommandStatus.FAILED):
                return command
            match response:
                case Succeeded(result):
                    step, told = Step.SUCCEED, replace(command, result=result, answered_by=speaker)
                case Failed(error):
                    step, told = Step.FAIL, replace(command, error=error, answered_by=speaker)
                case _:
                    assert_never(response)
            after = await self._taken(connection, command, step, actor, told=told)
        self._feed.hint()
        if after.status not in (CommandStatus.SUCCEEDED, CommandStatus.FAILED):
            raise _refused(after, "answered")
        return after

    async def next(
        self,
        tenant_id: TenantId,
        device_id: DeviceId,
        holder: SessionId,
        *,
        wait_seconds: float = 0.0,
        after: CommandId | None = None,
        via: DeviceId | None = None,
    ) -> Command | None:
        """The first unfinished command (behind `after`, if that is given), marked as delivered; None after the wait.

        Until it is answered the same command comes again. `wait_seconds` is cut to a minute. `holder` is the session
        that asks: it may have one wait at a time. Cancelling the call ends the wait; a command that was marked by then
        comes again. Raises NotFound (`after` is no command of the device), ResourceExhausted, Unavailable.

        Duties of the caller: `via` may speak for the device; before it hands a command over, see that the session is
        still open.
        """
        behind = 0 if after is None else (await self.get(tenant_id, device_id, after)).seq
        wanted = Wanted(tenant_id, device_id, behind, 1, via)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(wait_seconds, MAX_WAIT_SECONDS)
        bell = self._enter(device_id, holder)
        try:
            while True:
                bell.clear()  # before the reading: what is queued during it rings again
                command = await self._first(wanted)
                left = deadline - loop.time()
                if command is not None or left <= 0 or self._draining:
                    return command
                try:
                    async with asyncio.timeout(left):
                        await bell.wait()
                except TimeoutError:
                    return None
        finally:
            self._leave(device_id, holder, bell)

    def attach(
        self,
        tenant_id: TenantId,
        device_id: DeviceId,
        listener: CommandListener,
        *,
        via: DeviceId | None = None,
        behind: int = 0,
    ) -> CommandAttachment:
        """Give the listener every unfinished command, now and as they come, in order, until `detach`.

        `via` is the gateway whose session it is, for a child; it gets nothing once the child is no longer its own.
        `behind` is the `seq` of the last command that the peer was given before.
        """
        attachment = CommandAttachment(tenant_id, device_id, via, listener, behind)
        self._downlinks.add(attachment)
        return attachment

    def detach(self, attachment: CommandAttachment) -> None:
        """Deliver nothing more to it. Idempotent."""
        self._downlinks.remove(attachment)

    def delivered(self, attachment: CommandAttachment, command_id: CommandId) -> None:
        """The peer has the command. Marked behind; a mark that is lost means that the command comes again."""
        self._confirm(attachment, command_id)
        try:
            self._marks.submit(command_id)
        except Unavailable:
            return  # delivered once more on the next connection

    def passed_over(self, attachment: CommandAttachment, command_id: CommandId) -> None:
        """This listener cannot send the command to its peer: it stays queued, and those behind it go on."""
        self._confirm(attachment, command_id)

    # -- the node --------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Polls that wait now."""
        return len(self._waiting)

    async def follow(self, seen: Seen) -> None:
        """The feed's word: somebody may have something to fetch."""
        event = seen.event
        if event.device_id is None:
            return
        if event.kind in _OVER:
            command_id = _command_id(event.data)
            for attachment in self._downlinks.of(event.device_id):
                self._confirm(attachment, command_id)
        elif event.kind in _NEWS:
            self._downlinks.stir(event.device_id)
            for bell in self._waits.get(event.device_id, ()):
                bell.set()

    async def restored(self) -> None:
        """The feed was away: look at everything."""
        self._downlinks.stir_all()
        self._ring_all()

    async def run(self) -> None:
        """Write expiries for ever."""
        while True:
            await asyncio.sleep(EXPIRY_SECONDS)
            try:
                while await self.expire() == _EXPIRED_AT_ONCE:
                    pass
            except Unavailable:
                continue  # still unfinished; the next look finds them

    async def expire(self) -> int:
        """Write down what has expired, at most some hundreds; how many. Raises Unavailable."""
        now = self._clock()
        async with self._database.transaction() as connection:
            due = await storage.lock_due(connection, now, _EXPIRED_AT_ONCE)
            if not due:
                return 0
            over = [stepped(command, Step.EXPIRE, now) for command in due]
            await storage.update_many(connection, over)
            await events.insert_many(connection, [event_of(command, _SYSTEM) for command in over])
        self._feed.hint()
        return len(over)

    def drain(self) -> None:
        """Let nobody wait any more: the node is going away."""
        self._draining = True
        self._ring_all()

    async def stop(self) -> None:
        """Finish what is under way."""
        self.drain()
        await self._downlinks.stop()
        await self._marks.stop()

    # -- delivering ------------------------------------------------------------------------------------------------

    async def _serve(self, attachments: Sequence[CommandAttachment]) -> None:
        window = self.limits.window
        open_ones = [a for a in attachments if len(a.unconfirmed) < window]
        wanted = [Wanted(a.tenant_id, a.device_id, a.cursor, window - len(a.unconfirmed), a.via) for a in open_ones]
        async with self._database.connection() as connection:
            found = await storage.unfinished(connection, wanted, self._clock())
        for attachment, asked, commands in zip(open_ones, wanted, found, strict=True):
            for command in commands:
                if attachment.live and command.seq > attachment.cursor:
                    attachment.cursor = command.seq
                    attachment.unconfirmed.add(command.command_id)
                    attachment.listener.deliver(command)
            if len(commands) == asked.most and len(attachment.unconfirmed) < window:
                self._downlinks.stir_one(attachment)  # confirmed meanwhile, with room left: nobody else will stir it

    def _confirm(self, attachment: CommandAttachment, command_id: CommandId) -> None:
        if command_id not in attachment.unconfirmed:
            return
        was_full = len(attachment.unconfirmed) >= self.limits.window
        attachment.unconfirmed.discard(command_id)
        if was_full:
            self._downlinks.stir_one(attachment)

    async def _first(self, wanted: Wanted) -> Command | None:
        while True:
            async with self._database.connection() as connection:
                (found,) = await storage.unfinished(connection, [wanted], self._clock())
            if not found:
                return None
            marked = await self._marks.submit(found[0].command_id)
            if marked is not None:
                return marked
            # Finished between the two readings: the one behind it, if any.

    async def _mark(self, command_ids: Sequence[CommandId]) -> Sequence[Command | None]:
        now = self._clock()
        marked: dict[CommandId, Command] = {}
        async with self._database.transaction() as connection:
            for command in await storage.lock_many(connection, command_ids):
                if command.expires_at > now and (command.status, Step.DELIVER) in STEPS:
                    marked[command.command_id] = stepped(command, Step.DELIVER, now)
            if marked:
                await storage.update_many(connection, list(marked.values()))
            first = [command for command in marked.values() if command.deliveries == 1]
            if first:
                await events.insert_many(connection, [event_of(command, _SYSTEM) for command in first])
        if first:
            self._feed.hint()
        return [marked.get(each) for each in command_ids]

    def _enter(self, device_id: DeviceId, holder: SessionId) -> asyncio.Event:
        if holder in self._waiting:
            raise ResourceExhausted("this session is waiting for a command already", retry_after=1.0)
        if len(self._waiting) >= self.limits.waits:
            self._observer.limit_hit(Limit.COMMAND_WAITS)
            raise ResourceExhausted(f"this node has its {self.limits.waits} waiting polls", retry_after=5.0)
        self._waiting.add(holder)
        bell = asyncio.Event()
        self._waits.setdefault(device_id, set()).add(bell)
        return bell

    def _leave(self, device_id: DeviceId, holder: SessionId, bell: asyncio.Event) -> None:
        self._waiting.discard(holder)
        bells = self._waits[device_id]
        bells.discard(bell)
        if not bells:
            del self._waits[device_id]

    def _ring_all(self) -> None:
        for bells in self._waits.values():
            for bell in bells:
                bell.set()

    # -- steps -----------------------------------------------------------------------------------------------------

    async def _locked(
        self, connection: Connection, tenant_id: TenantId, device_id: DeviceId, command_id: CommandId
    ) -> Command:
        command = await storage.get(connection, tenant_id, device_id, command_id, lock=True)
        if command is None:
            raise _not_found()
        return command

    async def _taken(
        self, connection: Connection, command: Command, step: Step, actor: Actor, *, told: Command | None = None
    ) -> Command:
        """The locked command after a step, written with its event.

        Where its time is over it takes the step EXPIRE instead; where the step is illegal it stays as it is. The
        caller looks at the status.
        """
        now = self._clock()
        if command.status in UNFINISHED and command.expires_at <= now:
            step, told, actor = Step.EXPIRE, None, _SYSTEM
        if (command.status, step) not in STEPS:
            return command
        after = stepped(told or command, step, now)
        await storage.update_many(connection, [after])
        await events.insert(connection, event_of(after, actor))
        return after


_SYSTEM: Final = Actor("system:commands", "")


def _expiry(new: NewCommand, now: datetime) -> datetime:
    if new.expires_at is not None and new.ttl_seconds is not None:
        raise InvalidArgument("expires_at and ttl_seconds are one thing; give one of them", field="ttl_seconds")
    if new.expires_at is not None:
        expires_at = fields.future("expires_at", new.expires_at, now)
        if expires_at > now + MAX_TTL:
            raise InvalidArgument(
                f"expires_at is more than {MAX_TTL.days} days ahead; that is the most", field="expires_at"
            )
        return expires_at
    if new.ttl_seconds is None:
        return now + DEFAULT_TTL
    most = int(MAX_TTL.total_seconds())
    if not 1 <= new.ttl_seconds <= most:
        raise InvalidArgument(f"ttl_seconds is {new.ttl_seconds}; allowed are 1 to {most}", field="ttl_seconds")
    return now + timedelta(seconds=new.ttl_seconds)


def _command_id(data: Mapping[str, Json]) -> CommandId:
    return CommandId(UUID(data["command_id"]))


async def _audit(connection: Connection, action: str, command: Command, actor: Actor) -> None:
    detail = {"device_id": str(command.device_id), "method": command.method}
    await audit.insert(connection, command.tenant_id, actor, action, "command", str(command.command_id), detail)


def _not_found() -> NotFound:
    return NotFound("no such command of this device")


def _refused(command: Command, wish: str) -> FailedPrecondition:
    open_words = " or ".join(sorted(each.value for each in UNFINISHED))
    return FailedPrecondition(f"the command is {command.status.value}; only one that is {open_words} can be {wish}")
