"""Who is at the other end of an association: proof, the resolver's verdict, and what it may then do.

    psk identity ─► offer: a key for everybody ─► handshake ─┐
    certificate, or nothing ─────────────────────────────────┴─► established ─► Guest

    Guest:   deciding ──┬─► Device(session)       a PSK or a certificate that admits
               ▲  │     ├─► Renewer(right)        a certificate of ours that expired a few days ago
               │  │     ├─► Claimant(template?)   a template's claim PSK, or nothing proved
        asked  │  │     └─► refused ─► 4.01 to what it asks ─► close_notify
        again  └──┘ the core is away, or a limit: 5.03 or 4.29 to what was asked

Deciding begins with the association, not with its first request; what it asks meanwhile is held by the endpoint.
An association is admitted once and then stands as a session in the registry's table, which ends it: on revocation,
expiry and kick. A Renewer has none: it lives as long as a Claimant may, and its right is judged again with each
request for a certificate. The peer gets close_notify (RFC 5246 §7.2.1) and everything of it is dropped: exchanges,
observations, the association. Its next handshake gets a random key or a refused certificate.

A Claimant has no identity and opens no session. It may provision, and read what is nobody's secret; how many there
are, of one address, for how long and how often they may ask is bounded. Those who proved a claim PSK and those who
proved nothing are counted apart, so that a crowd of the second keeps none of the first out; where either is full, the
oldest of the address that has most gives way to an address that has less. Whoever is not a device, whatever became of
its admission, is let go after `provisioning_seconds`; for whom there was no room, within `turned_away_linger`, unless
there is when it asks again. An association costs a place that devices need. So only those of devices are kept when the
listener's table is full; any other gives way to a newcomer, and a device that it hits comes back and is the newest.

A device that wakes up behind a NAT comes back from another port and leaves its old association lying there. So of one
device only the newest few stay: what was silent longest is closed. That is its own doing: all of them proved its key.

A CoAP device sleeps, and an association that is reaped says nothing about it. So associations do not make a device
`offline`, as the end of a connection does over MQTT (CONTRACT §2); they make it `active`, as every authenticated
contact does.

What can race: a revocation with the opening (sessions.py has the order), the peer's leaving with either; each of them
looks at `gone`. What can be lost: nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING, Final, assert_never

import msgspec

from adapters.coap.endpoint import CoapEndpoint
from adapters.coap.errors import error_response
from adapters.coap.server_limits import ServerLimits
from adapters.dtls.ports import Association, CertificateProven, NothingProven, PskKey, PskProven
from adapters.tls.admission import address_block
from certs.chains import BadCertificate, describe_certificate
from registry.claim_psk import ClaimOffer, is_claim_identity
from registry.core import Registry
from registry.errors import RegistryError, ResourceExhausted, Unauthenticated
from registry.model import (
    ClientCertificate,
    Contact,
    DeviceId,
    Identity,
    PskIdentity,
    RenewalRight,
    TemplateId,
    Transport,
)
from registry.rate_limits import RateLimiter
from registry.resolver import PskOffer
from registry.sessions import Session

if TYPE_CHECKING:
    from adapters.coap.server import ServerCounters

log: Final = logging.getLogger(__name__)


class Device(msgspec.Struct, frozen=True):
    """An admitted device."""

    session: Session
    certificate: bool
    """It came with a certificate, not with a PSK."""


@dataclass(frozen=True, slots=True)
class Renewer:
    """The holder of a certificate that has just expired: it may ask for the successor."""

    right: RenewalRight


@dataclass(frozen=True, slots=True)
class Claimant:
    """Nobody yet. `template_id` is the one whose claim PSK it proved; None where it proved nothing."""

    template_id: TemplateId | None


Role = Device | Renewer | Claimant

_TIMER_STEP: Final = 0.001
"""Seconds: the loop's time has whole milliseconds, so that a timer may be that much too early."""

_Pool = dict[str, "list[Guest]"]
"""Claimants by address block, oldest first."""


class _Offered(msgspec.Struct, frozen=True):
    """What goes with a handshake: the offer, and the contact under which its refusals are noted."""

    made: PskOffer | ClaimOffer
    contact: Contact


