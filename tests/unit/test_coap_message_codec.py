"""The CoAP codec: what RFC 7252 §3 allows and forbids, cut everywhere, noise, and against aiocoap's codec."""

from __future__ import annotations

from random import Random

import aiocoap
import pytest
from aiocoap.error import UnparsableMessage
from aiocoap.numbers.codes import Code
from aiocoap.numbers.optionnumbers import OptionNumber
from aiocoap.numbers.types import Type
from aiocoap.optiontypes import OpaqueOption
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from adapters.coap.codec import MAX_OPTIONS, decode, encode, head_of
from adapters.coap.messages import Head, LocalProtocolError, Message, RemoteProtocolError
from adapters.coap.options import OptionError, RequestOptions, read_request
from tests.coap_peers import CON, message

_OPAQUE = [  # numbers that aiocoap keeps as bytes, small and large
    number
    for number in (1, 4, 9, 252, 292, 2_000, 2_049, 40_000, 65_535)
    if OptionNumber(number).format is OpaqueOption
]
_CODES = st.sampled_from(
    [Code.GET, Code.POST, Code.FETCH, Code.CONTENT, Code.CHANGED, Code.TOO_MANY_REQUESTS, Code(31)]
)

options = st.lists(st.tuples(st.sampled_from(_OPAQUE), st.binary(max_size=300)), max_size=12).map(
    lambda pairs: tuple(sorted(pairs, key=lambda pair: pair[0]))
)
messages = st.builds(
    Message,
    st.sampled_from(list(Type)),
    _CODES,
    st.integers(0, 0xFFFF),
    st.binary(max_size=8),
    options,
    st.binary(max_size=100),
)


@given(messages)
@example(Message(CON, Code.POST, 1, b"", ((65_535, b"x" * 12),), b""))
@example(Message(CON, Code.POST, 1, b"", ((1, b"x" * 13), (14, b""), (282, b"x" * 269), (283, b"x" * 65_000)), b"p"))
def test_what_is_written_is_read(written: Message) -> None:
    assert decode(encode(written)) == written


@given(messages)
def test_aiocoap_reads_what_is_written(written: Message) -> None:
    read = aiocoap.Message.decode(encode(written))
    assert (read.mtype, read.code, read.mid, read.token, read.payload) == (
        written.type,
        written.code,
        written.message_id,
        written.token,
        written.payload,
    )
    assert tuple((int(option.number), option.encode()) for option in read.opt.option_list()) == written.options


@given(messages)
def test_what_aiocoap_writes_is_read(written: Message) -> None:
    theirs = aiocoap.Message(
        code=written.code,
        _mtype=written.type,
        _mid=written.message_id,
        _token=written.token,
        payload=written.payload,
    )
    for number, value in written.options:
        theirs.opt.add_option(OptionNumber(number).create_option(decode=value))
    assert decode(theirs.encode()) == written
    assert theirs.encode() == encode(written)


@given(messages, st.randoms(use_true_random=False))
def test_cut_anywhere_it_is_another_message_or_the_declared_error(written: Message, random: Random) -> None:
    datagram = encode(written)
    for end in {*range(min(len(datagram), 40)), random.randrange(len(datagram) + 1)}:
        try:
            read = decode(datagram[:end])
        except RemoteProtocolError:
            continue
        assert encode(read) == datagram[:end]  # a cut before the payload or after whole options


def outcome(datagram: bytes, known: Head | None) -> Message | tuple[str, object]:
    try:
        return decode(datagram, known)
    except RemoteProtocolError as error:
        return str(error), error.header


