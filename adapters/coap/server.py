"""The CoAP server of one node: its listener, what its associations share, and how it goes away.

    UDP ─► DtlsListener (adapters/dtls) ─► CoapServer ─► CoapEndpoint (endpoint.py) ─► Resources (resources.py)
                                              └─► Guest (admission.py), one for each association

Draining. No handshake begins or goes on, and a further request is answered 5.03; what was received is answered, and
what we sent as confirmable acknowledged, for a bounded time; then every association gets close_notify. What can be
lost: requests that were not answered; their senders repeat them, here or at another node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from adapters.coap.admission import Admission, Guest
from adapters.coap.endpoint import CoapEndpoint
from adapters.coap.limits import CoapCounters, CoapLimits
from adapters.coap.resources import Resources
from adapters.coap.server_limits import ServerLimits
from adapters.dtls.admission import DtlsCounters, DtlsLimits
from adapters.dtls.context import DtlsContext
from adapters.dtls.listener import DtlsListener
from adapters.dtls.ports import Association, PskKey
from adapters.provisioning import Provisioning
from registry.core import Registry


@dataclass(slots=True)
class ServerCounters:
    """Plain counts since the start."""

    stored: int = 0
    duplicate: int = 0
    """Uplinks whose message id had been stored before."""
    rejected: int = 0
    """Uplinks that the core refused for good."""
    too_large: int = 0
    """Of these, those above the limit on one payload."""
    refused: int = 0
    """Associations whose handshake verified and that were not admitted."""
    replaced: int = 0
    """Associations that ended because their device had newer ones."""
    turned_away: int = 0
    """Peers without an identity for which there was no room."""
    provisioning_attempts: int = 0
    """Requests to provision beyond a limit."""
    open_requests: int = 0
    key_requests: int = 0
    tenant_requests: int = 0
    """Requests beyond these limits."""

    def as_dict(self) -> Mapping[str, int]:
        """All counts by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


class CoapServer:
    """Serves CoAP over DTLS (adapters.dtls.ports.Application)."""

    def __init__(
        self,
        registry: Registry,
        provisioning: Provisioning,
        context: DtlsContext,
        *,
        limits: ServerLimits | None = None,
        coap_limits: CoapLimits | None = None,
        dtls_limits: DtlsLimits | None = None,
    ) -> None:
        self.limits = limits or ServerLimits()
        self.counters = ServerCounters()
        self.admission = Admission(registry, self.limits, self.counters)
        resources = Resources(self.admission, provisioning)
        self._endpoint = CoapEndpoint(resources, coap_limits, prompt=resources.prompt)
        self._listener = DtlsListener(self, context, limits=dtls_limits)
        self._guests: dict[str, Guest] = {}

    @property
    def coap_counters(self) -> CoapCounters:
        """The counts of the message layer."""
        return self._endpoint.counters

    @property
    def dtls_counters(self) -> DtlsCounters:
        """The counts of the datagram shell below."""
        return self._listener.counters

    async def start(self, host: str, port: int) -> int:
        """Listen. Returns the bound port. Raises OSError when the address cannot be bound."""
        return await self._listener.start(host, port)

    async def drain(self, seconds: float) -> None:
        """Let exchanges under way finish, for at most `seconds`; then say goodbye to everybody."""
        self._listener.refuse()
        await self._endpoint.drain(seconds)
        for guest in list(self._guests.values()):
            guest.left()
        self._guests.clear()
        await self._listener.close()

    # adapters.dtls.ports.Application ----------------------------------------------------------------------------------

    async def psk(self, identity: bytes, address: str) -> PskKey:
        return await self.admission.psk(identity, address)

    def established(self, association: Association) -> None:
        guest = Guest(self.admission, self._endpoint, association, self._forget)
        self._guests[association.association_id] = guest

    def received(self, association: Association, datagram: bytes) -> None:
        self._endpoint.received(association, datagram)

    def ended(self, association: Association, reason: str) -> None:
        guest = self._guests.get(association.association_id)
        if guest is not None:
            guest.left()

    def _forget(self, guest: Guest) -> None:
        self._guests.pop(guest.association.association_id, None)
