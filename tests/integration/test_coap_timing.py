"""What a refused handshake shows over the wire: the same for every reason, in its bytes and in its time.

    wrong key · unknown identity · revoked · rotated away · device inactive · another tenant's     PSKs of devices
    wrong key · unknown template · disabled · expired · used                                       claim PSKs
    unknown · revoked · expired · device inactive                     certificates: the handshake stands, then 4.01

The whole server with its database answers real DTLS clients. One handshake of each reason in turn, in a new order every
round, so that whatever the machine does meanwhile does it to all of them alike.

Bytes: every datagram of the server has the same length, and the last one, the alert, the same bytes (RFC 5246 §7.2.2,
bad_record_mac; RFC 4279 §2 allows that for unknown identities, too). Time: from the client's last flight, with which
the identity comes, to the alert. Of a reason's times the floor is looked at, the lowest tenth, where the work shows and
the disturbances do not. Floors may differ by `TOLERANCE`, or by twice what the floors of two halves of one reason's own
times differ by, for a machine so busy that they do not show; and before they are said to differ, eight times as many
samples are taken. A difference in work stays, which a test here shows by adding one.

    GATEHOUSE_COAP_REFUSALS=300 pytest tests/integration/test_coap_timing.py -s     300 to 2,400 of each, within 8 %

What there is, on 2 cores with 2,400 of each: to read a row costs 19 µs of 650 more than to find none, and what is noted
of a known device 15 µs, behind the alert, seen because client and server share an event loop here. The middle half of
each reason's times is 200 µs wide.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from statistics import median, quantiles
from typing import Any

import pytest
from aiocoap.numbers.codes import Code
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL

from adapters.coap.server_limits import ServerLimits
from registry.resolver import Resolver
from registry.storage import admission
from tests.coap_server import CBOR, CoapDevice, Running, claim_context, key_bytes, serving_coap
from tests.dtls_peers import certificate_client_context, make_client_certificate, refusal
from tests.http_api import BASE, Api, api, now, running_api  # noqa: F401

pytestmark = pytest.mark.alone

CERTIFICATES = ("unknown", "revoked", "expired", "inactive")
SAMPLES = int(os.environ.get("GATEHOUSE_COAP_REFUSALS", "30"))
TOLERANCE = 0.08 if SAMPLES >= 300 else 0.2
"""Of the least. One more look-up in the database costs 40 % and above."""


@pytest.fixture
async def coap(api: Api) -> AsyncIterator[Running]:  # noqa: F811
    async with serving_coap(api) as running:
        yield running


async def compared(port: int, kinds: Mapping[str, SSL.Context], at_most: int = 8) -> tuple[float, float]:
    """The largest distance between two kinds' floors, as a share of the least, and what it may be; once it is within
    that, or after `at_most` times SAMPLES rounds."""
    order = random.Random(7)
    times: dict[str, list[float]] = {name: [] for name in kinds}
    shapes = set()
    floors: dict[str, float] = {}
    halves: dict[str, list[float]] = {}
    spread = allowed = 0.0
    for _ in range(at_most):
        for _ in range(SAMPLES):
            for name in order.sample(list(kinds), len(kinds)):
                spent, heard = await refusal(port, kinds[name])
                shapes.add((*map(len, heard), heard[-1]))
                times[name].append(spent)
        assert len(shapes) == 1, shapes
        floors = {name: floor(each) for name, each in times.items()}
        halves = {name: [floor(each[::2]), floor(each[1::2])] for name, each in times.items()}
        least = min(floors.values())
        spread = (max(floors.values()) - least) / least
        allowed = max(TOLERANCE, 2 * max(abs(one - other) for one, other in halves.values()) / least)
        if spread < allowed:
            break
    for name, each in times.items():
        one, other = halves[name]
        print(
            f"{name}: {len(each)} handshakes, floor {floors[name] * 1e6:.0f} µs ({one * 1e6:.0f} and {other * 1e6:.0f} "
            f"in two halves), median {median(each) * 1e6:.0f} µs"
        )
    print(f"spread {100 * spread:.1f} %, allowed {100 * allowed:.1f} %")
    return spread, allowed


def floor(times: list[float]) -> float:
    """The lowest tenth."""
    return quantiles(times, n=20)[1]


async def devices(coap: Running) -> dict[str, SSL.Context]:
    """A client for each reason to refuse a device's PSK."""
    good, revoked, rotated, inactive = [await coap.device(f"HW-{number}") for number in range(4)]
    await coap.post(f"/devices/{revoked.device_id}/credentials/{revoked.credential_id}", method="DELETE")
    await coap.post(f"/devices/{rotated.device_id}/credentials/rotate", {"overlap_seconds": 0})
    await coap.post(f"/devices/{inactive.device_id}", {"status": "inactive"}, "PUT")
    slug = await coap.api.another_tenant()
    async with coap.api.operator(tenant=slug) as operator:
        body = {"name": "Theirs", "hardware_id": "HW-T", "credential_type": "psk"}
        answer = await operator.post(f"{BASE}/devices", json=body)
        assert answer.status_code == 201, answer.text
    return {
        "wrong key": CoapDevice("", "", good.identity, bytes(32)).context(),
        "unknown identity": CoapDevice("", "", "x" * len(good.identity), good.key).context(),
        "revoked": revoked.context(),
        "rotated away": rotated.context(),
        "device inactive": inactive.context(),
        "another tenant's, with a key of ours": CoapDevice(
            "", "", answer.json()["psk"]["identity"], good.key
        ).context(),
    }


