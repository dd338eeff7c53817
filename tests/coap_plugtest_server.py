"""The resources of the ETSI CoAP Plugtests on Gatehouse's CoAP engine, over CoAP and CoAPS.

    python -m tests.coap_plugtest_server                                     coap on 5683, coaps on 5684
    python -m tests.coap_plugtest_server --host ::1 --port 0 --coaps-port 0  free ports; they are in the first line
    coap-client-openssl -m get coap://127.0.0.1/.well-known/core
    coap-client-openssl -m get -u password -k sesame coaps://127.0.0.1/secure

One line on stdout says what listens, `{"ready": {"coap": 5683, "coaps": 5684}}`; Ctrl-C ends it. Identity and key are
those of the test descriptions (TD_COAP_DTLS_01), and `--psk-identity`, `--psk-key` take others.

The descriptions themselves, TD_COAP_CORE, LINK, BLOCK and OBS, are the tests of test_coap_plugtests.py. Beyond them
there is `/large-64k`. Everything is in memory and bounded; whoever can reach the port may change it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import signal
from collections.abc import Awaitable, Callable

from aiocoap.numbers.codes import Code

from adapters.coap.blockwise import entity_tag
from adapters.coap.discovery import LINK_FORMAT, WELL_KNOWN_CORE, Link, link_format
from adapters.coap.endpoint import CoapEndpoint
from adapters.coap.limits import CoapLimits
from adapters.coap.ports import Observation, Peer, Request, Response
from adapters.dtls.context import DtlsContext
from adapters.dtls.listener import DtlsListener
from adapters.dtls.ports import Association, PskKey
from registry.secrets import Secret
from tests.coap_peers import UdpTransport

TEXT, XML, OCTETS = 0, 41, 42
_MOST = 64  # created resources, and observers of one resource
_LARGE = b"".join(b"%05d plugtests %s\n" % (line, b"-" * 45) for line in range(32))  # 1,984 bytes
_LARGE_64K = (_LARGE * 34)[:65_536]
_PUMPED = (b"short", _LARGE)

LINKS = (
    Link(("test",), ("Type1", "Type2"), ("If1",), (TEXT,), title="Default test resource"),
    Link(("validate",), ("Type2", "Type3"), ("If2",), (TEXT,)),
    Link(("multi-format",), ("Type1", "Type3"), ("foo",), (TEXT, XML)),
    Link(("seg1", "seg2", "seg3"), content_formats=(TEXT,)),
    Link(("query",), content_formats=(TEXT,)),
    Link(("separate",), content_formats=(TEXT,)),
    Link(("location-query",)),
    Link(("create1",)),
    Link(("large",), ("block",), (), (TEXT,), size=len(_LARGE)),
    Link(("large-64k",), ("block",), (), (TEXT,), size=len(_LARGE_64K)),
    Link(("large-update",), ("block",), (), (TEXT,), size=len(_LARGE)),
    Link(("large-create",), ("block",)),
    Link(("large-post",), ("block",)),
    Link(("obs",), ("observe",), (), (TEXT,), observable=True),
    Link(("obs-non",), ("observe",), (), (TEXT,), observable=True),
    Link(("obs-large",), ("observe",), (), (TEXT,), observable=True),
    Link(("obs-pumping",), ("observe",), (), (TEXT,), observable=True),
    Link(("link1",), ("Type1",), ("If1",)),
    Link(("link2",), ("Type2",), ("If2",)),
    Link(("link3",), ("Type3",), ("foo",)),
    Link(("path",), content_formats=(LINK_FORMAT,)),
    Link(("secure",), content_formats=(TEXT,)),
)
_SUBRESOURCES = tuple(Link(("path", f"sub{number}"), content_formats=(TEXT,)) for number in (1, 2, 3))

Sleep = Callable[[float], Awaitable[None]]


class Stored:
    """A small resource that can be read, changed and deleted; and then is as it was at first."""

    def __init__(self, payload: bytes) -> None:
        self._first = payload
        self.payload: bytes | None = payload
        self.content_format: int | None = TEXT

    def get(self, request: Request) -> Response:
        payload = self.payload if self.payload is not None else self._first
        tag = entity_tag(payload)
        if tag in request.etags:
            return Response(Code.VALID, etag=tag)
        return Response(Code.CONTENT, payload, self.content_format, etag=tag)

    def put(self, request: Request) -> Response:
        exists = self.payload is not None
        if request.if_none_match and exists:
            return Response(Code.PRECONDITION_FAILED)
        if request.if_match and not (exists and _matches(self.payload, request.if_match)):
            return Response(Code.PRECONDITION_FAILED)
        self.payload, self.content_format = request.payload, request.content_format
        return Response(Code.CHANGED if exists else Code.CREATED)

    def delete(self) -> Response:
        self.payload, self.content_format = self._first, TEXT
        return Response(Code.DELETED)


class Observed:
    """A resource that changes when `step` says so, and has observers."""

    def __init__(self, states: Callable[[int], bytes]) -> None:
        self._states = states
        self._version = 0
        self._stored: bytes | None = None
        self._content_format: int | None = TEXT
        self._observers: dict[int, Observation] = {}
        self._keys = 0

    def get(self, observation: Observation | None) -> Response:
        if observation is not None and len(self._observers) < _MOST:
            key = self._keys = self._keys + 1
            self._observers[key] = observation
            observation.accept(lambda: self._observers.pop(key, None))
        return self._now()

    def put(self, request: Request) -> Response:
        if request.content_format != self._content_format:
            self._end(Response(Code.NOT_ACCEPTABLE))  # TD_COAP_OBS_08
        self._stored, self._content_format = request.payload, request.content_format
        self._tell()
        return Response(Code.CHANGED)

    def delete(self) -> Response:
        self._end(Response(Code.NOT_FOUND))  # TD_COAP_OBS_07
        self._stored, self._content_format = None, TEXT
        return Response(Code.DELETED)

    def step(self) -> None:
        """The next state, unless somebody has put one; that one is told again."""
        self._version += 1
        self._tell()

    @property
    def observers(self) -> int:
        return len(self._observers)

    def _now(self) -> Response:
        payload = self._stored if self._stored is not None else self._states(self._version)
        return Response(Code.CONTENT, payload, self._content_format, max_age=30)

    def _tell(self) -> None:
        for observation in list(self._observers.values()):
            observation.notify(self._now())

    def _end(self, last: Response) -> None:
        observers, self._observers = list(self._observers.values()), {}
        for observation in observers:
            observation.notify(last)


class PlugtestResources:
    """The handler. `sleep` waits for /separate; `separate` seconds, more than the layer's `ack_delay`."""

    def __init__(self, separate: float = 3.0, sleep: Sleep = asyncio.sleep) -> None:
        self._separate = separate
        self._sleep = sleep
        self._stored = {
            ("test",): Stored(b"welcome to the plugtests"),
            ("validate",): Stored(b"validate me"),
            ("create1",): Stored(b""),
            ("large-update",): Stored(_LARGE),
        }
        self._stored[("create1",)].payload = None
        self._created: dict[tuple[str, ...], Stored] = {}
        self._number = 0
        self.observed = {
            ("obs",): Observed(lambda version: b"state %d" % version),
            ("obs-non",): Observed(lambda version: b"state %d" % version),
            ("obs-large",): Observed(lambda version: b"%05d " % version + _LARGE),
            ("obs-pumping",): Observed(lambda version: _PUMPED[version % 2]),
        }

    def step(self) -> None:
        """Change everything that can be observed."""
        for resource in self.observed.values():
            resource.step()

    async def handle(self, peer: Peer, request: Request, observation: Observation | None) -> Response:
        path = request.path
        if (observed := self.observed.get(path)) is not None:
            return self._on_observed(observed, request, observation)
        if path == ("separate",) and request.method == Code.GET:
            await self._sleep(self._separate)
            return Response(Code.CONTENT, b"that took a while", TEXT)
        if path == ("create1",) and request.method == Code.DELETE:
            self._stored[path].payload = None
            return Response(Code.DELETED)
        if request.method == Code.POST and (posted := self._posted(request)) is not None:
            return posted
        stored = self._stored.get(path) or self._created.get(path)
        if stored is not None:
            return self._on_stored(stored, request)
        known = self._fixed(peer, request)
        if known is None:
            return Response(Code.NOT_FOUND)
        return known if request.method == Code.GET else Response(Code.METHOD_NOT_ALLOWED)

    def _on_observed(self, observed: Observed, request: Request, observation: Observation | None) -> Response:
        if request.method == Code.GET:
            return observed.get(observation)
        if request.method == Code.PUT:
            return observed.put(request)
        if request.method == Code.DELETE:
            return observed.delete()
        return Response(Code.METHOD_NOT_ALLOWED)

    def _on_stored(self, stored: Stored, request: Request) -> Response:
        if request.method == Code.GET:
            return stored.get(request) if stored.payload is not None else Response(Code.NOT_FOUND)
        if request.method == Code.PUT:
            return stored.put(request)
        if request.method == Code.DELETE:
            return stored.delete()
        return Response(Code.METHOD_NOT_ALLOWED)

    def _posted(self, request: Request) -> Response | None:
        if request.path == ("test",):
            return Response(Code.CREATED, location_path=("location1", "location2", "location3"))  # TD_COAP_CORE_18
        if request.path == ("location-query",):
            return Response(Code.CREATED, location_query=("first=1", "second=2"))
        if request.path == ("large-post",):
            return Response(Code.CHANGED, request.payload.upper(), request.content_format)
        if request.path == ("large-create",):
            self._number += 1
            path = ("large-create", str(self._number))
            while len(self._created) >= _MOST:
                del self._created[next(iter(self._created))]
            self._created[path] = Stored(request.payload)
            self._created[path].content_format = request.content_format
            return Response(Code.CREATED, location_path=path)
        return None

    def _fixed(self, peer: Peer, request: Request) -> Response | None:
        path = request.path
        if path == WELL_KNOWN_CORE:
            return Response(Code.CONTENT, link_format(LINKS, request.query), LINK_FORMAT)
        if path == ("path",):
            return Response(Code.CONTENT, link_format(_SUBRESOURCES), LINK_FORMAT)
        if path == ("query",):
            return Response(Code.CONTENT, "&".join(request.query).encode(), TEXT)
        if path == ("large",):
            return Response(Code.CONTENT, _LARGE, TEXT)
        if path == ("large-64k",):
            return Response(Code.CONTENT, _LARGE_64K, TEXT)
        if path == ("multi-format",):
            if request.accept in (None, TEXT):
                return Response(Code.CONTENT, b"plain", TEXT)
            if request.accept == XML:
                return Response(Code.CONTENT, b"<format>xml</format>", XML)
            return Response(Code.NOT_ACCEPTABLE)
        if path == ("secure",):
            return Response(Code.CONTENT, b"nobody listens", TEXT) if peer.context else Response(Code.UNAUTHORIZED)
        if path in ((), ("seg1", "seg2", "seg3"), ("link1",), ("link2",), ("link3",)) or path in (
            link.path for link in _SUBRESOURCES
        ):
            return Response(Code.CONTENT, ("/" + "/".join(path)).encode(), TEXT)
        return None


