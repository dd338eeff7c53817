"""Commands: queued, delivered in order and again, answered once, whichever node and whoever races."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from registry.command_steps import STEPS, Step
from registry.commands import (
    MAX_TTL,
    Command,
    CommandAttachment,
    CommandError,
    CommandFilter,
    CommandLimits,
    Commands,
    CommandStatus,
    Failed,
    NewCommand,
    Succeeded,
    encode_command,
    response_from,
)
from registry.errors import FailedPrecondition, InvalidArgument, NotFound, RegistryError, ResourceExhausted
from registry.model import CommandId, DeviceId, SessionId, TenantId, Transport
from registry.paging import Page
from registry.payloads import Source, payload_from_json
from registry.sealing import KeyRing
from registry.storage import commands as storage
from registry.storage.commands import UNFINISHED
from registry.storage.database import Database
from tests.conftest import MakeDevice
from tests.nodes import ACTOR, TestNode, running_node, until
from tests.services import Clock

OK = Succeeded('{"done": true}')


@dataclass(eq=False)
class Listener:
    """A live session that a test holds. `confirms`: its peer takes every command at once."""

    commands: Commands
    confirms: bool = True
    got: list[Command] = field(default_factory=list)
    attachment: CommandAttachment | None = None

    def deliver(self, command: Command) -> None:
        self.got.append(command)
        if self.confirms:
            assert self.attachment is not None
            self.commands.delivered(self.attachment, command.command_id)

    def on(self, tenant_id: TenantId, device_id: DeviceId, via: DeviceId | None = None) -> Listener:
        self.attachment = self.commands.attach(tenant_id, device_id, self, via=via)
        return self

    def off(self) -> None:
        assert self.attachment is not None
        self.commands.detach(self.attachment)

    @property
    def methods(self) -> list[str]:
        return [command.method for command in self.got]


@asynccontextmanager
async def commands_on(node: TestNode, clock: Clock, limits: CommandLimits | None = None) -> AsyncIterator[Commands]:
    """The service of one node."""
    commands = Commands(node.database, clock=clock, random=os.urandom, feed=node.feed, limits=limits or CommandLimits())
    node.feed.add_follower(commands)
    try:
        yield commands
    finally:
        await commands.stop()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def node(dsn: str) -> AsyncIterator[TestNode]:
    async with running_node(dsn, "one", KeyRing.generate()) as running:
        yield running


@pytest.fixture
async def commands(node: TestNode, clock: Clock) -> AsyncIterator[Commands]:
    async with commands_on(node, clock) as service:
        yield service


async def queued(commands: Commands, tenant_id: TenantId, device_id: DeviceId, method: str, **more: object) -> Command:
    return await commands.queue(tenant_id, device_id, NewCommand(method, **more), ACTOR)  # type: ignore[arg-type]


def of(tenant_id: TenantId, device_id: DeviceId, via: DeviceId | None = None) -> Source:
    return Source(tenant_id, device_id, Transport.MQTT, via)


def session() -> SessionId:
    return SessionId(uuid4())


async def behind(node: TestNode) -> bool:
    """Whether the node's feed has yet to tell of an event."""
    async with node.database.connection() as connection:
        return node.feed.cursor.seq < await connection.fetchval("SELECT max(seq) FROM event")


async def kinds(database: Database, command_id: CommandId) -> list[str]:
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT kind FROM event WHERE data->>'command_id' = $1 ORDER BY seq", str(command_id)
        )
    return [row["kind"] for row in rows]


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", CommandStatus)
@pytest.mark.parametrize("step", Step)
def test_every_step_from_an_unfinished_command_is_legal_and_none_from_a_finished_one(
    status: CommandStatus, step: Step
) -> None:
    assert ((status, step) in STEPS) == (status in UNFINISHED)


def test_what_goes_down_is_the_contracts() -> None:
    raw = b'{"command_id":"3a9f1d22-6b4c-4e8a-bf21-90c7e5d4a118","method":"reboot","params":{"in": 1.50},'
    clock = Clock()
    command = Command(
        1, CommandId(UUID("3a9f1d22-6b4c-4e8a-bf21-90c7e5d4a118")), TenantId(uuid4()),
        DeviceId(uuid4()), "reboot", '{"in": 1.50}', CommandStatus.QUEUED, "operator:ada", clock.now, clock.now,
    )  # fmt: skip
    assert encode_command(command) == raw + b'"expires_at":"2030-01-01T12:00:00Z"}'


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        (b'{"result": {"a": 1.0}}', Succeeded('{"a": 1.0}')),
        (b'{"result": null}', Succeeded("null")),
        (b'{"error": {"code": "E_DOOR", "message": "open\\nstill"}}', Failed(CommandError("E_DOOR", "open\nstill"))),
        (b'{"error": {"code": -32601}}', Failed(CommandError("-32601", ""))),
    ],
)
def test_responses_are_read(raw: bytes, read: object) -> None:
    assert response_from(payload_from_json(raw)) == read