async def templates(coap: Running) -> dict[str, SSL.Context]:
    """A client for each reason to refuse a template's claim PSK."""
    good, _ = await coap.template()
    disabled, when_disabled = await coap.template()
    path = f"/provisioning/templates/{disabled['template_id']}"
    await coap.post(path, {"status": "disabled"}, "PUT")
    soon = (now() + timedelta(seconds=0.3)).isoformat()
    _, when_expired = await coap.template(expires_at=soon)
    used, when_used = await coap.template(one_time=True)
    async with coap.client(when_used) as client:
        claim = {"provision_key": used["provision_key"], "device_name": "d", "hardware_id": "HW-U"}
        made = (await client.post("/provision", claim, CBOR)).value
    key = made["psk"]
    async with coap.client(CoapDevice("", "", key["identity"], key_bytes(key["key"]))) as client:
        await client.get("/time")  # what it made is in use: nothing can be claimed with it again
    unknown = "0" * len(good["template_id"])
    return {
        "wrong key": claim_context(good["template_id"], "pk_nobodys"),
        "unknown template": claim_context(unknown, good["provision_key"]),
        "disabled": when_disabled,
        "expired": when_expired,
        "used": when_used,
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kinds", [devices, templates])
async def test_refused_handshakes_are_alike_in_bytes_and_time(coap: Running, kinds: Any) -> None:
    made = await kinds(coap)
    await asyncio.sleep(0.3)  # what expires is over
    spread, allowed = await compared(coap.port, made)
    assert spread < allowed
    assert coap.server.dtls_counters.as_dict()["dropped_wrong_key"] >= len(made) * SAMPLES


async def test_refused_certificates_are_told_the_same(api: Api) -> None:  # noqa: F811
    """The peer has proved its key, so there is nothing to guess: what differs is only what we know of it."""
    async with serving_coap(api, ServerLimits(refused_linger=0.1)) as coap:
        known = {name: make_client_certificate(name, expired=name == "expired") for name in CERTIFICATES}
        for name, holder in known.items():
            if name == "unknown" or name == "expired":
                continue
            made = await coap.api.registered(f"HW-{name}")
            path, pem = f"/devices/{made['device_id']}", holder.certificate.public_bytes(Encoding.PEM).decode()
            await coap.post(f"{path}/certs", {"certificate": pem, "overlap_seconds": 0})
            if name == "revoked":
                await coap.post(
                    f"/devices/certs/{holder.certificate.fingerprint(hashes.SHA256()).hex()}", method="DELETE"
                )
            else:
                await coap.post(path, {"status": "inactive"}, "PUT")
        told = set()
        for holder in known.values():
            async with coap.client(certificate_client_context(holder)) as client:
                answer = await client.get("/config")
                await client.closed()
                lengths = tuple(len(each) for each in client.socket.client.plain)
            text, _, correlation_id = answer.payload.partition(b" (")
            assert len(correlation_id) == 33
            told.add((answer.code, answer.max_age, answer.content_format, text, lengths))
    assert len(told) == 1, told
    assert {each[0] for each in told} == {Code.UNAUTHORIZED}


async def test_the_comparison_sees_more_look_ups(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: who has a credential is looked up three times."""
    real = Resolver._look_up

    async def again(self: Resolver, wanted: Any) -> Any:
        found = await real(self, wanted)
        for _ in range(2 * any(state is not None for state in found)):
            async with self._database.connection() as connection:
                await admission.by_lookup(connection, wanted)
        return found

    monkeypatch.setattr(Resolver, "_look_up", again)
    async with running_api(dsn) as running, serving_coap(running) as coap:
        made = await devices(coap)
        kinds = {name: made[name] for name in ("wrong key", "unknown identity")}
        spread, _ = await compared(coap.port, kinds, at_most=2)
        assert spread > 0.3
