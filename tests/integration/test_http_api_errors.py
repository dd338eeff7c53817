"""Bad input over HTTP: one shape of error, the right status, nothing stored, and nobody else disturbed."""

from __future__ import annotations

import pytest

from adapters.http.app import HttpApiSettings
from registry.permissions import Role
from tests.http_api import BASE, Api, api, running_api  # noqa: F401  # a fixture

DEVICES = f"{BASE}/devices"
NOBODY = "3a9f1d22-6b4c-4e8a-bf21-90c7e5d4a118"


def is_error(answer: object, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text  # type: ignore[attr-defined]
    body = answer.json()  # type: ignore[attr-defined]
    assert set(body) == {"code", "message", "correlation_id"}
    assert body["code"] == code
    assert body["correlation_id"] == answer.headers["x-correlation-id"]  # type: ignore[attr-defined]
    assert answer.headers["content-type"] == "application/json"  # type: ignore[attr-defined]
    assert answer.headers["cache-control"] == "no-store"  # type: ignore[attr-defined]


HOSTILE_BODIES = {
    "empty": b"",
    "no JSON": b"{",
    "two values": b'{"name":"a","hardware_id":"b"} {}',
    "array": b"[]",
    "broken UTF-8": b'{"name":"\xff","hardware_id":"b"}',
    "lone surrogate": rb'{"name":"\ud800","hardware_id":"b"}',
    "NUL": rb'{"name":"a\u0000","hardware_id":"b"}',
    "NUL in meta": rb'{"name":"a","hardware_id":"b","meta":{"k":"\u0000"}}',
    "raw NUL": b'{"name":"a\x00","hardware_id":"b"}',
    "deep": b'{"name":"a","hardware_id":"b","meta":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    "a little deep": b'{"name":"a","hardware_id":"b","meta":{"a":' + b"[" * 500 + b"]" * 500 + b"}}",
    "too large a number": b'{"name":"a","hardware_id":"b","meta":{"a":1e999}}',
    "a huge integer": b'{"name":"a","hardware_id":"b","meta":{"a":' + b"9" * 5000 + b"}}",
    "NaN": b'{"name":"a","hardware_id":"b","meta":{"a":NaN}}',
    "wrong type": b'{"name":1,"hardware_id":"b"}',
    "a text for a boolean": b'{"name":"a","hardware_id":"b","tags":"x"}',
    "missing": b'{"name":"a"}',
    "null": b'{"name":null,"hardware_id":"b"}',
    "too long": b'{"name":"' + b"a" * 257 + b'","hardware_id":"b"}',
    "space in hardware_id": b'{"name":"a","hardware_id":"b c"}',
    "newline behind hardware_id": b'{"name":"a","hardware_id":"b\\n"}',
    "line break in name": b'{"name":"a\\nb","hardware_id":"b"}',
    "unknown mode": b'{"name":"a","hardware_id":"b","anchor_mode":"NONE"}',
    "unknown field": b'{"name":"a","hardware_id":"b","colour":"red"}',
    "somebody's tenant": b'{"name":"a","hardware_id":"b","tenant_id":"x"}',
    "no base64url": b'{"name":"a","hardware_id":"b","credential_type":"psk","psk":{"key":"A"}}',
    "short key": b'{"name":"a","hardware_id":"b","credential_type":"psk","psk":{"key":"AAAA"}}',
    "an unknown profile": b'{"name":"a","hardware_id":"b","profile_id":"p_none"}',
    "a gateway that is none": b'{"name":"a","hardware_id":"b","gateway_id":"' + NOBODY.encode() + b'"}',
}


async def test_hostile_bodies_are_invalid_and_make_nothing(api: Api) -> None:  # noqa: F811
    async with api.operator() as admin:
        for name, body in HOSTILE_BODIES.items():
            answer = await admin.post(DEVICES, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, f"{name}: {answer.text}"
            is_error(answer, 400, "INVALID_ARGUMENT")
            assert len(answer.text) < 2500, name
        assert (await admin.get(f"{DEVICES}/summary")).json()["total"] == 0


async def test_a_refused_body_names_its_field_and_no_secret(api: Api) -> None:  # noqa: F811
    async with api.operator() as admin:
        answer = await admin.post(DEVICES, json={"name": "a", "hardware_id": "b", "colour": "red"})
        assert answer.json()["message"] == 'the body has the unknown field "colour"'
        answer = await admin.post(DEVICES, json={"name": "a", "hardware_id": "b", "tags": {"a": 5}})
        assert "tags" in answer.json()["message"]
        key = "c2VjcmV0LXNlY3JldC1zZWNyZXQ"
        answer = await admin.post(
            DEVICES, json={"name": "a", "hardware_id": "b", "credential_type": "psk", "psk": {"key": key}}
        )
        assert answer.status_code == 400
        assert key not in answer.text


async def test_queries_are_checked(api: Api) -> None:  # noqa: F811
    async with api.operator() as admin:
        for query in (
            "limit=0",
            "limit=1001",
            "limit=ten",
            "limit=",
            "limit=1&limit=2",
            "statsu=active",
            "status=asleep",
            "gateway_id=null",
            "q=%00",
            "q=%ff",
            "q=%ed%a0%80",
            "cursor=nonsense",
            "cursor=%00",
            "tag==x",
            "&".join(f"a{n}=1" for n in range(100)),
        ):
            answer = await admin.get(f"{DEVICES}?{query}")
            assert answer.status_code == 400, f"{query}: {answer.text}"
            is_error(answer, 400, "INVALID_ARGUMENT")
        assert (await admin.get(f"{DEVICES}?limit=1&q=%C3%A9&tag=a%3Db")).status_code == 200
        is_error(await admin.get(f"{BASE}/events?after=1"), 400, "INVALID_ARGUMENT")
        is_error(await admin.get(f"{BASE}/events?after=1-1&cursor=1-1"), 400, "INVALID_ARGUMENT")
        is_error(await admin.get(f"{BASE}/events?after=99999999999999999999-1"), 400, "INVALID_ARGUMENT")


async def test_paths_that_name_nothing(api: Api) -> None:  # noqa: F811
    async with api.operator() as admin:
        for path in (
            f"{BASE}/nothing",
            f"{BASE}/devices/{NOBODY}",
            f"{BASE}/devices/not-a-uuid",
            f"{BASE}/devices/{{{NOBODY}}}",
            f"{BASE}/devices/%00",
            f"{BASE}/devices/a%2Fb",
            f"{BASE}/profiles/%00",
            f"{BASE}/profiles/..%2f..",
            f"{BASE}/profiles/%F0%9F%A6%86",
            f"{BASE}/provisioning/templates/%00",
            f"{BASE}/devices/{NOBODY}/timeline",
            f"{BASE}/devices/{NOBODY}/uplinks",
            f"{BASE}/devices/{NOBODY}/readings",
            f"{BASE}/devices/{NOBODY}/credentials",
            "/",
            "/docs/../../etc/passwd",
            "/docs/swagger_bundle.js",
        ):
            is_error(await admin.get(path), 404, "NOT_FOUND")
        is_error(await admin.delete(f"{BASE}/sessions/{NOBODY}"), 404, "NOT_FOUND")
        is_error(await admin.delete(f"{BASE}/sessions/x"), 404, "NOT_FOUND")


async def test_methods_and_types_that_are_not_served(api: Api) -> None:  # noqa: F811
    async with api.operator() as admin:
        answer = await admin.patch(DEVICES, json={})
        is_error(answer, 405, "INVALID_ARGUMENT")
        assert answer.headers["allow"] == "GET, HEAD, OPTIONS, POST"
        answer = await admin.post(DEVICES, content=b"name=a", headers={"content-type": "text/plain"})
        is_error(answer, 415, "INVALID_ARGUMENT")
        answer = await admin.post(
            DEVICES, content=b"x", headers={"content-type": "application/json", "content-encoding": "gzip"}
        )
        is_error(answer, 415, "INVALID_ARGUMENT")
        answer = await admin.post(DEVICES, content=b"[" * 1_100_000)
        is_error(answer, 413, "INVALID_ARGUMENT")
        for path, methods in (
            (DEVICES, "GET, HEAD, OPTIONS, POST"),
            (f"{DEVICES}/x", "DELETE, GET, HEAD, OPTIONS, PUT"),
            (f"{BASE}/provision", "OPTIONS, POST"),
            ("/docs", "GET, HEAD, OPTIONS"),
        ):
            options = await admin.options(path)
            assert (options.status_code, options.headers["allow"]) == (204, methods)
        head = await admin.head(DEVICES)
        assert head.status_code == 200
        assert head.content == b""


async def test_correlation_ids_are_taken_over_only_when_they_are_harmless(api: Api) -> None:  # noqa: F811
    async with api.operator() as admin:
        answer = await admin.get(f"{BASE}/nothing", headers={"x-correlation-id": "boot-0042_a"})
        assert answer.json()["correlation_id"] == "boot-0042_a"
        for harmful in ("short", "a" * 65, "with space", 'quote"quote', "new\tline"):
            answer = await admin.get(f"{BASE}/nothing", headers={"x-correlation-id": harmful})
            assert answer.json()["correlation_id"] != harmful
            assert len(answer.json()["correlation_id"]) == 32


async def test_every_failed_authentication_looks_alike(api: Api) -> None:  # noqa: F811
    device = await api.registered()
    operator, key = f"Bearer {api.token()}", device["api_key"]
    foreign = f"Bearer {api.token(tenant='nobody')}"
    tries: list[list[tuple[str, str]]] = [
        [],
        [("authorization", "Bearer")],
        [("authorization", "Bearer ")],
        [("authorization", "Basic YTpi")],
        [("authorization", "Bearer x.y.z")],
        [("authorization", foreign)],
        [("authorization", operator + "x")],
        [("authorization", operator), ("authorization", operator)],
        [("authorization", operator), ("x-api-key", key)],
        [("authorization", "Bearer sk_live_" + "A" * 43)],
        [("x-api-key", "")],
        [("x-api-key", "sk_live_" + "A" * 43)],
        [("x-api-key", "\u00ff".encode("latin-1").decode("latin-1"))],
    ]
    seen = set()
    async with api.client() as caller:
        for headers in tries:
            for method, path in (("GET", DEVICES), ("POST", f"{BASE}/telemetry")):
                encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers]
                answer = await caller.request(method, path, headers=encoded)
                if path == f"{BASE}/telemetry" and headers and headers[0][1] == operator and len(headers) == 1:
                    continue
                is_error(answer, 401, "UNAUTHENTICATED")
                assert answer.headers["www-authenticate"].startswith("Bearer")
                seen.add(answer.json()["message"])
    assert len(seen) == 1


async def test_the_wrong_kind_of_credential_is_denied_only_to_the_known(api: Api) -> None:  # noqa: F811
    device = await api.registered()
    async with api.device(device["api_key"]) as caller:
        is_error(await caller.get(DEVICES), 403, "PERMISSION_DENIED")
    async with api.operator() as caller:
        is_error(await caller.post(f"{BASE}/telemetry", json={"a": 1}), 403, "PERMISSION_DENIED")
    async with api.operator(role=Role.MEMBER) as caller:
        answer = await caller.get(DEVICES)
        is_error(answer, 403, "PERMISSION_DENIED")
        assert "devices:read" in answer.json()["message"]


async def test_limits_tell_when_to_come_back(dsn: str) -> None:
    settings = HttpApiSettings(
        key_requests_per_second=0.1,
        key_requests_burst=3,
        provisioning_attempts_per_second=0.1,
        provisioning_attempts_burst=2,
        failed_authentications_per_second=0.1,
        failed_authentications_burst=2,
    )
    claim = {"provision_key": "pk_x", "device_name": "a", "hardware_id": "b"}
    async with running_api(dsn, settings) as api:  # noqa: F811
        async with api.operator() as admin:
            answers = [await admin.get(DEVICES) for _ in range(4)]
        assert [a.status_code for a in answers] == [200, 200, 200, 429]
        is_error(answers[-1], 429, "RESOURCE_EXHAUSTED")
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 10
        async with api.operator(subject="bob") as another:
            assert (await another.get(DEVICES)).status_code == 200
        async with api.client() as nobody:
            claims = [await nobody.post(f"{BASE}/provision", json=claim) for _ in range(3)]
            assert [a.status_code for a in claims] == [403, 403, 429]
            failures = [await nobody.get(DEVICES) for _ in range(3)]
            assert [a.status_code for a in failures] == [401, 401, 429]
        async with api.operator(subject="carol") as good:
            assert (await good.get(DEVICES)).status_code == 200
        counters = api.http.service.allowances.counters
        assert (counters.credential, counters.provisioning, counters.failures) == (1, 1, 1)


async def test_an_unexpected_failure_tells_nothing_but_its_id(
    api: Api,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("the inside of the house")

    monkeypatch.setattr(type(api.registry.devices), "summary", broken)
    async with api.operator() as admin:
        answer = await admin.get(f"{DEVICES}/summary")
    is_error(answer, 500, "INTERNAL")
    assert "house" not in answer.text
    record = next(r for r in caplog.records if r.message == "http.failed")
    assert record.fields["correlation_id"] == answer.json()["correlation_id"]  # type: ignore[attr-defined]
    assert api.seen.answers[-1] == (f"{DEVICES}/summary", "GET", 500)