class Admission:
    """Judges every association of a server."""

    def __init__(self, registry: Registry, limits: ServerLimits, counters: ServerCounters) -> None:
        self.registry = registry
        self.limits = limits
        self.counters = counters
        self.loop = asyncio.get_running_loop()
        self._devices: dict[DeviceId, list[Guest]] = {}
        self._anonymous: _Pool = {}
        self._proven: _Pool = {}
        self._attempts = RateLimiter(limits.provisioning_attempts_per_second, limits.provisioning_attempts_burst)
        self._nobodies: OrderedDict[Guest, None] = OrderedDict()  # no devices, or not yet, in the order of their ends
        self._ender: asyncio.TimerHandle | None = None

    @property
    def claimants(self) -> int:
        """Associations that belong to nobody now."""
        return sum(map(len, (*self._anonymous.values(), *self._proven.values())))

    async def psk(self, identity: bytes, address: str) -> PskKey:
        """The key to verify a handshake with, for any identity. Raises Unavailable."""
        contact = _contact(address)
        if is_claim_identity(identity):
            claims = self.registry.claim_psks
            claim = await claims.offer(identity, contact)
            return PskKey(claim.key, _Offered(claim, contact), partial(claims.unproven, claim, contact))
        resolver = self.registry.resolver
        made = await resolver.offer(PskIdentity(identity), contact)
        return PskKey(made.key, _Offered(made, contact), partial(resolver.unproven, made, contact))

    async def decide(self, guest: Guest, contact: Contact) -> Role:
        """What a proof makes its holder. Raises Unauthenticated, ResourceExhausted, Unavailable."""
        proof = guest.association.proof
        match proof:
            case PskProven(offer=_Offered(PskOffer() as made)):
                identity = await self.registry.resolver.confirm(made, contact)
                return await self._open(guest, identity, contact)
            case PskProven(offer=_Offered(ClaimOffer() as made)):
                return self._claimant(guest, self.registry.claim_psks.confirm(made))
            case PskProven():
                raise AssertionError("an offer that this admission did not make")
            case CertificateProven(der=der):
                return await self._certificate(guest, der, contact)
            case NothingProven():
                return self._claimant(guest, None)
            case _:
                assert_never(proof)

    def attempt(self, guest: Guest) -> None:
        """Count one request to provision. Raises ResourceExhausted."""
        guest.attempts += 1
        if guest.attempts > self.limits.provisioning_attempts:
            self.counters.provisioning_attempts += 1
            raise ResourceExhausted("too many requests to provision on one association", retry_after=60.0)
        wait = self._attempts.take(address_block(guest.association.address), self.loop.time())
        if wait is not None:
            self.counters.provisioning_attempts += 1
            raise ResourceExhausted("this address has sent too many provisioning attempts", retry_after=wait)

    def expect(self, guest: Guest) -> None:
        """Close it at its `until`, unless it turns out to be a device, whose session ends it, or is gone by then."""
        self._nobodies[guest] = None
        if self._ender is None:
            self._ender = self.loop.call_at(guest.until, self._end_nobodies)

    def leave(self, guest: Guest) -> None:
        """An association is gone."""
        self._nobodies.pop(guest, None)
        role = guest.role
        match role:
            case Device(session):
                self.registry.sessions.ended(session)
                self._forget(guest, session.device_id)
            case Claimant(template_id):
                block = address_block(guest.association.address)
                pool = self._pool(template_id)
                pool[block].remove(guest)
                if not pool[block]:
                    del pool[block]
            case Renewer() | None:
                pass
            case _:
                assert_never(role)

    def _end_nobodies(self) -> None:
        """Close those whose time is over. One timer is for all, since nearly all are devices long before that."""
        due = self.loop.time() + _TIMER_STEP
        try:
            while self._nobodies and (guest := next(iter(self._nobodies))).until <= due:
                del self._nobodies[guest]
                guest.close_now()
        finally:  # one that fails keeps nobody else
            first = next(iter(self._nobodies), None)
            self._ender = None if first is None else self.loop.call_at(first.until, self._end_nobodies)

    # -- verdicts --------------------------------------------------------------------------------------------------

    async def _certificate(self, guest: Guest, der: bytes, contact: Contact) -> Role:
        evidence = ClientCertificate(der)
        if _has_ended(der, self.registry):  # only such a one may have the smaller right; everybody else is judged once
            return Renewer(await self.registry.resolver.admit_for_renewal(evidence, contact))
        identity = await self.registry.resolver.admit(evidence, contact)
        return await self._open(guest, identity, contact)

    async def _open(self, guest: Guest, identity: Identity, contact: Contact) -> Role:
        session = await self.registry.sessions.open(identity, contact, guest)
        self._nobodies.pop(guest, None)
        held = self._devices.setdefault(session.device_id, [])
        held.append(guest)
        if len(held) > self.limits.associations_per_device:
            others = [each for each in held if each is not guest]
            self.counters.replaced += 1
            min(others, key=lambda each: each.last_active).close_now()
        return Device(session, isinstance(guest.association.proof, CertificateProven))

    def _claimant(self, guest: Guest, template_id: TemplateId | None) -> Role:
        block, pool = address_block(guest.association.address), self._pool(template_id)
        here = len(pool.get(block, ()))
        most = self.limits.provisioning
        full = here >= self.limits.provisioning_per_address
        if full or (sum(map(len, pool.values())) >= most and not self._displaced(pool, here)):
            self.counters.turned_away += 1
            guest.end_in(self.limits.turned_away_linger)
            raise ResourceExhausted("too many peers are provisioning now", retry_after=5.0)
        guest.stay()
        pool.setdefault(block, []).append(guest)
        return Claimant(template_id)

    def _pool(self, template_id: TemplateId | None) -> _Pool:
        return self._anonymous if template_id is None else self._proven

    @staticmethod
    def _displaced(pool: _Pool, here: int) -> bool:
        """Make room for one of an address that has `here`: the oldest of the address that has most gives way, if that
        keeps at least as many."""
        greediest = max(pool.values(), key=len)
        if len(greediest) <= here + 1:
            return False
        greediest[0].close_now()
        return True

    def _forget(self, guest: Guest, device_id: DeviceId) -> None:
        held = self._devices.get(device_id, [])
        if guest in held:
            held.remove(guest)
        if not held:
            self._devices.pop(device_id, None)


