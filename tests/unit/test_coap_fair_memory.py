"""Memory that all CoAP peers share: a crowd, of strangers or of devices, takes nothing from who takes little.

Each of the first tests fails where one bound over all peers is kept by dropping what is oldest, or by refusing whoever
comes last.
"""

from __future__ import annotations

from random import Random

import pytest
from aiocoap.numbers.codes import Code
from aiocoap.numbers.types import Type

from adapters.coap.duplicates import ENTRY_COST, Duplicates, Table
from adapters.coap.limits import CoapCounters, CoapLimits
from adapters.coap.memory import Memory
from adapters.coap.shares import STEP, Share, Shares
from tests.coap_peers import CON, NON, Dialogue, message

SMALL = CoapLimits(
    duplicate_bytes=60_000,
    stranger_duplicate_bytes=20_000,
    duplicate_bytes_per_stranger=10_000,
    body_bytes=8_192,
    upload_bytes_per_peer=32_768,
    upload_bytes=65_536,
    stranger_upload_bytes=32_768,
    snapshot_bytes=60_000,
    snapshot_bytes_per_peer=20_000,
    stranger_snapshot_bytes=20_000,
    snapshot_bytes_per_stranger=10_000,
)


def small_memory() -> Memory:
    return Memory(SMALL, CoapCounters())


def block(talk: Dialogue, message_id: int, number: int, more: bool, tag: bytes = b"", size: int = 1_024) -> str:
    """One block of an upload to /large; what was said to it, nothing if the body is whole."""
    exponent = size.bit_length() - 5
    options = {"path": "large", "block1": (number, more, exponent), "request_tag": (tag,)}
    talk.sends(CON, Code.PUT, message_id, payload=bytes(size if more else 3), **options)
    return "".join(said[:8] for said in talk.said())


# Message ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["strangers", "devices"])
@pytest.mark.parametrize("kind", [CON, NON], ids=["after a CON", "after a NON"])
def test_a_crowds_requests_never_make_a_devices_repetition_a_new_one(known: bool, kind: Type) -> None:
    memory = small_memory()
    device = Dialogue(SMALL, memory)
    device.sends(kind, Code.POST, 7, path="telemetry", payload=b"1")
    device.asked()
    device.answers(Code.CHANGED)
    device.said()
    crowd = [Dialogue(SMALL, memory, known=known) for _ in range(20)]
    for message_id in range(200):
        for each in crowd:
            each.sends_bytes(b"\x40\x01" + message_id.to_bytes(2, "big") + b"\x90")  # unknown and critical: 4.02
            each.datagrams.clear()
    assert memory.duplicates.size <= SMALL.duplicate_bytes + SMALL.stranger_duplicate_bytes
    assert memory.counters.duplicates_forgotten > 3_000
    device.sends(kind, Code.POST, 7, path="telemetry", payload=b"1")
    assert device.events == []
    assert device.said() == (["ACK 2.04 7"] if kind is CON else [])


def test_devices_that_ask_equally_often_keep_equally_many() -> None:
    memory = small_memory()
    crowd = [Dialogue(SMALL, memory) for _ in range(10)]
    for message_id in range(100):
        for each in crowd:
            each.sends(CON if message_id % 2 else NON, Code.POST, message_id, path="test")
            each.asked()
            each.answers(Code.CHANGED)
    kept = [each.machine._table for each in crowd]
    assert max(table.bytes for table in kept) - min(table.bytes for table in kept) <= 2 * STEP
    for table in kept:  # and each its newest, of either kind
        assert list(table.entries) == list(range(100))[-len(table.entries) :]
        assert len(table.entries) > 8