@pytest.mark.parametrize(
    "raw",
    [
        b"{}", b"[]", b"1", b'{"result": 1, "error": {"code": "x", "message": ""}}', b'{"error": null}',
        b'{"error": {"message": "x"}}', b'{"error": {"code": "", "message": ""}}', b'{"result": 1, "more": 2}',
        b'{"error": {"code": "a\\u202eb", "message": ""}}', b'{"error": {"code": "x", "message": "\\u0007"}}',
        b'{"error": {"code": 1.5, "message": ""}}', b'{"error": {"code": "x", "message": "y", "z": 1}}',
    ],
)  # fmt: skip
def test_other_responses_are_refused(raw: bytes) -> None:
    with pytest.raises(InvalidArgument):
        response_from(payload_from_json(raw))


# -- queueing ----------------------------------------------------------------------------------------------------------


async def test_a_command_is_stored_with_its_words_and_ends_after_a_day(
    commands: Commands, clock: Clock, tenant_id: TenantId, device_id: DeviceId
) -> None:
    params = payload_from_json(b'{"b": 1, "a": 1.50}')
    made = await queued(commands, tenant_id, device_id, "door.open", params=params)
    assert made.status is CommandStatus.QUEUED
    assert made.expires_at == clock.now + timedelta(days=1)
    assert made == await commands.get(tenant_id, device_id, made.command_id)
    assert made.params == '{"b": 1, "a": 1.50}'


@pytest.mark.parametrize("method", ["", "1st", "with space", "a" * 129, "a\n", "ä"])
async def test_a_method_has_a_plain_name(
    commands: Commands, tenant_id: TenantId, device_id: DeviceId, method: str
) -> None:
    with pytest.raises(InvalidArgument, match="method"):
        await queued(commands, tenant_id, device_id, method)


async def test_expiries_are_bounded(commands: Commands, clock: Clock, tenant_id: TenantId, device_id: DeviceId) -> None:
    refused: list[dict[str, object]] = [
        {"expires_at": clock.now},
        {"expires_at": clock.now + MAX_TTL + timedelta(seconds=1)},
        {"expires_at": clock.now + timedelta(days=1), "ttl_seconds": 5},
        {"ttl_seconds": 0},
        {"ttl_seconds": 90 * 86_400 + 1},
    ]
    for each in refused:
        with pytest.raises(InvalidArgument):
            await queued(commands, tenant_id, device_id, "a", **each)
    made = await queued(commands, tenant_id, device_id, "a", expires_at=clock.now + MAX_TTL)
    assert made.expires_at == clock.now + MAX_TTL
    made = await queued(commands, tenant_id, device_id, "a", ttl_seconds=5)
    assert made.expires_at == clock.now + timedelta(seconds=5)


async def test_a_device_has_a_limit_of_unfinished_commands_even_when_all_come_at_once(
    node: TestNode, clock: Clock, tenant_id: TenantId, make_device: MakeDevice
) -> None:
    device_id, other = await make_device(tenant_id), await make_device(tenant_id)
    async with commands_on(node, clock, CommandLimits(unfinished=3, params_bytes=4)) as commands:
        outcomes = await asyncio.gather(
            *(queued(commands, tenant_id, device_id, f"m{n}") for n in range(6)), return_exceptions=True
        )
        assert [type(o) for o in outcomes].count(ResourceExhausted) == 3
        await queued(commands, tenant_id, other, "a")
        stored = [o for o in outcomes if isinstance(o, Command)]
        await commands.cancel(tenant_id, device_id, stored[0].command_id, ACTOR)
        await queued(commands, tenant_id, device_id, "room")
        with pytest.raises(InvalidArgument, match="params has 5 bytes"):
            await queued(commands, tenant_id, other, "a", params=payload_from_json(b"[1,2]"))


