"""The server's side of WebSocket frames: MQTT's bytes out of any cut, and an end for everything that is not right."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.mqtt.websocket_frames import End, Frames, Received, WebSocketLimits

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
LIMITS = WebSocketLimits(message_bytes=1_000, fragments=8, empty_frames=4)


def frame(
    opcode: int, payload: bytes = b"", *, final: bool = True, mask: bytes | None = b"\x01\x02\x03\x04", bits: int = 0
) -> bytes:
    """A client's frame, RFC 6455 §5.2."""
    first = bytes([(0x80 if final else 0) | bits << 4 | opcode])
    masked = 0x80 if mask is not None else 0
    if len(payload) < 126:
        length = bytes([masked | len(payload)])
    elif len(payload) < 65_536:
        length = bytes([masked | 126]) + struct.pack("!H", len(payload))
    else:
        length = bytes([masked | 127]) + struct.pack("!Q", len(payload))
    if mask is None:
        return first + length + payload
    return first + length + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


def ended(received: Received) -> End:
    assert received.end is not None
    return received.end


@given(st.data())
def test_payloads_come_out_whole_and_in_order_however_frames_and_reads_are_cut(data: st.DataObject) -> None:
    payloads = data.draw(st.lists(st.binary(max_size=300), max_size=6))
    raw = bytearray()
    for payload in payloads:
        cut = data.draw(st.integers(0, len(payload)))
        if data.draw(st.booleans()):
            raw += frame(BINARY, payload[:cut], final=False) + frame(PING, b"?") + frame(CONTINUATION, payload[cut:])
        else:
            raw += frame(BINARY, payload)
    frames = Frames(WebSocketLimits())
    heard = b""
    position = 0
    while position < len(raw):
        step = data.draw(st.integers(1, 200))
        received = frames.receive(bytes(raw[position : position + step]))
        assert received.end is None
        heard += received.payload
        position += step
    assert heard == b"".join(payloads)


def test_our_frames_are_unmasked_binary_and_as_long_as_they_say() -> None:
    frames = Frames(LIMITS)
    assert frames.binary(b"abc") == frame(BINARY, b"abc", mask=None)
    assert frames.binary(bytes(70_000)) == frame(BINARY, bytes(70_000), mask=None)
    assert frames.pong(b"?") == frame(PONG, b"?", mask=None)


def test_of_many_pings_the_last_is_answered() -> None:
    received = Frames(LIMITS).receive(frame(PING, b"1") + frame(BINARY, b"x") + frame(PING, b"2") + frame(PONG, b"3"))
    assert received == Received(b"x", b"2")


def test_a_close_frame_is_answered_once_and_nothing_after_it_counts() -> None:
    frames = Frames(LIMITS)
    received = frames.receive(
        frame(BINARY, b"last") + frame(CLOSE, b"\x03\xe8bye") + frame(PING, b"?") + frame(BINARY, b"late")
    )
    assert received == Received(b"last", None, End(1000, "", violation=False))
    assert frames.close(1000) == frame(CLOSE, b"\x03\xe8", mask=None)
    assert frames.close(1000) == b""
    assert frames.binary(b"more") == b""
    assert frames.pong(b"more") == b""
    assert frames.receive(frame(BINARY, b"late")) == Received(b"")


def test_a_close_frame_without_a_code_is_answered_alike() -> None:
    frames = Frames(LIMITS)
    end = ended(frames.receive(frame(CLOSE)))
    assert not end.violation
    assert frames.close(end.code) == frame(CLOSE, mask=None)


def test_after_our_close_frame_nothing_is_heard_or_sent() -> None:
    frames = Frames(LIMITS)
    assert frames.close(1001) == frame(CLOSE, b"\x03\xe9", mask=None)
    assert frames.receive(frame(BINARY, b"late") + frame(CLOSE, b"\x03\xe9")) == Received(b"")
    assert frames.close(1000) == b""


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (frame(TEXT, b"hello"), 1003),
        (frame(TEXT, b"he", final=False), 1003),
        (frame(TEXT), 1003),
        (frame(TEXT, b"\xff\xfe"), 1007),
        (frame(BINARY, b"x", mask=None), 1002),
        (frame(BINARY, b"x", bits=4), 1002),  # compressed, where no compression was agreed on
        (frame(3, b"x"), 1002),
        (frame(11, b"x"), 1002),
        (frame(CONTINUATION, b"x"), 1002),
        (frame(BINARY, b"x", final=False) + frame(BINARY, b"y"), 1002),
        (frame(PING, b"x", final=False), 1002),
        (frame(PING, bytes(126)), 1002),
        (frame(CLOSE, b"\x03"), 1002),
        (frame(CLOSE, b"\x03\xed"), 1002),  # 1005 is never sent
        (b"\x82\xfe\x00\x05" + bytes(9), 1002),  # a length longer than it had to be
        (b"\x82\xff" + b"\xff" * 8 + bytes(4), 1002),
        (frame(BINARY, bytes(1_001)), 1009),
        (frame(BINARY, bytes(600), final=False) + frame(CONTINUATION, bytes(600)), 1009),
        (frame(BINARY, b"x", final=False) + frame(CONTINUATION, b"x", final=False) * 8, 1008),
        (frame(PING) * 5, 1008),
        (frame(PONG) * 5, 1008),
        (frame(BINARY) * 5, 1008),
        (frame(BINARY, b"x", final=False) + frame(CONTINUATION, final=False) * 5, 1008),
    ],
)
def test_what_is_wrong_ends_with_its_code_and_keeps_what_was_right_before(wrong: bytes, code: int) -> None:
    frames = Frames(LIMITS)
    received = frames.receive(frame(BINARY, b"good") + wrong + frame(BINARY, b"late"))
    end = ended(received)
    assert (end.code, end.violation) == (code, True)
    assert received.payload.startswith(b"good")
    assert b"late" not in received.payload
    closing = frames.close(end.code, end.text)
    assert closing[0] == 0x88
    assert struct.unpack("!H", closing[2:4])[0] == code
    assert frames.receive(frame(BINARY, b"later")) == Received(b"")


def test_endless_fragments_end_however_slowly_they_come() -> None:
    frames = Frames(LIMITS)
    assert frames.receive(frame(BINARY, b"x", final=False)).end is None
    for _ in range(LIMITS.fragments - 1):
        assert frames.receive(frame(CONTINUATION, final=False)).end is None
    assert ended(frames.receive(frame(CONTINUATION, final=False))).code == 1008


def test_limits_of_a_message_begin_anew_with_the_next() -> None:
    frames = Frames(LIMITS)
    for _ in range(20):
        raw = frame(BINARY, bytes(400), final=False) + frame(CONTINUATION, bytes(400))
        assert frames.receive(raw) == Received(bytes(800))


def test_a_frame_is_not_kept_until_it_is_whole() -> None:
    frames = Frames(WebSocketLimits())
    raw = frame(BINARY, bytes(3_000_000))
    heard = sum(len(frames.receive(raw[at : at + 32_768]).payload) for at in range(0, len(raw) - 1, 32_768))
    assert heard == 3_000_000


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_payload_or_an_end_and_never_an_exception(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(200):
        frames = Frames(LIMITS)
        good = frame(chance.choice((BINARY, PING, CLOSE, TEXT)), chance.randbytes(chance.randrange(40)))
        raw = bytearray(good + chance.randbytes(chance.randrange(60)))
        for _ in range(chance.randrange(3)):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
        cut = chance.randrange(len(raw) + 1)
        for part in (bytes(raw[:cut]), bytes(raw[cut:])):
            end = frames.receive(part).end
            if end is not None:
                frames.close(end.code, end.text)