def test_a_stranger_that_turns_out_to_be_a_device_keeps_its_message_ids_out_of_the_strangers_reach() -> None:
    memory = small_memory()
    device = Dialogue(SMALL, memory, known=False)
    device.sends(CON, Code.POST, 7, path="telemetry")
    device.asked()
    device.answers(Code.CHANGED)
    device.machine.becomes_known()
    device.machine.becomes_known()
    for _ in range(60):
        stranger = Dialogue(SMALL, memory, known=False)
        stranger.sends(CON, Code.GET, 1, path="test")
        stranger.asked()
        stranger.answers(Code.CONTENT)
    assert memory.duplicates.size <= SMALL.stranger_duplicate_bytes + 2 * ENTRY_COST
    device.sends(CON, Code.POST, 7, path="telemetry")
    assert device.events == []
    device.machine.close()
    device.machine.becomes_known()
    assert memory.duplicates.size <= SMALL.stranger_duplicate_bytes


def test_a_strangers_share_is_small() -> None:
    memory = small_memory()
    stranger = Dialogue(SMALL, memory, known=False)
    for message_id in range(100):
        stranger.sends_bytes(message(CON, Code.GET, message_id, path="test"))
        stranger.asked()
        stranger.answers(Code.CONTENT)
        assert memory.duplicates.size <= SMALL.duplicate_bytes_per_stranger


# Uploads --------------------------------------------------------------------------------------------------------------


def crowd_of_uploads(memory: Memory, peers: int) -> None:
    """Strangers that begin uploads and finish none, until they are told to stop."""
    for each in [Dialogue(SMALL, memory, known=False) for _ in range(peers)]:
        message_id = 0
        for tag in (b"a", b"b"):
            number = 0
            while number < 7 and block(each, message_id, number, True, tag) == "ACK 2.31":
                number += 1
                message_id += 1
            message_id += 1
    assert SMALL.stranger_upload_bytes * 3 // 4 < memory.uploads.size <= SMALL.stranger_upload_bytes


def test_a_crowd_of_strangers_leaves_devices_all_of_their_room_and_a_stranger_a_little() -> None:
    memory = small_memory()
    crowd_of_uploads(memory, 20)
    device = Dialogue(SMALL, memory)
    for number in range(7):
        assert block(device, number, number, True) == "ACK 2.31"
    stranger = Dialogue(SMALL, memory, known=False)
    assert [block(stranger, number, number, True) for number in range(2)] == ["ACK 2.31"] * 2
    assert block(stranger, 2, 2, False) == ""
    assert len(stranger.asked().payload) == 2 * 1_024 + 3


def test_devices_that_upload_more_than_there_is_room_for_all_get_to_their_end() -> None:
    """Each sends its blocks in turn, repeats what is refused for now, and begins anew where a block is missing."""
    memory = small_memory()
    crowd = [Dialogue(SMALL, memory) for _ in range(20)]
    at, message_ids, finished = [0] * len(crowd), [0] * len(crowd), 0
    for _ in range(400):
        for number, each in enumerate(crowd):
            if at[number] > 7:
                continue
            said = block(each, message_ids[number], at[number], at[number] < 7)
            message_ids[number] += 1
            if said == "ACK 4.08":
                at[number] = 0
            elif said != "ACK 5.03":
                at[number] += 1
                finished += at[number] == 8
        assert memory.uploads.size <= SMALL.upload_bytes
    assert finished == len(crowd)
    assert memory.uploads.size == 0


def test_an_upload_that_begins_takes_nothing_from_those_that_go_on() -> None:
    memory = small_memory()
    crowd = [Dialogue(SMALL, memory) for _ in range(8)]
    for number in range(7):
        for each in crowd:
            assert block(each, number, number, True) == "ACK 2.31"
    newcomer = Dialogue(SMALL, memory)
    said = [block(newcomer, number, number, True) for number in range(3)]
    assert said == ["ACK 2.31", "ACK 2.31", "ACK 5.03"]
    assert all(block(each, 7, 7, False) == "" for each in crowd)
    assert block(newcomer, 3, 2, True) == "ACK 2.31"