async def test_commands_belong_to_one_device_of_one_tenant(
    commands: Commands, tenant_id: TenantId, device_id: DeviceId, make_device: MakeDevice
) -> None:
    made = await queued(commands, tenant_id, device_id, "a")
    sibling, stranger = await make_device(tenant_id), TenantId(uuid4())
    for tenant, device in ((tenant_id, sibling), (stranger, device_id)):
        with pytest.raises(NotFound):
            await commands.get(tenant, device, made.command_id)
        with pytest.raises(NotFound):
            await commands.cancel(tenant, device, made.command_id, ACTOR)
        with pytest.raises(NotFound):
            await commands.answer(of(tenant, device), made.command_id, OK, "c")
        assert await commands.next(tenant, device, session()) is None
    with pytest.raises(NotFound):
        await queued(commands, stranger, device_id, "a")
    with pytest.raises(NotFound):
        await commands.list(stranger, device_id, CommandFilter(), Page())
    listener = Listener(commands).on(stranger, device_id)
    mine = Listener(commands).on(tenant_id, device_id)
    await until(lambda: mine.got)
    assert not listener.got


async def test_lists_are_paged_and_filtered_newest_first(
    commands: Commands, tenant_id: TenantId, device_id: DeviceId
) -> None:
    made = [await queued(commands, tenant_id, device_id, f"m{n % 2}") for n in range(5)]
    await commands.cancel(tenant_id, device_id, made[2].command_id, ACTOR)
    first = await commands.list(tenant_id, device_id, CommandFilter(), Page(limit=2))
    second = await commands.list(tenant_id, device_id, CommandFilter(), Page(limit=3, cursor=first.next_cursor))
    shown = [c.command_id for c in (*first.items, *second.items)]
    assert shown == [c.command_id for c in reversed(made)]
    assert second.next_cursor is None
    found = await commands.list(tenant_id, device_id, CommandFilter(CommandStatus.QUEUED, "m0"), Page())
    assert [c.command_id for c in found.items] == [made[4].command_id, made[0].command_id]


# -- live sessions -----------------------------------------------------------------------------------------------------


async def test_a_whole_round_trip(node: TestNode, commands: Commands, tenant_id: TenantId, device_id: DeviceId) -> None:
    listener = Listener(commands).on(tenant_id, device_id)
    made = await queued(commands, tenant_id, device_id, "reboot")
    await until(lambda: listener.got)
    async with asyncio.timeout(5):
        while (await commands.get(tenant_id, device_id, made.command_id)).status is CommandStatus.QUEUED:
            await asyncio.sleep(0.005)
    answered = await commands.answer(of(tenant_id, device_id), made.command_id, OK, "c")
    assert answered.status is CommandStatus.SUCCEEDED
    assert answered.deliveries == 1
    assert answered.result == '{"done": true}'
    assert answered.answered_by == device_id
    assert answered == await commands.get(tenant_id, device_id, made.command_id)
    assert await kinds(node.database, made.command_id) == ["command.queued", "command.delivered", "command.finished"]


async def test_commands_reach_a_session_on_another_node_in_order(
    dsn: str, clock: Clock, node: TestNode, commands: Commands, tenant_id: TenantId, device_id: DeviceId
) -> None:
    async with running_node(dsn, "two", KeyRing.generate()) as two, commands_on(two, clock) as theirs:
        listener = Listener(theirs).on(tenant_id, device_id)
        for n in range(40):
            await queued(commands if n % 3 else theirs, tenant_id, device_id, f"m{n}")
        await until(lambda: len(listener.got) >= 40)
        assert listener.methods == [f"m{n}" for n in range(40)]


async def test_what_was_queued_while_nobody_was_there_comes_at_attach_and_unanswered_again(
    commands: Commands, tenant_id: TenantId, device_id: DeviceId
) -> None:
    first, second, third = [await queued(commands, tenant_id, device_id, f"m{n}") for n in range(3)]
    once = Listener(commands).on(tenant_id, device_id)
    await until(lambda: len(once.got) == 3)
    once.off()
    await commands.answer(of(tenant_id, device_id), second.command_id, OK, "c")
    again = Listener(commands).on(tenant_id, device_id)
    await until(lambda: len(again.got) == 2)
    assert [c.command_id for c in again.got] == [first.command_id, third.command_id]
    await queued(commands, tenant_id, device_id, "later")
    await until(lambda: len(again.got) == 3)
    assert len(once.got) == 3, "a detached listener was given something"