@given(messages, messages, st.binary(max_size=4))
@example(Message(CON, Code.POST, 1), Message(CON, Code.POST, 1), b"\xff")
@example(Message(CON, Code.POST, 1, b"", ((1, b"\xff"),)), Message(CON, Code.POST, 1), b"\xff")
def test_options_that_are_expected_are_read_as_any_others(one: Message, other: Message, more: bytes) -> None:
    datagram = encode(one)
    known = head_of(datagram, decode(datagram))
    again = decode(encode(replace(other, code=Code.POST, options=one.options)), known)
    assert again.options is known.options
    bare = encode(replace(one, payload=b""))
    for each in (datagram, encode(other), bare + more, *(datagram[:end] for end in range(min(len(datagram), 60)))):
        assert outcome(each, known) == outcome(each, None)


def test_noise_gives_only_the_declared_error() -> None:
    random = Random(7)
    taken = 0
    for _ in range(20_000):
        noise = bytearray(random.randbytes(random.randrange(40)))
        if noise and random.random() < 0.8:
            noise[0] = 0x40 | noise[0] & 0x3F  # the right version, or most would end there
        try:
            read = decode(bytes(noise))
        except RemoteProtocolError:
            continue
        taken += 1
        try:
            assert isinstance(read_request(read.options), RequestOptions)
        except OptionError:
            continue
    assert 500 < taken < 19_500


def test_what_both_codecs_take_they_read_alike() -> None:
    random = Random(11)
    both = 0
    for _ in range(5_000):
        datagram = bytes((0x40 | random.randrange(9), 1, 0, 1)) + random.randbytes(random.randrange(30))
        try:
            ours = decode(datagram)
        except RemoteProtocolError:
            continue
        try:
            theirs = aiocoap.Message.decode(datagram)
        except (UnparsableMessage, UnicodeDecodeError):
            continue  # they look into the options
        both += 1
        assert (ours.token, ours.payload) == (theirs.token, theirs.payload)
        assert [number for number, _ in ours.options] == [int(option.number) for option in theirs.opt.option_list()]
    assert both > 200


@pytest.mark.parametrize(
    ("datagram", "why"),
    [
        (b"", "at least 4"),
        (b"\x40\x01\x00", "at least 4"),
        (b"\x80\x01\x00\x01", "version 2"),
        (b"\x49\x01\x00\x01123456789", "token length of 9"),
        (b"\x4f\x01\x00\x01" + bytes(15), "token length of 15"),
        (b"\x44\x01\x00\x01abc", "token that is cut off"),
        (b"\x40\x01\x00\x01\xff", "payload marker"),
        (b"\x40\x01\x00\x01\xb1x\xff", "payload marker"),
        (b"\x40\x01\x00\x01\xf0", "15"),
        (b"\x40\x01\x00\x01\x0f", "15"),
        (b"\x40\x01\x00\x01\xb2x", "option 11 is cut off"),
        (b"\x40\x01\x00\x01\xd0", "header that is cut off"),
        (b"\x40\x01\x00\x01\xe0\x01", "header that is cut off"),
        (b"\x40\x00\x00\x01x", "Empty"),
        (b"\x41\x00\x00\x01x", "Empty"),
        (b"\x40\x01\x00\x01\xe0\xff\xff\x10", "option number"),
        (b"\x40\x01\x00\x01" + bytes(MAX_OPTIONS + 1), "options"),
    ],
)
def test_what_is_no_message(datagram: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why) as caught:
        decode(datagram)
    if len(datagram) >= 4 and datagram[0] >> 6 == 1:
        assert caught.value.header is not None
        assert (caught.value.header.type, caught.value.header.message_id) == (CON, datagram[3])
    else:
        assert caught.value.header is None


@pytest.mark.parametrize(
    "broken",
    [
        Message(CON, Code.GET, 1, b"123456789"),
        Message(CON, Code.GET, 0x10000),
        Message(CON, Code.GET, 1, b"", ((11, b"a"), (1, b"b"))),
        Message(CON, Code.GET, 1, b"", ((11, bytes(65_805)),)),
        Message(CON, Code.EMPTY, 1, b"t"),
        Message(CON, Code.EMPTY, 1, b"", (), b"p"),
    ],
)
def test_what_is_never_written(broken: Message) -> None:
    with pytest.raises(LocalProtocolError):
        encode(broken)


