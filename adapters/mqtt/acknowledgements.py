"""Which incoming PUBLISHes of QoS 1 and 2 one connection owes an answer, and which answers may leave now.

    expect ─► (in the order of the PUBLISHes) ─► answer, in any order ─► due, in the order of the PUBLISHes

PUBACKs leave in the order of their PUBLISHes, and so do PUBRECs [MQTT-4.6.0-2], [MQTT-4.6.0-3]; neither waits for the
other. A QoS 2 id counts against our Receive Maximum until its PUBCOMP, or until it is refused (5.0 §4.9).

Pure. It lives and dies with the connection: a QoS 2 id that is stored stays in the session.
"""

from __future__ import annotations

from adapters.mqtt.session_values import Receipt
from adapters.mqtt.wire_packets import QoS
from adapters.mqtt.wire_reasons import ReasonCode


class Awaited:
    """One of them. `reason` None: nobody has answered yet."""

    __slots__ = ("packet_id", "reason", "receipt", "text")

    def __init__(self, packet_id: int, receipt: Receipt | None, reason: ReasonCode | None) -> None:
        self.packet_id = packet_id
        self.receipt = receipt
        self.reason = reason
        self.text = ""


class Acknowledgements:
    """One connection's. Queues are lists, as connection.py says."""

    __slots__ = ("_awaited", "_holding", "_pubacks", "_pubrecs")

    def __init__(self) -> None:
        self._awaited: dict[tuple[QoS, int], Awaited] = {}
        self._pubacks: list[Awaited] = []
        self._pubrecs: list[Awaited] = []
        self._holding: set[int] = set()

    @property
    def outstanding(self) -> int:
        """How many count against our Receive Maximum."""
        return len(self._pubacks) + len(self._holding)

    def awaits(self, qos: QoS, packet_id: int) -> bool:
        """Whether an answer for this id is on its way."""
        return (qos, packet_id) in self._awaited

    def holds(self, packet_id: int) -> bool:
        """Whether this QoS 2 id counts already."""
        return packet_id in self._holding

    def expect(self, qos: QoS, packet_id: int, receipt: Receipt | None, reason: ReasonCode | None = None) -> None:
        """A PUBLISH came. `receipt` None: its answer is another connection's receipt, or is known: `reason`."""
        awaited = self._awaited[qos, packet_id] = Awaited(packet_id, receipt, reason)
        if qos is QoS.AT_LEAST_ONCE:
            self._pubacks.append(awaited)
        else:
            self._pubrecs.append(awaited)
            self._holding.add(packet_id)

    def answer(self, receipt: Receipt, reason: ReasonCode, text: str) -> None:
        """It is stored, or refused. Of QoS 1 what an earlier connection asked is nobody's here."""
        awaited = self._awaited.get((receipt.qos, receipt.packet_id))
        if awaited is None or (receipt.qos is QoS.AT_LEAST_ONCE and awaited.receipt != receipt):
            return
        awaited.reason = reason
        awaited.text = text

    def due(self, qos: QoS) -> tuple[int, ReasonCode, str] | None:
        """The next answer that may leave, as packet id, reason and text; it is not owed any more."""
        queue = self._pubacks if qos is QoS.AT_LEAST_ONCE else self._pubrecs
        if not queue or queue[0].reason is None:
            return None
        first = queue.pop(0)
        reason = first.reason
        assert reason is not None
        del self._awaited[qos, first.packet_id]
        if reason.failed and qos is QoS.EXACTLY_ONCE:
            self._holding.discard(first.packet_id)
        return first.packet_id, reason, first.text

    def completed(self, packet_id: int) -> None:
        """PUBCOMP is sent for this id."""
        self._holding.discard(packet_id)

    def clear(self) -> None:
        """Nobody is there to be answered."""
        self._awaited.clear()
        self._pubacks.clear()
        self._pubrecs.clear()