async def test_a_transport_that_confirms_nothing_gets_no_more_than_the_window(
    node: TestNode, clock: Clock, tenant_id: TenantId, device_id: DeviceId
) -> None:
    async with commands_on(node, clock, CommandLimits(window=2)) as commands:
        made = [await queued(commands, tenant_id, device_id, f"m{n}") for n in range(5)]
        listener = Listener(commands, confirms=False).on(tenant_id, device_id)
        await until(lambda: len(listener.got) == 2)
        await queued(commands, tenant_id, device_id, "m5")
        assert listener.attachment is not None
        commands.delivered(listener.attachment, made[0].command_id)
        await until(lambda: len(listener.got) == 3)
        # What is finished without having been confirmed makes room, too.
        await commands.answer(of(tenant_id, device_id), made[1].command_id, OK, "c")
        await until(lambda: len(listener.got) == 4)
        await commands.cancel(tenant_id, device_id, made[2].command_id, ACTOR)
        await until(lambda: len(listener.got) == 5)
        assert listener.methods == [f"m{n}" for n in range(5)]


async def test_a_transport_that_confirms_at_once_gets_all_that_was_queued_while_nobody_was_there(
    node: TestNode, clock: Clock, tenant_id: TenantId, device_id: DeviceId
) -> None:
    async with commands_on(node, clock, CommandLimits(window=3)) as commands:
        for n in range(7):
            await queued(commands, tenant_id, device_id, f"m{n}")
        async with asyncio.timeout(5):
            while node.feed.lag_seconds or await behind(node):  # no event is to come that would have it looked at again
                await asyncio.sleep(0.01)
        listener = Listener(commands).on(tenant_id, device_id)
        await until(lambda: len(listener.got) >= 7, seconds=3)
        assert listener.methods == [f"m{n}" for n in range(7)]