class Guest:
    """One association, from its handshake to its end; the session's Closer, and what the message layer's peer knows."""

    def __init__(
        self,
        admission: Admission,
        endpoint: CoapEndpoint,
        association: Association,
        left: Callable[[Guest], None],
    ) -> None:
        """Begins to decide; requests of its peer are held until then. `left` is told when it is gone."""
        self.association = association
        self.role: Role | None = None
        self.attempts = 0
        self.gone = False
        self._admission = admission
        self._endpoint = endpoint
        self._left = left
        self._loop = admission.loop
        endpoint.open(association, held=True).context = self
        self._end: asyncio.TimerHandle | None = None
        self._deciding: asyncio.Task[Role | RegistryError] | None = None
        self.until = self._loop.time() + admission.limits.provisioning_seconds
        """Loop time at which it is closed if it is nobody."""
        admission.expect(self)
        self._decide()

    @property
    def last_active(self) -> float:
        """Loop time of the last request."""
        return self.role.session.last_active if isinstance(self.role, Device) else 0.0

    async def admitted(self) -> Role:
        """What the peer may do, once that is decided. Raises Unauthenticated, ResourceExhausted, Unavailable."""
        role = self.role
        if role is None:
            verdict = await asyncio.shield(self._decide())
            if isinstance(verdict, RegistryError):
                raise verdict
            role = verdict
        if isinstance(role, Device):
            if role.session.closed:
                raise Unauthenticated("the session is closed")
            role.session.last_active = self._loop.time()
        return role

    def end_in(self, seconds: float) -> None:
        """Close it then, or earlier if that was said before."""
        at = self._loop.time() + seconds
        if self._end is None or at < self._end.when():
            self.stay()
            self._end = self._loop.call_at(at, self.close_now)

    def stay(self) -> None:
        """Take back what `end_in` said: it has the time of one that is nobody, or a session that ends it."""
        if self._end is not None:
            self._end.cancel()
            self._end = None

    def close_now(self) -> None:
        """Say close_notify and forget the peer. Idempotent."""
        if not self.gone:
            self.left()
            self.association.close()

    def left(self) -> None:
        """The association is over, whoever ended it. Idempotent."""
        if self.gone:
            return
        self.gone = True
        self.stay()
        self._left(self)
        self._endpoint.close(self.association.association_id)
        self._admission.leave(self)

    # registry.sessions.Closer -----------------------------------------------------------------------------------------

    async def close(self, reason: str) -> None:
        self.close_now()

    def abort(self) -> None:
        if not self.gone:
            self.left()
        self.association.abort()

    # -- deciding --------------------------------------------------------------------------------------------------

    def _decide(self) -> asyncio.Task[Role | RegistryError]:
        """The decision under way, or the one that stands; a new one where the last failed for a passing reason."""
        if self._deciding is None:
            self._deciding = self._loop.create_task(self._decided(), name="coap admission")
        return self._deciding

    async def _decided(self) -> Role | RegistryError:
        admission, contact = self._admission, _contact_of(self.association)
        try:
            role = await admission.decide(self, contact)
        except Unauthenticated as error:
            admission.counters.refused += 1
            if not self.gone:  # with the id under which the reason was noted
                self._endpoint.refuse(self.association.association_id, error_response(error, contact.correlation_id))
                self.end_in(admission.limits.refused_linger)
            return error
        except RegistryError as error:
            return self._undecided(error)
        except Exception:  # the end of this decision: the peer is told, as of any defect
            self._endpoint.counters.failures += 1
            fields = {"correlation_id": contact.correlation_id, "peer": self.association.association_id}
            log.exception("coap.admission_failed", extra={"fields": fields})
            return self._undecided(RegistryError("the admission failed"))
        self.role = role
        if isinstance(role, Device):
            self.stay()
            self.association.keep()
        if self.gone:  # it left while it was being admitted
            admission.leave(self)
        else:
            self._endpoint.admit(self.association.association_id, known=isinstance(role, Device))
        return role

    def _undecided(self, error: RegistryError) -> RegistryError:
        """The next request asks again, and those that are held now."""
        self._deciding = None
        self._endpoint.admit(self.association.association_id, known=False)
        return error


def _contact_of(association: Association) -> Contact:
    """That of the handshake, where it has one: its refusals were noted under it."""
    match association.proof:
        case PskProven(offer=_Offered(contact=contact)):
            return contact
        case _:
            return _contact(association.address)


def _contact(address: str) -> Contact:
    return Contact(Transport.COAP, address, token_hex(16))


def _has_ended(der: bytes, registry: Registry) -> bool:
    try:
        return describe_certificate(der).not_after <= registry.clock()
    except BadCertificate:
        return False
