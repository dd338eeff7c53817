"""A client's second flight, spoilt by a seed, before both of our handshakes with a pre-shared key: ours and OpenSSL's.

A script says what is done to the three records of the flight (ClientKeyExchange, ChangeCipherSpec, Finished): which
come, in which datagrams and order, and what happens to each on its way. It names places as shares of a record, so that
the same script does the same to both servers, though they chose other random values and so get other bytes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from adapters.dtls.admission import DtlsLimits
from adapters.dtls.context import DtlsContext
from adapters.dtls.engine import DtlsEngine, Ended, Established, Event
from adapters.dtls.handshake import End, IdentityNeeded
from adapters.dtls.openssl_handshake import OpensslHandshake
from adapters.dtls.ports import PskKey
from adapters.dtls.records import (
    ClientHello,
    hello_verify_request,
    plaintext_record,
    read_client_hello,
    split_records,
)
from registry.secrets import Secret
from tests.bench.coap_client import PskClient
from tests.dtls_peers import KEY

CONTEXT: Final = DtlsContext(None)
EXCHANGE, CHANGE, FINISHED = range(3)
HARMS: Final = ("flip", "byte", "cut", "insert", "epoch", "content", "number", "fragments", "length")


@dataclass(frozen=True, slots=True)
class Harm:
    """What happens to a record: the kind, where (a share of it), and a number that says more."""

    kind: str
    where: float
    value: int


Script = list[list[tuple[int, Harm | None]]]
"""Datagrams of records of the flight."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a server made of a script."""

    asked: list[bytes]
    established: bool
    end: End | None
    alert: int | None
    """The first that it sent under no key."""
    delivered: bytes
    misfits: bool
    """A datagram was there that does not consist of whole records."""


def draw(dice: random.Random) -> Script:
    """A script; half of them end with the whole flight as it was."""

    def harm() -> Harm | None:
        return Harm(dice.choice(HARMS), dice.random(), dice.randrange(256)) if dice.random() < 0.35 else None

    script: Script = [
        [(dice.randrange(3), harm()) for _ in range(dice.choice([1, 1, 1, 2, 3]))] for _ in range(dice.randrange(1, 7))
    ]
    if dice.random() < 0.5:
        script.append([(EXCHANGE, None), (CHANGE, None), (FINISHED, None)])
    return script


def engine(hello: ClientHello, *, openssl: bool) -> DtlsEngine:
    """One with the handshake of either, whatever it would choose."""
    made = DtlsEngine(CONTEXT, hello, DtlsLimits())
    if openssl:
        made._handshake = OpensslHandshake(CONTEXT, has_psk=True, limits=DtlsLimits(), out=made._out)
    return made


class Attempt:
    """A client up to its second flight, and the server before which it stands."""

    def __init__(self, *, openssl: bool = False, key: bytes = KEY) -> None:
        client = PskClient(b"device-1", key)
        first = read_client_hello(client.hello())
        assert first is not None
        second = client.receive(hello_verify_request(first, bytes(20)))
        assert second is not None
        hello = read_client_hello(second)
        assert hello is not None
        self.engine = engine(hello, openssl=openssl)
        self.events: list[Event] = self.engine.start(hello)
        whole = client.receive(b"".join(self.engine.datagrams()))
        assert whole is not None
        self.records = [whole[record.start : record.end] for record in split_records(whole)]

    def play(self, script: Script) -> Result:
        """Deliver what the script says; the application has the key of device-1, and answers at once."""
        delivered, alert, number, misfits = [], None, 10, False
        for records in script:
            datagram = b""
            for which, harm in records:
                datagram += _spoilt(self.records[which], harm, number)
                number += 2
            delivered.append(datagram)
            misfits |= [0, *(record.end for record in split_records(datagram))][-1] != len(datagram)
            self.events += self.engine.receive(datagram)
            if self.events and isinstance(self.events[-1], IdentityNeeded):
                self.events += self.engine.key(PskKey(Secret(KEY), "the offer"))
            for said in self.engine.datagrams():
                if said[0] == 21 and said[4] == 0 and alert is None:
                    alert = said[14]
        ends = [event.reason for event in self.events if isinstance(event, Ended)]
        asked = [event.identity for event in self.events if isinstance(event, IdentityNeeded)]
        established = [event for event in self.events if isinstance(event, Established)]
        assert max(len(ends), len(asked), len(established)) <= 1
        assert not ends or isinstance(self.events[-1], Ended)
        return Result(asked, bool(established), ends[0] if ends else None, alert, b"".join(delivered), misfits)


def _spoilt(record: bytes, harm: Harm | None, number: int) -> bytes:
    """The record after that harm; one in the clear gets this record number, as if it were sent again."""
    data = bytearray(record)
    if not data[4]:
        data[5:11] = number.to_bytes(6, "big")
    if harm is None:
        return bytes(data)
    at, value = int(harm.where * len(data)), harm.value
    match harm.kind:
        case "flip":
            data[at] ^= 1 << value % 8
        case "byte":
            data[at] = value
        case "cut":
            del data[at:]
        case "insert":
            data[at:at] = bytes((value,))
        case "epoch":
            data[4] = value % 3
        case "content":
            data[0] = 20 + value % 5
        case "number" if len(data) > 20:
            data[18] = value % 5
        case "length":
            data[11:13] = max(0, len(data) - 15 + value % 5).to_bytes(2, "big")
        case "fragments" if data[0] == 22 and not data[4]:
            return _in_two(bytes(data), number, value)
        case _:
            pass
    return bytes(data)


def _in_two(record: bytes, number: int, value: int) -> bytes:
    """A handshake message in two fragments, in either order."""
    head, body = record[13:19], record[25:]
    cut = 1 + value % (len(body) - 1)
    parts = [(0, body[:cut]), (cut, body[cut:])]
    if value & 1:
        parts.reverse()
    return b"".join(
        plaintext_record(22, number + at, head + start.to_bytes(3, "big") + len(part).to_bytes(3, "big") + part)
        for at, (start, part) in enumerate(parts)
    )