async def test_what_is_confirmed_while_the_next_are_being_read_makes_room_too(
    node: TestNode, clock: Clock, tenant_id: TenantId, device_id: DeviceId, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device comes back to more commands than the window: confirming the first has the next one read, and the others
    are confirmed meanwhile."""
    async with commands_on(node, clock, CommandLimits(window=3)) as commands:
        made = [await queued(commands, tenant_id, device_id, f"m{n}") for n in range(7)]
        listener = Listener(commands, confirms=False).on(tenant_id, device_id)
        await until(lambda: len(listener.got) == 3)
        assert listener.attachment is not None
        reading, read = asyncio.Event(), storage.unfinished

        async def overtaken(*arguments: object) -> list[list[Command]]:
            found = await read(*arguments)  # type: ignore[arg-type]
            if not reading.is_set():
                reading.set()
                for each in made[1:3]:
                    commands.delivered(listener.attachment, each.command_id)  # type: ignore[arg-type]
            return found

        monkeypatch.setattr(storage, "unfinished", overtaken)
        commands.delivered(listener.attachment, made[0].command_id)
        await until(lambda: len(listener.got) >= 6, seconds=3)
        assert listener.methods == [f"m{n}" for n in range(6)]


async def test_a_gateway_gets_a_childs_commands_while_it_is_its_child(
    node: TestNode, commands: Commands, tenant_id: TenantId, make_device: MakeDevice
) -> None:
    gateway, other = await make_device(tenant_id), await make_device(tenant_id)
    child = await make_device(tenant_id, gateway_id=gateway)
    mine = Listener(commands).on(tenant_id, child, via=gateway)
    not_mine = Listener(commands).on(tenant_id, child, via=other)
    first = await queued(commands, tenant_id, child, "first")
    await until(lambda: mine.got)
    assert not not_mine.got
    answered = await commands.answer(of(tenant_id, child, via=gateway), first.command_id, OK, "c")
    assert answered.answered_by == gateway
    async with node.database.connection() as connection:
        await connection.execute("UPDATE device SET gateway_id = $1 WHERE device_id = $2", other, child)
    await queued(commands, tenant_id, child, "second")
    await until(lambda: not_mine.got)
    assert mine.methods == ["first"]
    assert not_mine.methods == ["second"]
    assert await commands.next(tenant_id, child, session(), via=gateway) is None


# -- answers, cancellations, expiries ----------------------------------------------------------------------------------


async def test_of_many_answers_the_first_stands_and_all_are_told_so(
    node: TestNode, commands: Commands, tenant_id: TenantId, device_id: DeviceId
) -> None:
    made = await queued(commands, tenant_id, device_id, "a")
    answers = [Succeeded(str(n)) for n in range(6)] + [Failed(CommandError("x", "y"))] * 4
    told = await asyncio.gather(
        *(commands.answer(of(tenant_id, device_id), made.command_id, each, "c") for each in answers)
    )
    stands = await commands.get(tenant_id, device_id, made.command_id)
    assert {(t.status, t.result, t.error) for t in told} == {(stands.status, stands.result, stands.error)}
    assert await kinds(node.database, made.command_id) == ["command.queued", "command.finished"]
    assert await commands.answer(of(tenant_id, device_id), made.command_id, OK, "c") == stands


async def test_a_failure_is_kept(commands: Commands, tenant_id: TenantId, device_id: DeviceId) -> None:
    made = await queued(commands, tenant_id, device_id, "a")
    error = CommandError("E_JAM", "the door is jammed")
    answered = await commands.answer(of(tenant_id, device_id), made.command_id, Failed(error), "c")
    assert (answered.status, answered.error, answered.result) == (CommandStatus.FAILED, error, None)
    assert answered == await commands.get(tenant_id, device_id, made.command_id)


async def test_a_cancelled_command_is_not_delivered_and_takes_no_answer(
    commands: Commands, tenant_id: TenantId, device_id: DeviceId
) -> None:
    made = await queued(commands, tenant_id, device_id, "a")
    cancelled = await commands.cancel(tenant_id, device_id, made.command_id, ACTOR)
    assert cancelled == await commands.cancel(tenant_id, device_id, made.command_id, ACTOR)
    assert await commands.next(tenant_id, device_id, session()) is None
    with pytest.raises(FailedPrecondition, match="cancelled"):
        await commands.answer(of(tenant_id, device_id), made.command_id, OK, "c")
    other = await queued(commands, tenant_id, device_id, "b")
    await commands.answer(of(tenant_id, device_id), other.command_id, OK, "c")
    with pytest.raises(FailedPrecondition, match="succeeded"):
        await commands.cancel(tenant_id, device_id, other.command_id, ACTOR)


@pytest.mark.parametrize("attempt", range(5))
async def test_cancelling_and_delivering_at_once_agree(
    attempt: int, node: TestNode, commands: Commands, tenant_id: TenantId, device_id: DeviceId
) -> None:
    del attempt
    made = await queued(commands, tenant_id, device_id, "a")
    fetched, cancelled = await asyncio.gather(
        commands.next(tenant_id, device_id, session()),
        commands.cancel(tenant_id, device_id, made.command_id, ACTOR),
    )
    assert cancelled.status is CommandStatus.CANCELLED
    told = ["command.delivered"] if fetched is not None else []
    assert await kinds(node.database, made.command_id) == ["command.queued", *told, "command.cancelled"]
    assert await commands.next(tenant_id, device_id, session()) is None


async def test_an_expired_command_is_over_before_and_after_the_sweep(
    node: TestNode, commands: Commands, clock: Clock, tenant_id: TenantId, device_id: DeviceId
) -> None:
    swept = await queued(commands, tenant_id, device_id, "a", ttl_seconds=10)
    answered = await queued(commands, tenant_id, device_id, "b", ttl_seconds=10)
    lives = await queued(commands, tenant_id, device_id, "c", ttl_seconds=11)
    clock.advance(seconds=10)
    fetched = await commands.next(tenant_id, device_id, session())
    assert fetched is not None
    assert fetched.command_id == lives.command_id
    with pytest.raises(FailedPrecondition, match="expired"):
        await commands.answer(of(tenant_id, device_id), answered.command_id, OK, "c")
    assert await commands.expire() == 1
    assert await commands.expire() == 0
    for each in (swept, answered):
        after = await commands.get(tenant_id, device_id, each.command_id)
        assert (after.status, after.finished_at) == (CommandStatus.EXPIRED, clock.now)
        assert await kinds(node.database, each.command_id) == ["command.queued", "command.expired"]


async def test_expiring_on_two_nodes_while_answers_come_ends_each_command_once(
    dsn: str, clock: Clock, node: TestNode, commands: Commands, tenant_id: TenantId, device_id: DeviceId
) -> None:
    async with running_node(dsn, "two", KeyRing.generate()) as two:
        late = Clock(clock.now + timedelta(seconds=11))  # a node whose clock runs ahead
        async with commands_on(two, late) as theirs:
            made = [await queued(commands, tenant_id, device_id, f"m{n}", ttl_seconds=10) for n in range(30)]
            outcomes = await asyncio.gather(
                *(commands.answer(of(tenant_id, device_id), each.command_id, OK, "c") for each in made),
                *(theirs.expire() for _ in range(4)),
                return_exceptions=True,
            )
            await theirs.expire()
            answered = 0
            for each, outcome in zip(made, outcomes, strict=False):
                last = (await commands.get(tenant_id, device_id, each.command_id)).status
                told = await kinds(node.database, each.command_id)
                if isinstance(outcome, Command):
                    answered += 1
                    assert (last, told[1:]) == (CommandStatus.SUCCEEDED, ["command.finished"])
                else:
                    assert isinstance(outcome, RegistryError), outcome
                    assert (last, told[1:]) == (CommandStatus.EXPIRED, ["command.expired"])
            expired = sum(o for o in outcomes if isinstance(o, int))
            assert answered + expired <= 30


# -- polls -------------------------------------------------------------------------------------------------------------


async def test_a_poll_gets_the_first_unanswered_command_again_until_it_is_answered(
    commands: Commands, tenant_id: TenantId, device_id: DeviceId
) -> None:
    first, second = [await queued(commands, tenant_id, device_id, f"m{n}") for n in range(2)]
    for times in (1, 2):
        fetched = await commands.next(tenant_id, device_id, session())
        assert fetched is not None
        assert (fetched.command_id, fetched.deliveries) == (first.command_id, times)
        assert fetched.status is CommandStatus.DELIVERED
    ahead = await commands.next(tenant_id, device_id, session(), after=first.command_id)
    assert ahead is not None
    assert ahead.command_id == second.command_id
    await commands.answer(of(tenant_id, device_id), first.command_id, OK, "c")
    fetched = await commands.next(tenant_id, device_id, session())
    assert fetched is not None
    assert fetched.command_id == second.command_id
    with pytest.raises(NotFound):
        await commands.next(tenant_id, device_id, session(), after=CommandId(uuid4()))


async def test_a_waiting_poll_is_woken_by_a_command_queued_on_another_node(
    dsn: str, clock: Clock, commands: Commands, tenant_id: TenantId, device_id: DeviceId
) -> None:
    async with running_node(dsn, "two", KeyRing.generate()) as two, commands_on(two, clock) as theirs:
        waiting = asyncio.create_task(theirs.next(tenant_id, device_id, session(), wait_seconds=30))
        await until(lambda: theirs.waiting == 1)
        made = await queued(commands, tenant_id, device_id, "a")
        fetched = await asyncio.wait_for(waiting, 5)
        assert fetched is not None
        assert fetched.command_id == made.command_id
        assert theirs.waiting == 0


async def test_a_poll_ends_empty_when_its_time_is_up_when_it_is_cancelled_and_when_the_node_drains(
    commands: Commands, tenant_id: TenantId, device_id: DeviceId
) -> None:
    assert await commands.next(tenant_id, device_id, session(), wait_seconds=0.01) is None
    left = asyncio.create_task(commands.next(tenant_id, device_id, session(), wait_seconds=30))
    await until(lambda: commands.waiting == 1)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    assert commands.waiting == 0
    drained = asyncio.create_task(commands.next(tenant_id, device_id, session(), wait_seconds=30))
    await until(lambda: commands.waiting == 1)
    commands.drain()
    assert await asyncio.wait_for(drained, 1) is None
    assert await asyncio.wait_for(commands.next(tenant_id, device_id, session(), wait_seconds=30), 1) is None


async def test_waits_are_bounded(node: TestNode, clock: Clock, tenant_id: TenantId, make_device: MakeDevice) -> None:
    one, other, third = [await make_device(tenant_id) for _ in range(3)]
    async with commands_on(node, clock, replace(CommandLimits(), waits=2)) as commands:
        same = session()
        waits = [
            asyncio.create_task(commands.next(tenant_id, one, same, wait_seconds=30)),
            asyncio.create_task(commands.next(tenant_id, other, session(), wait_seconds=30)),
        ]
        await until(lambda: commands.waiting == 2)
        with pytest.raises(ResourceExhausted, match="this session"):
            await commands.next(tenant_id, one, same, wait_seconds=30)
        with pytest.raises(ResourceExhausted, match="2 waiting polls"):
            await commands.next(tenant_id, third, session(), wait_seconds=30)
        commands.drain()
        assert await asyncio.gather(*waits) == [None, None]