def test_a_stranger_may_send_one_of_the_largest_bodies_and_as_a_device_two() -> None:
    memory = small_memory()
    stranger = Dialogue(SMALL, memory, known=False)
    for number in range(7):
        assert block(stranger, number, number, True, b"a") == "ACK 2.31"
    assert block(stranger, 10, 0, True, b"b") == "ACK 2.31"
    assert len(memory.uploads) == 1, "its own earlier one makes room"
    stranger.machine.becomes_known()
    for number in range(7):
        assert block(stranger, 20 + number, number, True, b"c") == "ACK 2.31"
    assert len(memory.uploads) == 2
    for message_id, number, tag in ((30, 1, b"b"), (31, 7, b"c")):
        assert block(stranger, message_id, number, False, tag) == ""
        assert len(stranger.asked().payload) == number * 1_024 + 3
    assert memory.uploads.size == 0


# Answers in blocks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["strangers", "devices"])
def test_a_crowds_answers_leave_a_device_its_own(known: bool) -> None:
    memory = small_memory()
    device = Dialogue(SMALL, memory)
    device.sends(CON, Code.POST, 1, path="enroll")
    device.asked()
    device.answers(Code.CHANGED, bytes(2_500))
    device.said()
    for _ in range(12):
        each = Dialogue(SMALL, memory, known=known)
        for number, path in enumerate("abcdef"):
            each.sends(CON, Code.GET, number, path=path)
            each.asked()
            each.answers(Code.CONTENT, bytes(2_500))
    assert memory.snapshots.size <= SMALL.snapshot_bytes + SMALL.stranger_snapshot_bytes
    device.sends(CON, Code.POST, 2, path="enroll", block2=(1, False, 6))
    assert [said[:8] for said in device.said()] == ["ACK 2.04"]


def test_an_answer_that_a_stranger_fetches_is_a_devices_once_it_is_known() -> None:
    memory = small_memory()
    device = Dialogue(SMALL, memory, known=False)
    device.sends(CON, Code.POST, 1, path="enroll")
    device.asked()
    device.answers(Code.CHANGED, bytes(2_500))
    device.machine.becomes_known()
    device.machine.close()
    assert (memory.snapshots.size, len(memory.snapshots)) == (0, 0)


# The order of shares --------------------------------------------------------------------------------------------------


def test_the_greediest_is_known_through_any_charges() -> None:
    random = Random(7)
    one: Shares[Share] = Shares(0)
    other: Shares[Share] = Shares(0)
    theirs = dict.fromkeys((Share() for _ in range(30)), one)
    for _ in range(5_000):
        share = random.choice(list(theirs))
        shares = theirs[share]
        if random.random() < 0.05:
            theirs[share] = other if shares is one else one
            shares.hand_over(share, theirs[share])
        else:
            shares.charge(share, random.randint(-min(share.bytes, 3_000), 3_000))
        for each in (one, other):
            held = [holder.bytes for holder, where in theirs.items() if where is each]
            assert each.bytes == sum(held)
            greediest = each.greediest()
            if greediest is None:
                assert not sum(held)
            else:
                assert theirs[greediest] is each
                assert greediest.bytes > max(held) - STEP


def test_equals_give_way_in_turn() -> None:
    shares: Shares[Share] = Shares(0)
    equals = [Share() for _ in range(3)]
    for share in equals:
        shares.charge(share, 500)
    assert [shares.greediest() for _ in range(6)] == equals * 2


def test_an_entry_that_alone_is_too_much_is_forgotten() -> None:
    duplicates = Duplicates(CoapLimits(duplicate_bytes=1_000), CoapCounters())
    table = Table()
    entry = duplicates.take(table, 1, True, 0.0)
    duplicates.record(entry, bytes(2_000))
    assert (duplicates.size, len(duplicates)) == (0, 0)
    duplicates.record(entry, b"again")
    assert duplicates.size == 0
