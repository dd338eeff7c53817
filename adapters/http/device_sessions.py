"""Devices on HTTP connections: the first authenticated request opens a session, the following ones use it.

    request ── the last one's very credential header, session open ──► used at once, it is not even hashed
        ├───── key known on this connection, session open ─► used at once, no look-up
        └───── otherwise: admit ─► sessions.open ─► remembered on the connection
    connection closed, by whoever ──► sessions.ended for all of them
    credential revoked ──► the session's closer closes the connection (DESIGN, the funnel, 5)

A connection may carry several devices, as a gateway's HTTP client pools them: one session for each key, at most
`MAX_PER_CONNECTION`. Ending one of them ends the connection; the others come back by themselves. An operator may use it
as well: what it asks at that moment is answered before the connection ends.

What can race: requests that arrive together on a new connection (a lock per connection lets one of them open the
session), a revocation while the session opens (sessions.py refuses it then), the connection's end meanwhile (the
session ends when it is there). Without a connection (an ASGI server that is not ours) a session lives as long as its
request, and nothing else can be closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from adapters.http.authentication import CREDENTIAL_HEADERS, Authentication, DeviceEvidence
from registry import secrets
from registry.core import Registry
from registry.errors import ResourceExhausted, Unauthenticated, Unavailable
from registry.events import EventKind
from registry.model import ApiKey, ClientCertificate, Contact, Identity
from registry.sessions import Session

MAX_PER_CONNECTION: Final = 8
"""Devices on one connection: what a gateway's connection pool mixes, not a way around the sessions' limits."""


HeaderLines = list[tuple[bytes, bytes]]


class Connection(Protocol):
    """What the server's connection offers here (connection.py)."""

    peer: str
    closed: bool
    recognised: bool
    session: object | None

    @property
    def peer_certificate_der(self) -> bytes | None: ...

    async def close(self, reason: str) -> None: ...

    def abort(self) -> None: ...

    def spare_answer(self) -> None: ...

    def rest(self) -> None: ...

    def add_close_callback(self, callback: Callable[[Any], None], /) -> None: ...


@dataclass(slots=True, eq=False)
class Book:
    """The sessions of one connection, or of one request without a connection, by the digest of their credential."""

    entries: list[tuple[bytes, Session]] = field(default_factory=list)
    last: tuple[HeaderLines, Session] | None = None
    """The credential headers of the last request, and whose they were. The connection's certificate does not change, so
    these headers, or none, are this session's as long as it is open."""
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)

    def find(self, digest: bytes) -> Session | None:
        """The session of a credential, ended or not."""
        for known, session in self.entries:
            if secrets.same(known, digest):
                return session
        return None


class _RequestOnly:
    """The closer of a session that ends with its request anyway."""

    async def close(self, reason: str) -> None:
        del reason

    def abort(self) -> None: ...


class DeviceSessions:
    """Finds or opens the session that a request of a device belongs to."""

    def __init__(self, registry: Registry, authentication: Authentication) -> None:
        self._registry = registry
        self._authentication = authentication

    def repeated(self, connection: Connection, credentials: HeaderLines) -> Session | None:
        """The open session of the last request, if this one shows the very same credential; cheapest. Marks it as
        active."""
        book = connection.session
        if not isinstance(book, Book) or book.last is None:
            return None
        known, session = book.last
        # A credential that differs is not compared in constant time: the connection has shown the known one itself.
        return self._if_open(session) if credentials == known else None

    def remember(self, connection: Connection, credentials: HeaderLines, session: Session) -> None:
        """Requests that show the same credential are the session's from now on."""
        if isinstance(connection.session, Book):
            connection.session.last = credentials, session

    def current(self, connection: Connection, digest: bytes) -> Session | None:
        """The open session of a credential on its connection, if there is one; cheap. Marks it as active."""
        book = connection.session
        if not isinstance(book, Book):
            return None
        session = book.find(digest)
        return None if session is None else self._if_open(session)

    def _if_open(self, session: Session) -> Session | None:
        if session.closed:
            return None
        expires_at = session.identity.expires_at
        if expires_at is not None and expires_at <= self._registry.clock():
            return None
        session.last_active = asyncio.get_running_loop().time()
        return session

    async def on_connection(self, connection: Connection, evidence: DeviceEvidence, contact: Contact) -> Session:
        """The session of a credential on a connection, opened if need be.

        Raises Unauthenticated, ResourceExhausted, Unavailable.
        """
        session = self.current(connection, evidence.digest)
        if session is not None:
            return session
        book = self._book(connection)
        async with book.opening:
            session = self.current(connection, evidence.digest)
            if session is not None:
                return session
            self._forget_ended(book)
            if len(book.entries) >= MAX_PER_CONNECTION:
                raise ResourceExhausted(
                    f"this connection carries {MAX_PER_CONNECTION} devices already; open another one", retry_after=1.0
                )
            self._authentication.spend_look_up(evidence.evidence, contact)
            identity = await self._registry.resolver.admit(evidence.evidence, contact)
            await self._agree(identity, connection, evidence, contact)
            session = await self._registry.sessions.open(identity, contact, connection)
            if connection.closed:
                self._registry.sessions.ended(session)
                raise Unavailable("the connection was closed meanwhile")
            book.entries.append((evidence.digest, session))
            connection.recognised = True
            return session

    async def for_request(self, evidence: DeviceEvidence, contact: Contact) -> Session:
        """A session for one request; the caller ends it with `ended`. Raises as `on_connection`.

        For an ASGI client without a connection, as the tests of single operations use (tests/http_api.py, `api`).
        """
        self._authentication.spend_look_up(evidence.evidence, contact)
        identity = await self._registry.resolver.admit(evidence.evidence, contact)
        return await self._registry.sessions.open(identity, contact, _RequestOnly())

    def ended(self, session: Session) -> None:
        """End a session of `for_request`."""
        self._registry.sessions.ended(session)

    async def _agree(
        self, identity: Identity, connection: Connection, evidence: DeviceEvidence, contact: Contact
    ) -> None:
        """Raises Unauthenticated where a key is one device's and the connection's certificate another one's."""
        der = connection.peer_certificate_der
        if der is None or not isinstance(evidence.evidence, ApiKey):
            return
        holder = await self._registry.resolver.holder(ClientCertificate(der), contact)
        if holder in (None, identity.device_id):
            return
        reason = "key of another device than the connection's certificate"
        self._registry.refusals.note(
            tenant_id=identity.tenant_id,
            device_id=identity.device_id,
            kind=EventKind.AUTH_REFUSED,
            reason=reason,
            contact=contact,
            detail={"credential_id": str(identity.credential_id)},
        )
        raise Unauthenticated(reason)

    def _book(self, connection: Connection) -> Book:
        book = connection.session
        if not isinstance(book, Book):
            connection.session = book = Book()
            connection.add_close_callback(self._connection_closed)
        return book

    def _connection_closed(self, connection: Connection) -> None:
        book = connection.session
        if not isinstance(book, Book):
            return
        for _, session in book.entries:
            self._registry.sessions.ended(session)
        book.entries.clear()
        book.last = None

    def _forget_ended(self, book: Book) -> None:
        # An expired one that is not closed yet is closed by the table itself, which records it.
        book.entries = [entry for entry in book.entries if not entry[1].closed]


def credential_lines(headers: HeaderLines) -> HeaderLines:
    """Those that name a credential."""
    return [line for line in headers if line[0] in CREDENTIAL_HEADERS]