def test_options_of_a_request() -> None:
    read = read_request(
        decode(
            message(
                CON,
                Code.PUT,
                1,
                uri_host="example.org",
                uri_port=5683,
                uri_path=("a", "", "ü"),
                uri_query=("x=1", "y"),
                content_format=60,
                accept=50,
                etags=(b"1", b"2"),
                if_match=(b"", b"3"),
                if_none_match=True,
                observe=0,
                block1=(3, True, 2),
                block2=(0, False, 6),
                size1=4711,
                size2=0,
                no_response=26,
                request_tag=(b"", b"t"),
                max_age=7,  # elective, and says nothing in a request
                hop_limit=3,
            )
        ).options
    )
    assert read.path == ("a", "", "ü")
    assert read.query == ("x=1", "y")
    assert (read.content_format, read.accept) == (60, 50)
    assert read.etags == (b"1", b"2")
    assert (read.if_match, read.if_none_match) == ((b"", b"3"), True)
    assert (read.observe, read.no_response, read.size1, read.size2) == (0, 26, 4711, 0)
    assert read.block1 is not None
    assert (read.block1.number, read.block1.more, read.block1.size, read.block1.start) == (3, True, 64, 192)
    assert read.block2 is not None
    assert (read.block2.number, read.block2.more, read.block2.size) == (0, False, 1024)
    assert read.request_tag == (b"", b"t")


@pytest.mark.parametrize(
    ("pairs", "code"),
    [
        (((9, b"oscore"),), Code.BAD_OPTION),  # critical, known elsewhere
        (((2_049, b""),), Code.BAD_OPTION),  # critical, unknown
        (((17, b"\0\0\0"),), Code.BAD_OPTION),  # Accept, too long: §5.4.3
        (((17, b"\0"), (17, b"\0")), Code.BAD_OPTION),  # and twice: §5.4.5
        (((5, b"x"),), Code.BAD_OPTION),  # If-None-Match with a value
        (((11, b"\xff"),), Code.BAD_OPTION),  # no UTF-8
        (((11, bytes(256)),), Code.BAD_OPTION),
        (((23, b"\x07"),), Code.BAD_REQUEST),  # RFC 7959 §2.2
        (((27, b"\x0f"),), Code.BAD_REQUEST),
        (((35, b"coap://example.org/"),), Code.PROXYING_NOT_SUPPORTED),
        (((39, b"coap"),), Code.PROXYING_NOT_SUPPORTED),
    ],
)
def test_options_that_decide_the_answer(pairs: tuple[tuple[int, bytes], ...], code: Code) -> None:
    with pytest.raises(OptionError) as caught:
        read_request(pairs)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "pairs",
    [
        ((4, b"123456789"),),  # an ETag that is too long: elective, ignored
        ((6, b"1234"),),
        ((12, b"123"),),
        ((12, b"\x32"), (12, b"\x3c")),  # the second of a pair that should be one
        ((258, b"12"),),
        ((2_048, b"whatever"),),
    ],
)
def test_elective_options_that_make_no_sense_are_ignored(pairs: tuple[tuple[int, bytes], ...]) -> None:
    read = read_request(pairs)
    assert (read.etags, read.observe, read.no_response) == ((), None, 0)
    assert read.content_format in (None, 50)


def test_strangers_content_formats_are_not_kept() -> None:
    from aiocoap.numbers import ContentFormat

    before = len(ContentFormat._value2member_map_)
    for number in range(60_000, 60_100):
        assert read_request(decode(message_with_format(number)).options).content_format == number
    assert len(ContentFormat._value2member_map_) == before


def message_with_format(number: int) -> bytes:
    return encode(Message(CON, Code.POST, 1, b"", ((12, number.to_bytes(2, "big")),)))
