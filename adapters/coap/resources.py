"""The resources of CONTRACT §4: what a device, and who wants to become one, may ask over CoAP.

                                            Device   Claimant   Renewer
    POST /telemetry /events /health            ✓                          2.04 after the commit, never before
         /components /uplink
    GET  /config  (observe)                    ✓                          2.05, ETag is the version; 2.03
    POST, PUT /config/reported                 ✓                          2.04
    GET  /commands  (observe, ?after=)         ✓                          2.05, one command or nothing
    POST /commands/{command_id}                ✓                          2.04
    POST /provision                                       ✓               2.01, 2.04 for what was claimed before
    GET  /time, /.well-known/core              ✓          ✓         ✓     2.05
    EST (est.py)                          certificate   crts, att   ✓

A role that may not use a resource gets 4.03 where it is somebody, and 4.01 where it is nobody; what there is is no
secret, the documentation says it. `/.well-known/core` lists what the asker may use.

A message id makes an uplink idempotent beyond the message layer's deduplication: in the envelope of `/uplink`, or as
the query `?message_id=` on any of them. A device that never got its 2.04, and comes back after the exchange's lifetime
or over another association, sends it with the same id and it is stored once.

A query is part of what is asked for (RFC 7252 §5.10.1), and its option is a critical one. So a query that a resource
does not take is refused with 4.00 and its name: to pass over `?device_id=` would store a child's readings as one's own.

No state. What is acknowledged is stored; what is not may be stored or not, and is to be sent again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TypeAlias
from uuid import UUID, uuid4

from aiocoap.numbers.codes import Code

from adapters.coap import formats
from adapters.coap.admission import Admission, Claimant, Device, Guest, Renewer, Role
from adapters.coap.discovery import LINK_FORMAT, WELL_KNOWN_CORE, Link, link_format
from adapters.coap.downlinks import CommandObserver, ConfigObserver, command_response, config_response, config_tag
from adapters.coap.errors import Unserved, error_response, not_found
from adapters.coap.est import Est, EstServe
from adapters.coap.ports import Observation, Peer, Promise, Request, Response
from adapters.provisioning import Provisioning
from adapters.tls.admission import address_block
from adapters.uplink_payloads import enveloped, payload_in
from registry.commands import response_from
from registry.device_config import report_from
from registry.errors import (
    InvalidArgument,
    NotFound,
    PermissionDenied,
    RegistryError,
    ResourceExhausted,
    Unauthenticated,
)
from registry.model import CommandId, Contact, SessionId, Transport
from registry.payloads import TELEMETRY, NewUplink, Payload, PayloadTooLarge, Source, telemetry_from, uplink_from
from registry.rate_limits import RateLimiter
from registry.sessions import Session
from registry.telemetry import shown
from registry.uplinks import StoredUplink

_CHANGED: Final = Response(Code.CHANGED)
_POST: Final = Code.POST
_COAP: Final = Transport.COAP
_KINDS: Final = {"telemetry": TELEMETRY, "events": "event", "health": "health", "components": "components"}
"""What is sent to a path of its own, and the kind that it is stored as; as over MQTT."""
_UPLINKS: Final = frozenset((*_KINDS, "uplink"))


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, and what a resource needs to answer it."""

    request: Request
    guest: Guest
    role: Role
    observation: Observation | None
    correlation_id: str

    @property
    def device(self) -> Device:
        """The device that asks. Raises Unauthenticated, PermissionDenied."""
        match self.role:
            case Device():
                return self.role
            case Renewer():
                raise PermissionDenied("an expired certificate may only be renewed")
            case Claimant():
                raise Unauthenticated("no device on this association")

    @property
    def contact(self) -> Contact:
        """Where it came from, for what the core writes down."""
        return Contact(Transport.COAP, self.guest.association.address, self.correlation_id)


