"""The server's side of one CoAP peer, without the network: datagrams and `now` in, events and datagrams out.

Theory
------
A request lives as an exchange from its datagram to its response:

    CON ──► SERVING ──respond()──► ACK with the response ("piggybacked", RFC 7252 §5.2.1)
               └─ack_delay─► ACKNOWLEDGED ──respond()──► a CON of ours, repeated until it is acknowledged (§5.2.2)
    NON ──► SERVING ──respond()──► a NON of ours (§5.2.3)
    either ──► SERVING ──respond(separate)──► a CON of ours, behind an empty ACK for a CON

    receive: decode ─► known message id? the same answer again (duplicates.py)
                    ─► options (options.py) ─► Block2 of an answer that is kept? the block
                    ─► Block1? reassemble (blockwise.py) ─► RequestReceived

The shell's duties, after every call: take `next_event` until None, send what `datagrams_to_send` gives, and call `tick`
at `next_timer`. For each RequestReceived it owes one `respond`.

A newer state waits while the blocks of the one before are being fetched: they are asked for by its path alone (RFC 7959
§2.6), so that afterwards they would be blocks of the newer one. Who asks for no more is not waited for long.

What was sent twice and asked for again, or not acknowledged, is cut anew in smaller blocks (slices.py).

Invariants. At most one CON of ours is unacknowledged (NSTART); answers that had to be separate wait in `_waiting`, and
that is bounded by `requests_per_peer` since an exchange counts until its answer is on its way; notifications wait in
their observation, one each. Nothing here is shared with another peer but memory, whose bounds are in duplicates.py and
blockwise.py: a peer that is silent stops its own CONs and nobody else's.

What can be lost: a response to a NON, as RFC 7252 has it; a separate response that nobody acknowledges in 93 s at most.

Rejecting (§4.2, §4.3): a CON that is broken, empty (a ping), a response, or of a reserved class gets a Reset, as does a
NON that we understand well enough to reject; all else is ignored. A Reset never answers an ACK or a Reset. No answer
to a datagram that is none is longer than it.

Nothing raises for the peer's faults. `LocalProtocolError` is the caller's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from random import Random
from typing import Final

from aiocoap.numbers.codes import Code
from aiocoap.numbers.types import Type

from adapters.coap.blockwise import (
    Complete,
    Key,
    Partial,
    Refusal,
    answer_key,
    entity_tag,
    upload_key,
)
from adapters.coap.codec import decode, encode, head_of
from adapters.coap.duplicates import Entry, Table
from adapters.coap.exchanges import Event, Exchange, NotificationArrived, ObservationEnded, RequestReceived
from adapters.coap.memory import Memory
from adapters.coap.messages import Head, LocalProtocolError, Message, RemoteProtocolError
from adapters.coap.observations import EndCause, Observation, ObservationState, Pending
from adapters.coap.options import (
    BLOCK1,
    OBSERVE,
    SIZE1,
    Block,
    OptionError,
    RequestOptions,
    encode_uint,
    read_request,
    response_options,
)
from adapters.coap.ports import Request, Response
from adapters.coap.slices import Slices
from adapters.coap.transmissions import Transmission

_CON, _ACK, _RST = Type.CON, Type.ACK, Type.RST  # a name in an Enum takes several times as long to look up
_REMEMBERED_NOTIFICATIONS: Final = 32  # message ids of them, so that a late Reset still finds its observation
_REMEMBERED_HEAD: Final = 64  # bytes of the options of the last request: a path, a format, perhaps a query
_OBSERVE_MODULUS: Final = 1 << 24  # RFC 7641 §3.4
_REGISTER: Final = 0
_DEREGISTER: Final = 1


class PeerMachine:
    """One peer. `key` is unique among the living peers; `room` is the largest datagram that may be sent, in bytes.

    `random` decides message ids and timeouts; `now` is seconds on the caller's clock, here and everywhere. `known` says
    whether it is a device; a stranger has smaller shares of memory (duplicates.py).
    """

    __slots__ = (
        "_active",
        "_closed",
        "_events",
        "_exchanges",
        "_head",
        "_key",
        "_limits",
        "_meaning",
        "_memory",
        "_message_id",
        "_non_allowed_at",
        "_notifiable",
        "_notified",
        "_number",
        "_observations",
        "_out",
        "_random",
        "_sequence",
        "_slices",
        "_table",
        "_tokens",
        "_unacknowledged",
        "_waiting",
    )

    def __init__(self, key: int, memory: Memory, random: Random, room: int, known: bool = True) -> None:
        self._key = key
        self._memory = memory
        self._limits = memory.limits
        self._random = random
        self._message_id: int | None = None  # of our last own message
        self._number = 0
        self._sequence = 0  # one for all observations, so that a token that is used again still counts up
        self._table = Table(known)
        self._slices = Slices(memory, self._table, room)
        self._exchanges: dict[int, Exchange] = {}
        self._unacknowledged: dict[int, Exchange] = {}  # in the order of ack_due
        self._active: Transmission | None = None
        self._waiting: deque[Transmission] = deque()
        self._observations: dict[int, Observation] = {}
        self._tokens: dict[bytes, Observation] = {}
        self._notifiable: dict[int, Observation] = {}  # those with a pending state, in turn
        self._notified: dict[int, Observation] = {}  # by message id
        self._head: Head | None = None  # of its last request, and what it means
        self._meaning = RequestOptions()
        self._non_allowed_at = 0.0
        self._events: deque[Event] = deque()
        self._out: list[bytes] = []
        self._closed = False

    # In ---------------------------------------------------------------------------------------------------------------

    def receive(self, datagram: bytes, now: float) -> None:
        """Take one datagram."""
        if self._closed:
            return
        counters = self._memory.counters
        counters.received += 1
        try:
            message = decode(datagram, self._head)
        except RemoteProtocolError as error:
            counters.malformed += 1
            if error.header is not None and error.header.type is Type.CON:
                self._reset(error.header.message_id)
            return
        kind = message.type
        if kind is _ACK or kind is _RST:
            self._on_reply(message, now)
            return
        entry = self._memory.duplicates.find(self._table, message.message_id, now)
        if entry is not None:
            counters.duplicates += 1
            if entry.reply is not None and kind is _CON:
                entry.repetitions += 1
                if not self._slices.do_not_arrive(entry.reply, entry.repetitions) or not self._cut_anew(
                    datagram, message, entry, now
                ):
                    self._send(entry.reply)
            return
        if message.code.is_request():
            entry = self._memory.duplicates.take(self._table, message.message_id, kind is _CON, now)
            self._on_request(datagram, message, entry, now)
            return
        # a ping (§4.3), a response that nobody waits for, or a reserved class
        if message.code != Code.EMPTY or kind is _CON:
            self._reset(message.message_id)

    def tick(self, now: float) -> None:
        """Time has passed."""
        if self._closed:
            return
        while self._unacknowledged:
            exchange = next(iter(self._unacknowledged.values()))
            if exchange.ack_due > now:
                break
            self._acknowledge(exchange)
        active = self._active
        if active is not None and active.due <= now:
            self._repeat(active, now)
        self._pump(now)

    def next_timer(self) -> float | None:
        """When `tick` has something to do."""
        due: float | None = None
        if self._unacknowledged:
            due = next(iter(self._unacknowledged.values())).ack_due
        if self._active is not None and (due is None or self._active.due < due):
            due = self._active.due
        if self._active is None:
            for observation in self._notifiable.values():
                at = max(self._non_allowed_at, self._slices.fetched_until(observation.key))
                due = at if due is None else min(due, at)
        return due

    @property
    def transmitting(self) -> bool:
        """Whether a CON of ours is not acknowledged yet, or waits for its turn."""
        return self._active is not None or bool(self._waiting)

    # Out --------------------------------------------------------------------------------------------------------------

    def next_event(self) -> Event | None:
        """The next thing that the caller has to know."""
        return self._events.popleft() if self._events else None

    def datagrams_to_send(self) -> list[bytes]:
        """What is to be sent now, in order."""
        out = self._out
        if out:
            self._out = []
            self._memory.counters.sent += len(out)
        return out

    # The caller's answers ---------------------------------------------------------------------------------------------

    def respond(self, number: int, response: Response, now: float) -> None:
        """Answer a request; after `close`, do nothing.

        Raises LocalProtocolError for one that was answered already, and it or others for a response that cannot be
        written; the request then is still to be answered.
        """
        if self._closed:
            return
        exchange = self._exchanges.get(number)
        if exchange is None:
            raise LocalProtocolError(f"exchange {number} is not open")
        options: list[tuple[int, bytes]] = []
        observation = exchange.observation
        if observation is not None and self._settle(observation, response):
            options.append((OBSERVE, self._next_sequence()))
        if exchange.block1 is not None:
            options.append((BLOCK1, exchange.block1.encode()))
        if exchange.options.etags and response.etag is None and response.code == Code.CONTENT:
            tag = entity_tag(response.payload)
            if tag in exchange.options.etags:  # one that we gave, since the resource has none of its own
                response = Response(Code.VALID, max_age=response.max_age, etag=tag)
        if response.separate:
            if exchange.confirmable and not exchange.acknowledged:
                self._acknowledge(exchange)
            exchange.confirmable = exchange.acknowledged = True
        self._finish_cut(exchange, response, options, now)
        del self._exchanges[number]
        self._unacknowledged.pop(number, None)
        if self._waiting or self._notifiable:
            self._pump(now)

    def accept(self, number: int) -> bool:
        """Keep an observation that was offered; a good response makes it active. False when it is over already."""
        observation = self._observations.get(number)
        if observation is None:
            return False
        observation.accepted = True
        return True

    def notify(self, number: int, response: Response, now: float, receipt: Hashable | None = None) -> None:
        """Send the newest state of an observation; with `receipt` NotificationArrived follows once it has arrived."""
        observation = self._observations.get(number)
        if observation is None:
            return
        observation.pending = Pending(response, receipt)
        if observation.state is ObservationState.ACTIVE:
            self._notifiable.setdefault(number, observation)
            self._pump(now)

    def end(self, number: int, now: float) -> None:
        """Forget an observation without a word."""
        observation = self._observations.get(number)
        if observation is not None:
            self._end(observation, None)
            self._pump(now)

    def has_room(self, room: int) -> None:
        """The largest datagram that may be sent, in bytes, is another one now."""
        self._slices.room = room

    def becomes_known(self) -> None:
        """It has turned out to be a device."""
        if self._closed or self._table.known:
            return
        memory = self._memory
        memory.duplicates.becomes_known(self._table)
        memory.uploads.becomes_known(self._key)
        memory.snapshots.becomes_known(self._key)

    def close(self) -> None:
        """The peer is gone: drop all of it. ObservationEnded follows for each accepted observation."""
        if self._closed:
            return
        self._closed = True
        self._events.clear()
        for observation in list(self._observations.values()):
            self._end(observation, EndCause.PEER_GONE)
        memory = self._memory
        memory.duplicates.forget(self._table)
        memory.uploads.forget(self._key)
        memory.snapshots.forget(self._key)
        self._exchanges.clear()
        self._unacknowledged.clear()
        self._waiting.clear()
        self._notified.clear()
        self._slices.forget()
        self._active = None
        self._out.clear()

    # Requests ---------------------------------------------------------------------------------------------------------

    def _on_request(self, datagram: bytes, message: Message, entry: Entry, now: float) -> None:
        memory = self._memory
        confirmable = message.type is _CON
        self._number += 1
        ack_due = now + self._limits.ack_delay
        try:
            options = self._meant(datagram, message)
        except OptionError as error:
            memory.counters.bad_options += 1
            if error.code == Code.BAD_OPTION and not confirmable:
                self._reset(message.message_id)  # §5.4.1
                return
            exchange = Exchange.of(self._number, message, RequestOptions(), entry, ack_due)
            self._answer(exchange, error.code, str(error).encode(), now)
            return
        exchange = Exchange.of(self._number, message, options, entry, ack_due)
        if options.observe == _DEREGISTER and (old := self._tokens.get(message.token)) is not None:
            self._end(old, EndCause.DEREGISTERED)
            self._pump(now)
        payload = message.payload
        if options.block1 is not None:
            body = self._reassemble(exchange, message, options, options.block1, now)
            if body is None:
                return
            payload = body
        elif options.block2 is not None and options.block2.number > 0 and self._continue(exchange, message, now):
            return
        if len(self._exchanges) + len(self._waiting) >= self._limits.requests_per_peer:
            memory.counters.busy += 1
            self._finish_early(exchange, Response(Code.SERVICE_UNAVAILABLE, max_age=self._limits.busy_max_age), now)
            return
        memory.counters.requests += 1
        request = Request(
            message.code,
            options.path,
            options.query,
            payload,
            options.content_format,
            options.accept,
            options.if_match,
            options.if_none_match,
            options.etags,
        )
        if options.observe == _REGISTER:
            exchange.observation = self._offer(exchange, message, options, now)
            self._pump(now)  # one that was replaced may have been in the way
        self._exchanges[exchange.number] = exchange
        if confirmable:
            self._unacknowledged[exchange.number] = exchange
        offered = exchange.observation.number if exchange.observation is not None else None
        self._events.append(RequestReceived(exchange.number, request, offered))

    def _meant(self, datagram: bytes, message: Message) -> RequestOptions:
        """What a request's options mean. Raises OptionError."""
        if self._head is not None and self._head.options is message.options:
            return self._meaning
        meaning = read_request(message.options)
        head = head_of(datagram, message)
        if len(head.raw) <= _REMEMBERED_HEAD:
            self._head, self._meaning = head, meaning
        return meaning

    def _reassemble(
        self, exchange: Exchange, message: Message, options: RequestOptions, block: Block, now: float
    ) -> bytes | None:
        """The whole body; or None, and an answer is on its way."""
        counters = self._memory.counters
        key = upload_key(self._key, message.code, options)
        taken = self._memory.uploads.take(
            key, block, options.size1, options.content_format, message.payload, now, self._table.known
        )
        preferred = min(block.exponent, self._limits.block_exponent)
        if isinstance(taken, Complete):
            exchange.block1 = Block(block.number, False, block.exponent)
            return taken.body
        if isinstance(taken, Partial):
            # 2.31 with the size that we prefer; the client goes on with that one (RFC 7959 §2.3)
            echo = [(BLOCK1, Block(block.number, True, preferred).encode())]
            self._finish(exchange, Code.CONTINUE, echo, b"", now)
            return None
        echo = [(BLOCK1, Block(block.number, block.more, preferred).encode())]
        if taken is Refusal.TOO_LARGE:
            counters.too_large += 1
            echo.append((SIZE1, encode_uint(self._limits.body_bytes)))  # RFC 7959 §2.9.3, §4
            told = f"up to {self._limits.body_bytes} bytes are taken"
            self._finish(exchange, Code.REQUEST_ENTITY_TOO_LARGE, echo, told.encode(), now)
        elif taken is Refusal.INCOMPLETE:
            counters.incomplete += 1
            self._finish(exchange, Code.REQUEST_ENTITY_INCOMPLETE, echo, b"blocks are missing; begin anew", now)
        elif taken is Refusal.MISFIT:
            counters.bad_options += 1
            self._finish(exchange, Code.BAD_REQUEST, echo, b"a block of another size than it says", now)
        else:
            counters.busy += 1
            self._finish_early(exchange, Response(Code.SERVICE_UNAVAILABLE, max_age=self._limits.busy_max_age), now)
        return None

    def _continue(self, exchange: Exchange, message: Message, now: float) -> bool:
        """Answer a request for a later block from what is kept, or refuse it; False when the handler is to be asked."""
        kept = self._memory.snapshots.get(self._answer_key(exchange), now)
        if kept is not None:
            self._finish_cut(exchange, kept, [], now)
            self._pump(now)  # with the last block a newer state may follow
            return True
        if message.code in (Code.GET, Code.FETCH):
            return False
        # The answer is gone and the request cannot be made again: it may have acted.
        self._memory.counters.incomplete += 1
        self._finish(exchange, Code.REQUEST_ENTITY_INCOMPLETE, [], b"this answer is kept no longer", now)
        return True

    def _finish_cut(self, exchange: Exchange, response: Response, options: list[tuple[int, bytes]], now: float) -> None:
        if not response.payload:
            self._finish(exchange, response.code, options + response_options(response), b"", now)
            return
        key = self._answer_key(exchange)
        payload = self._slices.cut(key, exchange.token, response, exchange.options.block2, options, now)
        if payload is None:
            self._answer(exchange, Code.BAD_REQUEST, b"a block beyond the end", now)
            return
        self._finish(exchange, response.code, options, payload, now)

    def _answer_key(self, exchange: Exchange) -> Key:
        return answer_key(self._key, exchange.method, exchange.options)

    def _finish_early(self, exchange: Exchange, response: Response, now: float) -> None:
        self._finish(exchange, response.code, response_options(response), response.payload, now)

    def _answer(self, exchange: Exchange, code: Code, text: bytes, now: float) -> None:
        self._finish(exchange, code, [], text, now)

    def _finish(
        self, exchange: Exchange, code: Code, options: list[tuple[int, bytes]], payload: bytes, now: float
    ) -> None:
        """Send the response of an exchange, the way that its request and the time taken ask for."""
        options.sort(key=_number)
        no_response = exchange.options.no_response
        if no_response and no_response >> ((code >> 5) - 1) & 1:
            if exchange.confirmable and not exchange.acknowledged:
                self._acknowledge(exchange)  # RFC 7967 §2: the message layer goes on
            return
        # The first answer of an observation is a notification too: a Reset ends it (RFC 7641 §3.6).
        observation = exchange.observation
        if observation is not None and observation.state is not ObservationState.ACTIVE:
            observation = None
        if not exchange.confirmable:
            message_id = self._next_message_id()
            self._send(encode(Message(Type.NON, code, message_id, exchange.token, tuple(options), payload)))
            if observation is not None:
                self._remember(message_id, observation)
            return
        if not exchange.acknowledged:
            reply = encode(Message(_ACK, code, exchange.message_id, exchange.token, tuple(options), payload))
            self._memory.duplicates.record(exchange.entry, reply)
            self._send(reply)
            return
        message_id = self._next_message_id()
        datagram = encode(Message(Type.CON, code, message_id, exchange.token, tuple(options), payload))
        self._waiting.append(Transmission(message_id, datagram, observation))
        self._pump(now)

    def _acknowledge(self, exchange: Exchange) -> None:
        """An empty ACK; the response will follow by itself, if at all."""
        self._memory.counters.acknowledgements += 1
        exchange.acknowledged = True
        self._unacknowledged.pop(exchange.number, None)
        reply = encode(Message(Type.ACK, Code.EMPTY, exchange.message_id))
        self._memory.duplicates.record(exchange.entry, reply)
        self._send(reply)

    # Narrow paths -----------------------------------------------------------------------------------------------------

    def _cut_anew(self, datagram: bytes, message: Message, entry: Entry, now: float) -> bool:
        """Answer a repeated request in smaller blocks: a safe one by asking again (RFC 7252 §4.5 lets us), another one
        from what is kept. False where nothing is."""
        if message.code in (Code.GET, Code.FETCH):
            self._slices.narrowed()
            entry.reply = None
            self._on_request(datagram, message, entry, now)
            return True
        try:
            options = read_request(message.options)
        except OptionError:
            return False  # another request under the same message id; only the id made it a repetition
        key = answer_key(self._key, message.code, options)
        kept = self._memory.snapshots.get(key, now)
        if kept is None:
            return False
        self._slices.narrowed()
        self._number += 1
        exchange = Exchange.of(self._number, message, options, entry, now)
        block1 = options.block1
        echo = [] if block1 is None else [(BLOCK1, Block(block1.number, False, block1.exponent).encode())]
        self._finish_cut(exchange, kept, echo, now)
        return True

    # Observations -----------------------------------------------------------------------------------------------------

    def _offer(self, exchange: Exchange, message: Message, options: RequestOptions, now: float) -> Observation | None:
        if message.code not in (Code.GET, Code.FETCH) or (options.block2 is not None and options.block2.number > 0):
            return None  # RFC 7641 §2, RFC 8132 §2.4; RFC 7959 §2.6
        if (old := self._tokens.get(message.token)) is not None:
            self._end(old, EndCause.REPLACED)  # RFC 7641 §4.1
        if len(self._observations) >= self._limits.observations_per_peer:
            self._memory.counters.observations_refused += 1
            return None
        key = self._answer_key(exchange)
        exponent = options.block2.exponent if options.block2 is not None else 6
        observation = Observation(self._number, message.token, key, exchange.confirmable, exponent, now)
        self._observations[observation.number] = observation
        self._tokens[message.token] = observation
        self._memory.counters.observations += 1
        return observation

    def _settle(self, observation: Observation, response: Response) -> bool:
        """The response to a registration is there: whether the observation stands from now on."""
        if observation.state is not ObservationState.OFFERED:
            return False  # the client has withdrawn meanwhile
        if not response.code.is_successful():
            self._end(observation, EndCause.REFUSED)
            return False
        if not observation.accepted:
            self._end(observation, None)
            return False
        observation.state = ObservationState.ACTIVE
        if observation.pending is not None:
            self._notifiable[observation.number] = observation
        return True

    def _end(self, observation: Observation, cause: EndCause | None) -> None:
        if self._observations.pop(observation.number, None) is None:
            return
        observation.state = ObservationState.ENDED
        observation.pending = None
        self._notifiable.pop(observation.number, None)
        if self._active is not None and self._active.observation is observation:
            self._active = None  # nobody waits for it any more
        if self._tokens.get(observation.token) is observation:
            del self._tokens[observation.token]
        for message_id in [known for known, of in self._notified.items() if of is observation]:
            del self._notified[message_id]
        self._memory.counters.observations -= 1
        if cause is not None and observation.accepted:
            self._events.append(ObservationEnded(observation.number, cause))

    def _notification(self, observation: Observation, kind: Type, pending: Pending, now: float) -> tuple[int, bytes]:
        """Message id and bytes of an observation's newest state."""
        response = pending.response
        options: list[tuple[int, bytes]] = []
        if response.code.is_successful():
            options.append((OBSERVE, self._next_sequence()))  # errors have none, RFC 7641 §4.2
        payload = self._slices.cut(
            observation.key, observation.token, response, None, options, now, exponent=observation.exponent
        )
        assert payload is not None  # it begins at 0
        options.sort(key=_number)
        message_id = self._next_message_id()
        datagram = encode(Message(kind, response.code, message_id, observation.token, tuple(options), payload))
        self._memory.counters.notifications += 1
        observation.sent(kind is Type.CON, now)
        if response.code.is_successful():
            self._remember(message_id, observation)
        return message_id, datagram

    def _remember(self, message_id: int, observation: Observation) -> None:
        self._notified[message_id] = observation
        if len(self._notified) > _REMEMBERED_NOTIFICATIONS:
            del self._notified[next(iter(self._notified))]

    # Our own messages -------------------------------------------------------------------------------------------------

    def _pump(self, now: float) -> None:
        """Send what may be sent: one CON at a time, separate responses before notifications, NONs at their pace."""
        limits = self._limits
        while self._active is None and self._waiting:
            self._begin(self._waiting.popleft(), now)
        for number, observation in list(self._notifiable.items()):
            pending = observation.pending
            assert pending is not None
            if pending.response.code.is_successful() and self._slices.fetched_until(observation.key) > now:
                continue  # the one before is still being fetched, and its blocks have no other name
            if observation.wants_confirmable(pending, limits.confirm_every, limits.confirm_interval, now):
                if self._active is not None:
                    continue
                kind = Type.CON
            elif now < self._non_allowed_at:
                continue
            else:
                kind = Type.NON
            del self._notifiable[number]
            observation.pending = None
            message_id, datagram = self._notification(observation, kind, pending, now)
            if not pending.response.code.is_successful():
                self._end(observation, None)  # RFC 7641 §4.2; the error itself is still to arrive
                self._begin(Transmission(message_id, datagram), now)
            elif kind is Type.CON:
                self._begin(Transmission(message_id, datagram, observation, pending), now)
            else:
                self._non_allowed_at = now + limits.non_interval
                self._send(datagram)

    def _begin(self, transmission: Transmission, now: float) -> None:
        transmission.begin(self._limits, self._random.random(), now)
        self._active = transmission
        self._send(transmission.datagram)

    def _repeat(self, active: Transmission, now: float) -> None:
        observation = active.observation
        if not active.again(self._limits, now):
            self._active = None
            self._memory.counters.given_up += 1
            if observation is not None:
                self._memory.counters.cancelled_by_silence += 1
                self._end(observation, EndCause.SILENCE)  # RFC 7641 §4.5
            return
        self._memory.counters.retransmissions += 1
        if observation is not None and self._slices.do_not_arrive(active.datagram, active.attempts):
            self._slices.narrowed()
            observation.pending = observation.pending or active.state  # the newest state again, in smaller blocks
        if observation is not None and active.state is not None and observation.pending is not None:
            # A newer state takes the place of the one that did not arrive, and its counter too (RFC 7641 §4.5.2). Not
            # that of a request's answer, which is owed.
            pending = observation.pending
            observation.pending = None
            self._notifiable.pop(observation.number, None)
            active.message_id, active.datagram = self._notification(observation, Type.CON, pending, now)
            active.receipt, active.state = pending.receipt, pending
            if not pending.response.code.is_successful():
                active.observation = None
                self._end(observation, None)
        self._send(active.datagram)

    def _on_reply(self, message: Message, now: float) -> None:
        """An ACK or a Reset. What does not match is ignored (RFC 7252 §4.2)."""
        reset = message.type is Type.RST
        if reset and message.code != Code.EMPTY:
            return
        active = self._active
        if active is not None and active.message_id == message.message_id:
            self._active = None
            observation = active.observation
            if observation is not None:
                if reset:
                    self._end(observation, EndCause.RESET)  # RFC 7641 §3.6
                elif active.receipt is not None:
                    self._events.append(NotificationArrived(observation.number, active.receipt))
            self._pump(now)
            return
        if reset and (observation := self._notified.get(message.message_id)) is not None:
            self._end(observation, EndCause.RESET)
            self._pump(now)

    def _reset(self, message_id: int) -> None:
        self._memory.counters.resets += 1
        self._send(encode(Message(Type.RST, Code.EMPTY, message_id)))

    def _send(self, datagram: bytes) -> None:
        self._out.append(datagram)

    def _next_message_id(self) -> int:
        # The first is random (RFC 7252 §4.4), and drawn when there is one: most peers get answers in acknowledgements.
        last = self._random.getrandbits(16) if self._message_id is None else self._message_id
        self._message_id = (last + 1) & 0xFFFF
        return self._message_id

    def _next_sequence(self) -> bytes:
        self._sequence = (self._sequence + 1) % _OBSERVE_MODULUS
        return encode_uint(self._sequence)


def _number(option: tuple[int, bytes]) -> int:
    return option[0]