class SecureTransport:
    """The same endpoint over DTLS, for one pre-shared key; `dtls.ports.Application`."""

    def __init__(self, endpoint: CoapEndpoint, identity: bytes, key: bytes) -> None:
        self._endpoint = endpoint
        self._identity = identity
        self._key = key

    async def psk(self, identity: bytes, address: str) -> PskKey:
        known = identity == self._identity
        return PskKey(Secret(self._key if known else secrets.token_bytes(32)), known)

    def established(self, association: Association) -> None:
        self._endpoint.open(association).context = "secure"

    def received(self, association: Association, datagram: bytes) -> None:
        self._endpoint.received(association, datagram)

    def ended(self, association: Association, reason: str) -> None:
        self._endpoint.close(association.association_id)


def _matches(payload: bytes | None, tags: tuple[bytes, ...]) -> bool:
    return payload is not None and (b"" in tags or entity_tag(payload) in tags)


async def serve(options: argparse.Namespace) -> None:
    """Serve until a signal."""
    resources = PlugtestResources()
    endpoint = CoapEndpoint(resources, CoapLimits())
    plain = UdpTransport(endpoint)
    application = SecureTransport(endpoint, options.psk_identity.encode(), options.psk_key.encode())
    secure = DtlsListener(application, DtlsContext())
    ports = {
        "coap": await plain.start(options.host, options.port),
        "coaps": await secure.start(options.host, options.coaps_port),
    }
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    print(json.dumps({"ready": ports}), flush=True)
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), options.period)
        except TimeoutError:
            resources.step()
    await endpoint.drain(1.0)
    await secure.close()
    plain.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="The ETSI CoAP Plugtests resources, over CoAP and CoAPS")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=5683)
    parser.add_argument("--coaps-port", type=int, default=5684)
    parser.add_argument("--psk-identity", default="password")
    parser.add_argument("--psk-key", default="sesame", help="its bytes, as text")
    parser.add_argument("--period", type=float, default=5.0, help="seconds between changes of what can be observed")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