_Serve: TypeAlias = Callable[[Asked], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class _Resource:
    methods: dict[Code, _Serve]
    link: Link
    roles: tuple[type[Role], ...]
    """Who is told of it by `/.well-known/core`."""
    certificate: bool = False
    """Only devices that came with a certificate are."""
    queried: bool = False
    """It reads the request's queries; where it does not, none may be there."""

    def shown_to(self, role: Role) -> bool:
        """Whether this role may use it, and so is told of it."""
        if self.certificate and isinstance(role, Device) and not role.certificate:
            return False
        return isinstance(role, self.roles)


class Resources:
    """The Handler of the product (ports.py)."""

    def __init__(self, admission: Admission, provisioning: Provisioning) -> None:
        self._admission = admission
        self._registry = registry = admission.registry
        self._limits = limits = admission.limits
        self._counters = admission.counters
        self._provisioning = provisioning
        self._loop = asyncio.get_running_loop()
        self._keys = RateLimiter(limits.key_requests_per_second, limits.key_requests_burst)
        self._tenants = RateLimiter(limits.tenant_requests_per_second, limits.tenant_requests_burst)
        self._open = RateLimiter(limits.open_requests_per_second, limits.open_requests_burst)
        est = Est(registry)
        device, everybody = (Device,), (Device, Claimant, Renewer)
        json_cbor = (formats.JSON, formats.CBOR)
        self._resources: dict[tuple[str, ...], _Resource] = {
            (path,): _Resource(
                {Code.POST: self._uplink}, Link((path,), content_formats=json_cbor), device, queried=True
            )
            for path in (*_KINDS, "uplink")  # _UPLINKS, in the order in which they are shown
        }
        self._resources |= {
            ("config",): _Resource(
                {Code.GET: self._config},
                Link(("config",), title="desired configuration", content_formats=json_cbor, observable=True),
                device,
            ),
            ("config", "reported"): _Resource(
                {Code.POST: self._report, Code.PUT: self._report},
                Link(("config", "reported"), content_formats=json_cbor),
                device,
            ),
            ("commands",): _Resource(
                {Code.GET: self._next_command},
                Link(("commands",), title="unfinished commands", content_formats=json_cbor, observable=True),
                device,
                queried=True,
            ),
            ("provision",): _Resource(
                {Code.POST: self._provision}, Link(("provision",), content_formats=json_cbor), (Claimant,)
            ),
            ("time",): _Resource(
                {Code.GET: self._time}, Link(("time",), content_formats=(*json_cbor, formats.TEXT)), everybody
            ),
            WELL_KNOWN_CORE: _Resource(
                {Code.GET: self._core}, Link(WELL_KNOWN_CORE, content_formats=(LINK_FORMAT,)), (), queried=True
            ),
        }
        for served in est.resources():
            self._resources[served.path] = _Resource(
                {served.method: _by_role(served.serve)},
                Link(served.path, resource_types=(served.resource_type,), content_formats=served.content_formats),
                served.roles,
                certificate=served.method is Code.POST,
            )
        self._command = _Resource({Code.POST: self._answer_command}, Link(("commands", "*")), ())

    def prompt(self, peer: Peer, request: Request) -> Promise | Response | None:
        """The uplinks of admitted devices, which are nearly all that is ever asked (ports.Prompt)."""
        guest: Guest = peer.context
        role = guest.role
        if not isinstance(role, Device) or role.session.closed:
            return None
        if request.method is not _POST or len(request.path) != 1 or request.path[0] not in _UPLINKS:
            return None
        now = self._loop.time()
        role.session.last_active = now
        try:
            self._spend(role, now)
            return Promise(self._submit(request, role.session), self._stored)
        except (RegistryError, Unserved) as error:
            return error_response(error, uuid4().hex)

    async def handle(self, peer: Peer, request: Request, observation: Observation | None) -> Response:
        """Answer one request (ports.Handler)."""
        guest: Guest = peer.context
        correlation_id = uuid4().hex
        try:
            role = await guest.admitted()
            if isinstance(role, Device):
                self._spend(role, self._loop.time())
            else:
                self._spend_open(guest)
            serve = self._found(request)
            return await serve(Asked(request, guest, role, observation, correlation_id))
        except (RegistryError, Unserved) as error:
            return error_response(error, correlation_id)

    def _found(self, request: Request) -> _Serve:
        resource = self._resources.get(request.path)
        if resource is None:
            if len(request.path) != 2 or request.path[0] != "commands":
                raise not_found()
            resource = self._command
        serve = resource.methods.get(request.method)
        if serve is None:
            allowed = ", ".join(method.name for method in resource.methods)
            raise Unserved(Code.METHOD_NOT_ALLOWED, f"{request.method.name} is not served here; {allowed} is")
        if request.query and not resource.queried:
            _query(request, None)
        return serve

    def _spend(self, role: Device, now: float) -> None:
        identity = role.session.identity
        # As integers: a UUID is hashed in Python, several times for each request.
        wait = self._keys.take(identity.credential_id.int, now)
        if wait is not None:
            self._counters.key_requests += 1
            raise ResourceExhausted("too many requests with one credential", retry_after=wait)
        wait = self._tenants.take(identity.tenant_id.int, now)
        if wait is not None:
            self._counters.tenant_requests += 1
            raise ResourceExhausted("too many requests of one tenant's devices", retry_after=wait)

    def _spend_open(self, guest: Guest) -> None:
        wait = self._open.take(address_block(guest.association.address), self._loop.time())
        if wait is not None:
            self._counters.open_requests += 1
            raise ResourceExhausted("this address has sent too many requests without a credential", retry_after=wait)

    # -- up --------------------------------------------------------------------------------------------------------

    async def _uplink(self, asked: Asked) -> Response:
        future = self._submit(asked.request, asked.device.session)
        await asyncio.wait((future,))
        return self._stored(future)

    def _submit(self, request: Request, session: Session) -> asyncio.Future[StoredUplink]:
        try:
            uplink = self._read_uplink(request, Source.of(session.identity, _COAP))
        except InvalidArgument as error:
            self._reject(error)
            raise
        return self._registry.uplinks.submit(uplink)

    def _stored(self, future: asyncio.Future[StoredUplink]) -> Response:
        """2.04 for what is committed."""
        try:
            stored = future.result()
        except RegistryError as error:
            if isinstance(error, InvalidArgument):
                self._reject(error)
            return error_response(error, uuid4().hex)
        if stored.duplicate:
            self._counters.duplicate += 1
        else:
            self._counters.stored += 1
        return _CHANGED

    def _reject(self, error: InvalidArgument) -> None:
        self._counters.rejected += 1
        self._counters.too_large += isinstance(error, PayloadTooLarge)

    def _read_uplink(self, request: Request, source: Source) -> NewUplink:
        name = request.path[0]
        message_id = _query(request, "message_id") if request.query else None
        if name == "uplink":
            return enveloped(
                request.payload,
                source,
                cbor=formats.is_cbor(request),
                max_bytes=self._limits.payload_bytes,
                message_id=message_id,
            )
        payload = self._payload(request)
        if name == TELEMETRY:
            return telemetry_from(source, payload, message_id=message_id)
        return uplink_from(source, payload, kind=_KINDS[name], message_id=message_id)

    def _payload(self, request: Request) -> Payload:
        return payload_in(request.payload, cbor=formats.is_cbor(request), max_bytes=self._limits.payload_bytes)

    async def _report(self, asked: Asked) -> Response:
        session = asked.device.session
        report = report_from(self._payload(asked.request))
        source = Source.of(session.identity, Transport.COAP)
        await self._registry.device_configs.report(source, report, asked.correlation_id)
        return _CHANGED

    async def _answer_command(self, asked: Asked) -> Response:
        session = asked.device.session
        try:
            command_id = CommandId(UUID(asked.request.path[1]))
        except ValueError:
            raise NotFound("no such command of this device") from None
        response = response_from(self._payload(asked.request))
        source = Source.of(session.identity, Transport.COAP)
        await self._registry.commands.answer(source, command_id, response, asked.correlation_id)
        return _CHANGED

    # -- down ------------------------------------------------------------------------------------------------------

    async def _config(self, asked: Asked) -> Response:
        session, request = asked.device.session, asked.request
        content_format = formats.answer_format(request)
        config = await self._registry.device_configs.get(session.tenant_id, session.device_id)
        _still_open(session)
        if asked.observation is not None:
            ConfigObserver(self._registry.device_configs, session, asked.observation, content_format).start(config)
        if config_tag(config) in request.etags:
            return Response(Code.VALID, etag=config_tag(config))
        return config_response(config, content_format)

    async def _next_command(self, asked: Asked) -> Response:
        session, request = asked.device.session, asked.request
        content_format = formats.answer_format(request)
        after = _query(request, "after")
        try:
            behind = None if after is None else CommandId(UUID(after))
        except ValueError:
            raise InvalidArgument("after is no command_id", field="after") from None
        commands = self._registry.commands
        seen = None
        if behind is not None:
            seen = await commands.get(session.tenant_id, session.device_id, behind)
        # A holder of its own for each request: it does not wait, so it holds up nobody.
        first = await commands.next(session.tenant_id, session.device_id, SessionId(uuid4()), after=behind)
        _still_open(session)
        if asked.observation is None:
            return command_response(first, content_format)
        observer = CommandObserver(commands, session, asked.observation, content_format)
        return observer.start(first, behind=0 if seen is None else seen.seq)

    # -- for everybody ---------------------------------------------------------------------------------------------

    async def _provision(self, asked: Asked) -> Response:
        role = asked.role
        if not isinstance(role, Claimant):
            raise PermissionDenied("this association is somebody's already; only others provision")
        content_format = formats.answer_format(asked.request)
        self._admission.attempt(asked.guest)
        done = await self._provisioning.provision(
            asked.request.payload,
            asked.contact,
            cbor=formats.is_cbor(asked.request),
            proven_template=role.template_id,
        )
        code = Code.CREATED if done.created else Code.CHANGED
        return Response(code, formats.encoded(done.fields, content_format), content_format)

    async def _time(self, asked: Asked) -> Response:
        content_format = formats.wanted(asked.request, formats.JSON, formats.CBOR, formats.TEXT)
        now = self._registry.clock().astimezone(UTC)
        if content_format == formats.TEXT:
            return Response(Code.CONTENT, _rfc3339(now).encode(), content_format, max_age=0)
        unix_ms = int(now.timestamp() * 1000)
        told = {"time": _rfc3339(now), "unix": unix_ms // 1000, "unix_ms": unix_ms}
        return Response(Code.CONTENT, formats.encoded(told, content_format), content_format, max_age=0)

    async def _core(self, asked: Asked) -> Response:
        content_format = formats.wanted(asked.request, LINK_FORMAT)
        links = [each.link for each in self._resources.values() if each.shown_to(asked.role)]
        return Response(Code.CONTENT, link_format(links, asked.request.query), content_format)


def _by_role(serve: EstServe) -> _Serve:
    async def answer(asked: Asked) -> Response:
        return await serve(asked.request, asked.role, asked.contact)

    return answer


def _still_open(session: Session) -> None:
    """Nothing goes down any more once a session is closed, though its association may be a moment later."""
    if session.closed:
        raise Unauthenticated("the session was closed meanwhile")


def _query(request: Request, taken: str | None) -> str | None:
    """The value of `?taken=`, the only query that may be there; None for one that is not. Raises InvalidArgument."""
    found: str | None = None
    for each in request.query:
        name, _, value = each.partition("=")
        if not each:
            continue  # what `coap://host/path?` becomes, RFC 7252 §6.4
        if name != taken:
            allowed = "none is" if taken is None else f"{taken} is"
            raise InvalidArgument(f"the query {shown(name)} is not taken here; {allowed}", field="query")
        if found is not None:
            raise InvalidArgument(f"the query {taken} is there twice", field="query")
        found = value
    return found


def _rfc3339(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
