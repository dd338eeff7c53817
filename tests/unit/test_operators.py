"""Operators' tokens: what is accepted, and every trick of RFC 8725 refused with one and the same answer."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc import jwe, jws
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey

from registry.errors import ErrorCode, InvalidArgument, Unauthenticated
from registry.operators import (
    MAX_LIFETIME,
    InvalidKeySet,
    IssuerKey,
    IssuerPublicKey,
    JwksKey,
    OperatorPrincipal,
    OperatorVerifier,
    mint,
    parse_jwks,
)
from registry.permissions import Permission, Role
from registry.secrets import Secret

NOW = datetime(2026, 5, 29, 10, 15, tzinfo=UTC)
AT = int(NOW.timestamp())

OWN = IssuerKey(bytes(range(32)))
FOREIGN = IssuerKey(b"f" * 32)
STRANGER = IssuerKey(b"s" * 32)

HEADER: dict[str, Any] = {"alg": "EdDSA", "typ": "JWT", "kid": "own-1"}
CLAIMS: dict[str, Any] = {
    "iss": "gatehouse",
    "aud": "gatehouse",
    "sub": "ada",
    "tenant": "acme",
    "role": "member",
    "permissions": ["devices", "events:read"],
    "iat": AT,
    "exp": AT + 3600,
}


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed(header: bytes, claims: bytes, key: IssuerKey = OWN) -> str:
    """A token over exactly these bytes, whatever they are, with a signature that verifies."""
    signing_input = f"{b64(header)}.{b64(claims)}"
    return f"{signing_input}.{b64(ed25519(key, signing_input.encode()))}"


def ed25519(key: IssuerKey, message: bytes) -> bytes:
    private = OKPKey.import_key({"kty": "OKP", "crv": "Ed25519", "x": b64(key.public.raw), "d": b64(seed(key))})
    return private.get_op_key("sign").sign(message)  # type: ignore[union-attr]


def seed(key: IssuerKey) -> bytes:
    return key.to_bytes().reveal()


def token(
    *, header: dict[str, Any] | None = None, key: IssuerKey = OWN, without: tuple[str, ...] = (), **claims: Any
) -> str:
    """The good token with members changed or left out; Python's NaN and Infinity are written as such."""
    body = {name: value for name, value in (CLAIMS | claims).items() if name not in without}
    head = {name: value for name, value in (HEADER | (header or {})).items() if name not in without}
    return signed(json.dumps(head).encode(), json.dumps(body).encode(), key)


def token_with(claim: str, value: Any) -> str:
    changed: dict[str, Any] = {claim: value}
    return token(**changed)


def verifier(**options: Any) -> OperatorVerifier:
    return OperatorVerifier({"own-1": OWN.public}, [JwksKey("idp-1", FOREIGN.public)], **options)


def refusal(text: str, gate: OperatorVerifier | None = None, now: datetime = NOW) -> str:
    """The operator's reason for a refusal; the answer to the outside is asserted to be the one for everything."""
    with pytest.raises(Unauthenticated) as refused:
        (gate or verifier()).verify(text, now)
    assert refused.value.code is ErrorCode.UNAUTHENTICATED
    assert str(refused.value) == refused.value.message == Unauthenticated.PUBLIC_MESSAGE
    assert refused.value.retry_after is None
    return refused.value.reason


# --- what is accepted ---------------------------------------------------------------------------------------------


def test_a_good_token_proves_its_operator() -> None:
    assert verifier().verify(token(jti="t-1"), NOW) == OperatorPrincipal(
        subject="ada",
        tenant_claim="acme",
        role=Role.MEMBER,
        permissions=frozenset({Permission.DEVICES, Permission.EVENTS_READ}),
        issuer="gatehouse",
        expires_at=NOW + timedelta(hours=1),
        token_id="t-1",
    )


@pytest.mark.parametrize(
    "change",
    [
        {"header": {"alg": "Ed25519"}},
        {"header": {"typ": "at+JWT"}},
        {"header": {"x5t": "thumb", "unheard-of": [1]}},
        {"without": ("typ",)},
        {"without": ("kid",)},
        {"without": ("iat",)},
        {"without": ("permissions",)},
        {"aud": ["gatehouse"]},
        {"exp": AT + 0.5},
        {"exp": float(AT + 3600)},
        {"nbf": AT},
        {"permissions": []},
        {"permissions": ["ca", "ca"]},
        {"tenant": "3a9f1d22-6b4c-4e8a-bf21-90c7e5d4a118"},
        {"sub": "Ada Łovelace"},
        {"scope": "whatever", "nested": {"deep": [1, None]}},
    ],
)
def test_what_the_standards_allow_is_accepted(change: dict[str, Any]) -> None:
    assert verifier().verify(token(**change), NOW).issuer == "gatehouse"


def test_a_token_of_the_jwks_is_accepted_for_any_issuer_but_ours() -> None:
    foreign = token(header={"kid": "idp-1"}, key=FOREIGN, iss="https://idp.example")
    assert verifier().verify(foreign, NOW).issuer == "https://idp.example"
    assert verifier(accepted_issuers=frozenset({"https://idp.example"})).verify(foreign, NOW).role is Role.MEMBER


def test_without_a_kid_the_only_key_of_the_issuers_side_is_taken() -> None:
    nameless = token(key=FOREIGN, iss="idp", without=("kid",))
    OperatorVerifier({"own-1": OWN.public}, [JwksKey(None, FOREIGN.public)]).verify(nameless, NOW)
    two = OperatorVerifier({}, [JwksKey(None, FOREIGN.public), JwksKey("b", STRANGER.public)])
    assert refusal(nameless, two) == "no kid, and not exactly one key that fits"
    assert refusal(token(without=("kid",)), two) == "no kid, and not exactly one key that fits"


# --- minting ------------------------------------------------------------------------------------------------------


def test_a_minted_token_is_accepted_until_it_expires() -> None:
    text = mint(
        OWN,
        "own-1",
        subject="ada",
        tenant="acme",
        role=Role.TENANT_ADMIN,
        permissions=[Permission.CA],
        now=NOW,
        token_id="j",
    )
    gate = verifier(leeway_seconds=0)
    principal = gate.verify(text, NOW)
    assert principal == OperatorPrincipal(
        subject="ada",
        tenant_claim="acme",
        role=Role.TENANT_ADMIN,
        permissions=frozenset({Permission.CA}),
        issuer="gatehouse",
        expires_at=NOW + timedelta(hours=1),
        token_id="j",
    )
    assert gate.verify(text, principal.expires_at - timedelta(microseconds=1)) == principal
    assert refusal(text, gate, principal.expires_at) == "token expired"


names = st.text(min_size=1, max_size=256).filter(str.isprintable)


@settings(max_examples=60)
@given(
    subject=names,
    tenant=st.text(min_size=1, max_size=128).filter(lambda t: t.isprintable() and not any(map(str.isspace, t))),
    role=st.sampled_from(Role),
    permissions=st.sets(st.sampled_from(Permission)),
    seconds=st.integers(1, int(MAX_LIFETIME.total_seconds())),
    now=st.datetimes(datetime(2020, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
def test_whatever_is_minted_is_accepted_at_once(
    subject: str, tenant: str, role: Role, permissions: set[Permission], seconds: int, now: datetime
) -> None:
    text = mint(
        OWN,
        "own-1",
        subject=subject,
        tenant=tenant,
        role=role,
        permissions=permissions,
        now=now,
        ttl=timedelta(seconds=seconds),
    )
    principal = verifier(leeway_seconds=1).verify(text, now)
    assert (principal.subject, principal.tenant_claim, principal.role) == (subject, tenant, role)
    assert principal.permissions == permissions


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ttl": timedelta(0)}, "ttl"),
        ({"ttl": timedelta(seconds=-1)}, "ttl"),
        ({"ttl": timedelta(milliseconds=999)}, "ttl"),
        ({"ttl": timedelta(hours=24, seconds=1)}, "ttl"),
        ({"ttl": timedelta(hours=2), "max_ttl": timedelta(hours=1)}, "ttl"),
        ({"subject": ""}, "subject"),
        ({"subject": "a\nb"}, "subject"),
        ({"subject": "a" * 257}, "subject"),
        ({"tenant": ""}, "tenant"),
        ({"tenant": "a b"}, "tenant"),
        ({"tenant": "a" * 129}, "tenant"),
        ({"issuer": ""}, "issuer"),
        ({"token_id": ""}, "token_id"),
    ],
)
def test_what_no_verifier_would_accept_is_not_minted(change: dict[str, Any], field: str) -> None:
    good: dict[str, Any] = {"subject": "ada", "tenant": "acme", "role": Role.MEMBER, "permissions": [], "now": NOW}
    with pytest.raises(InvalidArgument) as refused:
        mint(OWN, "own-1", **(good | change))
    assert refused.value.field == field


def test_a_naive_now_is_our_bug_and_no_refusal() -> None:
    with pytest.raises(ValueError, match="aware"):
        verifier().verify(token(), NOW.replace(tzinfo=None))


def test_any_time_zone_will_do() -> None:
    verifier().verify(token(), NOW.astimezone(timezone(timedelta(hours=9))))


# --- our key ------------------------------------------------------------------------------------------------------


def test_an_issuer_key_survives_sealing_and_shows_nothing() -> None:
    key = IssuerKey.generate(lambda size: b"\x07" * size)
    raw = key.to_bytes()
    assert len(raw.reveal()) == 32
    again = IssuerKey.from_bytes(raw)
    assert (again.kid, again.public) == (key.kid, key.public)
    for shown in (repr(key), repr(raw), str(key)):
        assert b64(raw.reveal()) not in shown
        assert raw.reveal().hex() not in shown
        assert repr(raw.reveal()) not in shown


def test_generated_keys_differ() -> None:
    assert IssuerKey.generate().kid != IssuerKey.generate().kid


def test_the_kid_is_the_rfc_7638_thumbprint() -> None:
    # RFC 8037 appendix A.3 gives this key and its thumbprint.
    key = IssuerKey(base64.urlsafe_b64decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A="))
    assert b64(key.public.raw) == "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
    assert key.kid == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_keys_have_32_bytes(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        IssuerKey.from_bytes(Secret(bytes(length)))
    with pytest.raises(InvalidKeySet, match="32 bytes"):
        IssuerPublicKey(bytes(length))


# --- algorithms (RFC 8725 §2.1, §3.1, §3.2) -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "None", "NONE", "nOnE", "", " none", "none\x00"])
@pytest.mark.parametrize("signature", ["", b64(bytes(64)), b64(b"x")])
def test_an_unsigned_token_is_refused_however_none_is_spelt(name: str, signature: str) -> None:
    head, body, _ = token(header={"alg": name}).split(".")
    refusal(f"{head}.{body}.{signature}")


def test_the_public_key_is_no_hmac_secret() -> None:
    raw = OWN.public.raw
    key = OKPKey.import_key({"kty": "OKP", "crv": "Ed25519", "x": b64(raw)})
    pem = key.as_pem(private=False)
    jwk = json.dumps(key.as_dict(private=False)).encode()
    for name, hash_name in (("HS256", "sha256"), ("HS384", "sha384"), ("HS512", "sha512")):
        for secret in (raw, b64(raw).encode(), raw.hex().encode(), pem, jwk):
            signing_input = ".".join(token(header={"alg": name}).split(".")[:2])
            tag = hmac.new(secret, signing_input.encode(), hash_name).digest()
            assert refusal(f"{signing_input}.{b64(tag)}") == "alg is not EdDSA or Ed25519"


@pytest.mark.parametrize(
    "name",
    ["HS256", "RS256", "PS256", "ES256", "ES256K", "Ed448", "eddsa", "ed25519", "EDDSA", "EdDSA ", "A128KW", "dir"],
)
def test_every_other_algorithm_is_refused_over_a_good_signature_too(name: str) -> None:
    assert refusal(token(header={"alg": name})) == "alg is not EdDSA or Ed25519"


@pytest.mark.parametrize("value", [None, 1, True, ["EdDSA"], {"EdDSA": 1}])
def test_an_alg_that_is_no_text_is_refused(value: Any) -> None:
    assert refusal(token(header={"alg": value})) == "alg is not EdDSA or Ed25519"


def test_a_header_without_alg_is_refused() -> None:
    assert refusal(token(without=("alg",))) == "alg is not EdDSA or Ed25519"


def other_algorithms() -> list[tuple[str, Any]]:
    return [
        ("RS256", RSAKey.import_key(rsa.generate_private_key(65537, 2048))),
        ("ES256", ECKey.import_key(ec.generate_private_key(ec.SECP256R1()))),
        ("HS256", OctKey.import_key(b"k" * 32)),
    ]


def test_tokens_of_other_kinds_of_keys_are_refused() -> None:
    for name, key in other_algorithms():
        text = jws.serialize_compact(HEADER | {"alg": name}, json.dumps(CLAIMS), key, algorithms=[name])
        assert refusal(text) == "alg is not EdDSA or Ed25519"


def test_an_ed448_signature_does_not_pass_as_eddsa() -> None:
    private = ed448.Ed448PrivateKey.generate()
    signing_input = ".".join(token().split(".")[:2])
    assert refusal(f"{signing_input}.{b64(private.sign(signing_input.encode()))}") == "signature does not verify"


def test_an_encrypted_token_is_refused() -> None:
    key = OctKey.import_key(b"k" * 16)
    text = jwe.encrypt_compact({"alg": "dir", "enc": "A128GCM"}, json.dumps(CLAIMS), key)
    assert refusal(text) == "not three segments"


def test_a_nested_token_is_refused() -> None:
    assert refusal(signed(json.dumps(HEADER).encode(), token().encode())) == "not JSON in UTF-8"
    assert refusal(token(header={"cty": "JWT"})) == "header carries a refused member"


# --- keys (RFC 8725 §3.10) ----------------------------------------------------------------------------------------


def stranger_jwk() -> dict[str, str]:
    return {"kty": "OKP", "crv": "Ed25519", "x": b64(STRANGER.public.raw), "kid": "own-1"}


@pytest.mark.parametrize(
    "member",
    [
        {"jku": "https://evil.example/jwks.json"},
        {"jwk": stranger_jwk()},
        {"x5u": "https://evil.example/cert.pem"},
        {"x5c": ["MIIB"]},
        {"crit": ["exp"]},
        {"crit": []},
        {"crit": ["b64"], "b64": False},
        {"b64": False},
        {"b64": True},
        {"zip": "DEF"},
        {"enc": "A128GCM"},
        {"jku": None},
    ],
)
@pytest.mark.parametrize("key", [OWN, STRANGER])
def test_a_header_that_brings_a_key_or_changes_the_rules_is_refused(member: dict[str, Any], key: IssuerKey) -> None:
    assert refusal(token(header=member, key=key)) == "header carries a refused member"


@pytest.mark.parametrize(
    "kid",
    [
        "../../../../dev/null",
        "/etc/passwd",
        "' OR 1=1 --",
        "x' UNION SELECT 'a",
        "https://evil.example/key",
        "own-1\x00",
        "own-1 ",
        "OWN-1",
        "",
        "k" * 300,
        "idp-1",
        None,
        1,
        ["own-1"],
        {"own-1": 1},
    ],
)
def test_a_kid_is_a_look_up_in_the_issuers_own_table_and_nothing_else(kid: Any) -> None:
    for key in (OWN, STRANGER, FOREIGN):
        assert refusal(token(header={"kid": kid}, key=key)).startswith("kid ")


def test_a_stranger_is_refused() -> None:
    assert refusal(token(key=STRANGER)) == "signature does not verify"
    assert refusal(token(key=STRANGER, without=("kid",))) == "signature does not verify"


def test_a_jwks_key_does_not_vouch_for_our_issuer() -> None:
    assert refusal(token(header={"kid": "idp-1"}, key=FOREIGN)) == "kid unknown for this issuer"
    assert refusal(token(key=FOREIGN)) == "signature does not verify"
    assert refusal(token(key=FOREIGN, without=("kid",))) == "signature does not verify"


def test_our_key_does_not_vouch_for_another_issuer() -> None:
    assert refusal(token(iss="https://idp.example")) == "kid unknown for this issuer"
    assert refusal(token(iss="https://idp.example", without=("kid",))) == "signature does not verify"


def test_a_jwks_that_names_its_key_like_ours_still_speaks_for_its_own_issuers_only() -> None:
    gate = OperatorVerifier({"own-1": OWN.public}, [JwksKey("own-1", FOREIGN.public)])
    assert refusal(token(key=FOREIGN), gate) == "signature does not verify"
    assert gate.verify(token(key=FOREIGN, iss="idp"), NOW).issuer == "idp"
    assert gate.verify(token(), NOW).issuer == "gatehouse"


def test_only_the_accepted_issuers_are_accepted() -> None:
    gate = verifier(accepted_issuers=frozenset({"https://idp.example"}))
    other = token(header={"kid": "idp-1"}, key=FOREIGN, iss="https://idp.example/")
    assert refusal(other, gate) == "issuer not accepted"
    assert refusal(token(header={"kid": "idp-1"}, key=FOREIGN, iss="x"), verifier(accepted_issuers=frozenset()))
    gate.verify(token(), NOW)  # our own issuer needs no listing


def test_a_verifier_without_keys_refuses() -> None:
    assert refusal(token(), OperatorVerifier({})) == "kid unknown for this issuer"


@pytest.mark.parametrize(
    "build",
    [
        lambda: verifier(accepted_issuers=frozenset({"gatehouse", "x"})),
        lambda: OperatorVerifier({}, [JwksKey("a", OWN.public), JwksKey("a", FOREIGN.public)]),
    ],
)
def test_keys_that_contradict_each_other_are_a_configuration_error(build: Callable[[], Any]) -> None:
    with pytest.raises(InvalidKeySet):
        build()


@pytest.mark.parametrize("options", [{"leeway_seconds": -1}, {"max_cached": -1}, {"max_lifetime": timedelta(0)}])
def test_limits_without_sense_are_a_mistake(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        verifier(**options)


# --- claims -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iss", "aud", "sub", "tenant", "role", "exp"])
def test_a_token_without_a_required_claim_is_refused(name: str) -> None:
    assert name in refusal(token(without=(name,))) or name == "aud"


BAD_NUMBERS: list[Any] = [
    "1780000000",
    None,
    True,
    False,
    [AT],
    {},
    math.nan,
    math.inf,
    -math.inf,
    -1,
    10**30,
    10**400,
    1e300,
]


@pytest.mark.parametrize("claim", ["exp", "iat", "nbf"])
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=lambda value: str(value)[:20])
def test_a_time_that_is_no_sensible_number_is_refused(claim: str, value: Any) -> None:
    refusal(token_with(claim, value))


@pytest.mark.parametrize("literal", ["1e999", "1E+400", "-0.0", "0", "1" * 5000, "0x7fffffff", "1_800_000_000", "NaN"])
def test_an_exp_that_json_readers_disagree_on_is_refused(literal: str) -> None:
    body = json.dumps(CLAIMS | {"exp": "EXP"}).replace('"EXP"', literal)
    refusal(signed(json.dumps(HEADER).encode(), body.encode()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_in_claims_that_nobody_reads_too(value: float) -> None:
    assert refusal(token(filler=value)) == "NaN or Infinity is not JSON"


def test_expiry_is_exact_but_for_the_leeway() -> None:
    text = token(exp=AT + 60)
    verifier().verify(text, NOW + timedelta(seconds=89.999))
    assert refusal(text, now=NOW + timedelta(seconds=90)) == "token expired"
    assert refusal(text, verifier(leeway_seconds=0), NOW + timedelta(seconds=60)) == "token expired"


@pytest.mark.parametrize("claim", ["iat", "nbf"])
def test_a_token_from_the_future_is_refused_but_for_the_leeway(claim: str) -> None:
    verifier().verify(token_with(claim, AT + 30), NOW)
    assert refusal(token_with(claim, AT + 31)).startswith("token not valid yet")


def test_a_token_that_lives_too_long_is_refused() -> None:
    day = 24 * 3600
    verifier().verify(token(exp=AT + day), NOW)
    assert refusal(token(exp=AT + day + 1)) == "lifetime is not positive, or too long"
    assert refusal(token(exp=AT + 10 * 365 * day, without=("iat",))).endswith("expires too far in the future")
    assert refusal(token(), verifier(max_lifetime=timedelta(minutes=59)))


def test_a_token_that_expires_before_it_was_issued_is_refused() -> None:
    assert refusal(token(iat=AT + 20, exp=AT + 10)) == "lifetime is not positive, or too long"


@pytest.mark.parametrize(
    "value",
    [
        "Gatehouse",
        "gatehouse ",
        "",
        None,
        1,
        True,
        {},
        {"gatehouse": 1},
        [],
        ["gatehouse", "other"],
        ["gatehouse", "gatehouse"],
        [["gatehouse"]],
    ],
)
def test_only_a_token_for_us_alone_is_accepted(value: Any) -> None:
    assert refusal(token(aud=value)) == "wrong audience"


BAD_TEXTS: list[Any] = [
    None,
    1,
    True,
    1.5,
    [],
    ["acme"],
    {},
    {"id": "acme"},
    "",
    "a\x00",
    "a\nb",
    "\x1b[31m",
    "\ud800",
    "\u202e",
]


@pytest.mark.parametrize("claim", ["tenant", "sub", "iss", "jti"])
@pytest.mark.parametrize("value", [*BAD_TEXTS, "a" * 257], ids=ascii)
def test_a_name_that_is_no_plain_text_is_refused(claim: str, value: Any) -> None:
    assert claim in refusal(token_with(claim, value))


@pytest.mark.parametrize("value", ["a" * 129, " acme", "acme ", "ac me", "acme\u00a0", "acme\u2003"])
def test_a_tenant_is_short_and_without_spaces(value: str) -> None:
    assert "tenant" in refusal(token(tenant=value))


@pytest.mark.parametrize("value", [None, 1, True, "", "admin", "PLATFORM_ADMIN", "member ", ["member"], {"member": 1}])
def test_an_unknown_role_is_refused(value: Any) -> None:
    assert refusal(token(role=value)) == "role unknown"


@pytest.mark.parametrize(
    "value",
    [None, "devices", {"devices": True}, 1, True, ["devices", "root"], ["*"], [None], [["devices"]], ["Devices"], [1]],
)
def test_permissions_are_a_list_of_known_words(value: Any) -> None:
    assert refusal(token(permissions=value)).startswith("permission")


@pytest.mark.parametrize("value", ["logout+jwt", "dpop+jwt", "secevent+jwt", "JOSE", "", None, 1, ["JWT"]])
def test_another_kind_of_jwt_is_refused(value: Any) -> None:
    assert refusal(token(header={"typ": value})) == "typ is not JWT or at+jwt"


# --- one text per token -------------------------------------------------------------------------------------------


def test_padding_is_refused() -> None:
    head, body, signature = token().split(".")
    for text in (f"{head}=.{body}.{signature}", f"{head}.{body}==.{signature}", f"{head}.{body}.{signature}=="):
        assert refusal(text) == "not base64url"


def test_unused_bits_must_be_zero() -> None:
    # 64 bytes end in a character with four unused bits: sixteen spellings of one signature, one of them canonical.
    gate, text = verifier(), token()
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(text[-1])
    assert last % 16 == 0
    for unused in range(1, 16):
        assert refusal(text[:-1] + alphabet[last + unused], gate) == "base64url is not canonical"


def test_the_other_signature_of_the_same_message_is_refused() -> None:
    # RFC 8032 §5.1.7: S must be below the group order L, or S + L would be a second signature.
    head, body, signature = token().split(".")
    raw = base64.urlsafe_b64decode(signature + "==")
    order = 2**252 + 27742317777372353535851937790883648493
    other = (int.from_bytes(raw[32:], "little") + order).to_bytes(32, "little")
    assert refusal(f"{head}.{body}.{b64(raw[:32] + other)}") == "signature does not verify"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: " " + text,
        lambda text: text + " ",
        lambda text: text + "\n",
        lambda text: text.replace(".", ". ", 1),
        lambda text: text[:10] + "\n" + text[10:],
        lambda text: text[:10] + "%" + text[10:],
        lambda text: text + ".",
        lambda text: "." + text,
        lambda text: text.replace(".", "..", 1),
        lambda text: text + "." + text.split(".")[2],
        lambda text: "Bearer " + text,
        lambda text: text + "\x00",
        lambda text: text + "é",
        lambda text: text + "\ud800",
        lambda text: text.replace(".", "\u3002", 1),
    ],
)
def test_nothing_may_stand_around_or_inside_the_three_segments(change: Callable[[str], str]) -> None:
    text = token()
    gate = verifier()
    gate.verify(text, NOW)
    refusal(change(text), gate)


@pytest.mark.parametrize("text", ["", ".", "..", "...", "a.b.c", "null", "{}", "eyJhbGciOiJub25lIn0.e30."])
def test_what_is_no_token_is_refused(text: str) -> None:
    refusal(text)


def test_the_standard_alphabet_of_base64_is_refused() -> None:
    for number in range(200):
        text = token(sub=f"ada {number}")
        standard = text.replace("-", "+").replace("_", "/")
        if standard != text:
            assert refusal(standard) == "not base64url"
            return
    pytest.fail("no token with - or _ came up")


@pytest.mark.parametrize(
    ("header", "claims"),
    [
        (b'{"alg":"none","alg":"EdDSA","kid":"own-1"}', None),
        (b'{"alg":"EdDSA","kid":"own-1","kid":"own-1"}', None),
        (b'{"alg":"EdDSA","kid":"own-1","\\u006bid":"own-1"}', None),
        (None, b'{"tenant":"other",'),
        (None, b'{"exp":99999999999,'),
        (None, b'{"x":{"y":1,"y":2},'),
        (None, b'{"x":[{"y":1,"y":2}],'),
    ],
)
def test_a_member_that_occurs_twice_is_refused(header: bytes | None, claims: bytes | None) -> None:
    head = header or json.dumps(HEADER).encode()
    body = json.dumps(CLAIMS).encode()
    if claims is not None:
        body = claims + body[1:]
    assert refusal(signed(head, body)) == "duplicate JSON members"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"1",
        b"{",
        b"{}{}",
        b"\xff\xfe{}",
        b'{"sub":"\xc3("}',
        b'{"sub":"\xed\xa0\x80"}',
        b"\xef\xbb\xbf{}",
        json.dumps(CLAIMS).encode("utf-16"),
        json.dumps(CLAIMS).encode("utf-16-le"),
        json.dumps(CLAIMS).encode("utf-32"),
        b"[" * 5000,
        b'{"a":' * 1000 + b"1" + b"}" * 1000,
        b'{"a":NaN}',
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":"\n"}',
        b'{"a":1}\x00',
    ],
    ids=lambda body: ascii(body[:16]),
)
def test_claims_and_headers_are_json_objects_in_utf_8(body: bytes) -> None:
    refusal(signed(json.dumps(HEADER).encode(), body))
    refusal(signed(body, json.dumps(CLAIMS).encode()))


def test_size_is_capped_before_anything_is_looked_at() -> None:
    verifier().verify(token(filler="x" * 5800), NOW)
    assert refusal(token(filler="x" * 6200)) == "token too long"
    assert refusal("a" * 50_000_000) == "token too long"


@settings(max_examples=300)
@given(st.text(max_size=200))
def test_any_text_is_refused_and_nothing_else_happens(text: str) -> None:
    refusal(text)


@settings(max_examples=200)
@given(st.binary(max_size=80), st.binary(max_size=80))
def test_any_signed_bytes_are_refused_and_nothing_else_happens(header: bytes, claims: bytes) -> None:
    refusal(signed(header, claims))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(st.sampled_from([*CLAIMS, "nbf", "jti"]), json_values)
def test_any_value_of_any_claim_is_accepted_or_refused_and_nothing_else_happens(claim: str, value: Any) -> None:
    try:
        principal = verifier().verify(token_with(claim, value), NOW)
    except Unauthenticated:
        return
    assert isinstance(principal, OperatorPrincipal)
    assert type(principal.tenant_claim) is type(principal.subject) is str


def test_every_truncation_and_every_changed_character_is_refused() -> None:
    text = token()
    gate = verifier()
    gate.verify(text, NOW)
    for position in range(len(text)):
        refusal(text[:position], gate)
        refusal(text[:position] + ("B" if text[position] == "A" else "A") + text[position + 1 :], gate)


def test_a_reason_repeats_nothing_of_the_token() -> None:
    poison = "poison\n\x1b[31m"
    for text in (
        token(sub=poison),
        token(tenant=poison),
        token(role=poison),
        token(iss=poison),
        token(permissions=[poison]),
        token(header={"kid": poison}),
        token(header={"alg": poison}),
        token(header={"typ": poison}),
    ):
        assert "poison" not in refusal(text)


# --- the cache ----------------------------------------------------------------------------------------------------


class Counter:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.checks = 0
        original = jws.deserialize_compact

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.checks += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(jws, "deserialize_compact", counted)


@pytest.fixture
def signature_checks(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


def test_a_hit_costs_no_signature_check(signature_checks: Counter) -> None:
    gate, text = verifier(), token()
    first = gate.verify(text, NOW)
    for second in range(100):
        assert gate.verify(text, NOW + timedelta(seconds=second)) is first
    assert signature_checks.checks == 1


def test_a_refused_token_is_checked_each_time(signature_checks: Counter) -> None:
    gate, text = verifier(), token(key=STRANGER)
    for _ in range(3):
        refusal(text, gate)
    assert signature_checks.checks == 3


def test_the_cache_is_bounded_and_forgets_the_least_recently_used(signature_checks: Counter) -> None:
    gate = verifier(max_cached=2)
    one, two, three = (token(sub=name) for name in ("one", "two", "three"))
    for text in (one, two, one, three):  # two is forgotten
        gate.verify(text, NOW)
    assert signature_checks.checks == 3
    gate.verify(one, NOW)
    gate.verify(three, NOW)
    assert signature_checks.checks == 3
    gate.verify(two, NOW)
    assert signature_checks.checks == 4


def test_a_verifier_may_have_no_cache(signature_checks: Counter) -> None:
    gate = verifier(max_cached=0)
    for _ in range(2):
        gate.verify(token(), NOW)
    assert signature_checks.checks == 2


def test_a_cached_token_expires_all_the_same() -> None:
    gate, text = verifier(), token(exp=AT + 60)
    gate.verify(text, NOW)
    assert refusal(text, gate, NOW + timedelta(seconds=90)) == "token expired"
    assert refusal(text, gate, NOW + timedelta(seconds=90)) == "token expired"
    gate.verify(text, NOW)  # a clock that was set back finds the token valid, as it would without a cache


def test_a_cached_token_is_not_valid_before_its_time_when_the_clock_is_set_back() -> None:
    gate, text = verifier(), token(nbf=AT)
    gate.verify(text, NOW)
    assert refusal(text, gate, NOW - timedelta(seconds=31)).startswith("token not valid yet")


@settings(max_examples=80)
@given(
    st.lists(st.integers(-200, 200), min_size=1, max_size=12),
    st.integers(-100, 100),
    st.integers(-100, 100),
    st.integers(1, 150),
)
def test_with_a_cache_every_answer_is_the_one_without(offsets: list[int], iat: int, nbf: int, life: int) -> None:
    text = token(iat=AT + iat, nbf=AT + nbf, exp=AT + iat + life)
    warm = verifier()
    for offset in offsets:
        now = NOW + timedelta(seconds=offset)
        assert answer(warm, text, now) == answer(verifier(), text, now)


def answer(gate: OperatorVerifier, text: str, now: datetime) -> OperatorPrincipal | str:
    try:
        return gate.verify(text, now)
    except Unauthenticated as refused:
        return refused.reason


# --- JWKS ---------------------------------------------------------------------------------------------------------


def jwk(**changes: Any) -> dict[str, Any]:
    good = {"kty": "OKP", "crv": "Ed25519", "x": b64(FOREIGN.public.raw), "kid": "idp-1", "use": "sig", "alg": "EdDSA"}
    return {name: value for name, value in (good | changes).items() if value is not ...}


def jwks(*keys: Any) -> str:
    return json.dumps({"keys": list(keys)})


def test_the_keys_of_a_jwks_verify_tokens() -> None:
    keys = parse_jwks(jwks(jwk(), jwk(kid="idp-2", x=b64(STRANGER.public.raw))))
    gate = OperatorVerifier({}, keys)
    gate.verify(token(header={"kid": "idp-1"}, key=FOREIGN, iss="idp"), NOW)
    gate.verify(token(header={"kid": "idp-2"}, key=STRANGER, iss="idp"), NOW)
    refusal(token(header={"kid": "idp-2"}, key=FOREIGN, iss="idp"), gate)


@pytest.mark.parametrize(
    "changes", [{"use": ...}, {"alg": ...}, {"alg": "Ed25519"}, {"kid": ...}, {"key_ops": ["verify"]}, {"x5t": "?"}]
)
def test_optional_members_may_be_absent_or_say_the_same(changes: dict[str, Any]) -> None:
    (key,) = parse_jwks(jwks(jwk(**changes)))
    assert key == JwksKey(None if "kid" in changes else "idp-1", FOREIGN.public)


OTHERS: list[dict[str, Any]] = [
    {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": "r", "use": "sig"},
    {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA", "kid": "e"},
    jwk(crv="Ed448", kid="o"),
    jwk(crv="X25519", kid="o"),
    jwk(use="enc", kid="o"),
    jwk(alg="ECDH-ES", kid="o"),
    jwk(key_ops=["sign"], kid="o"),
    jwk(key_ops="verify", kid="o"),
    {},
]


@pytest.mark.parametrize("other", OTHERS)
def test_keys_of_other_kinds_and_uses_are_passed_over_and_are_not_enough(other: dict[str, Any]) -> None:
    assert parse_jwks(jwks(other, jwk())) == (JwksKey("idp-1", FOREIGN.public),)
    with pytest.raises(InvalidKeySet, match="no Ed25519 key"):
        parse_jwks(jwks(other))


@pytest.mark.parametrize(
    "private",
    [
        jwk(d=b64(bytes(32))),
        jwk(d=None),
        {"kty": "RSA", "n": "AQAB", "e": "AQAB", "d": "AA", "p": "AA", "q": "AA"},
        {"kty": "oct", "k": "c2VjcmV0LXNlY3JldA"},
    ],
)
def test_a_private_key_in_a_jwks_is_refused_without_repeating_it(private: dict[str, Any]) -> None:
    with pytest.raises(InvalidKeySet, match="private member") as refused:
        parse_jwks(jwks(jwk(kid="other"), private))
    assert "c2VjcmV0" not in str(refused.value)
    assert b64(bytes(32)) not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a JSON object"),
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"keys":[],"keys":[]}', "duplicate"),
        ('{"keys":"\ud800"}', "not a JSON object"),
        ("{}", "no list"),
        ('{"keys":{}}', "no list"),
        ('{"keys":[]}', "no list"),
        ('{"keys":[1]}', "not an object"),
        (jwks(*[jwk(kid=str(number)) for number in range(65)]), "64 are allowed"),
        (jwks(jwk(), jwk(x=b64(STRANGER.public.raw))), "occurs twice"),
        (jwks(jwk(), {"kty": "RSA", "kid": "idp-1"}), "occurs twice"),
        (jwks(jwk(kid=1)), "no printable text"),
        (jwks(jwk(kid="")), "no printable text"),
        (jwks(jwk(kid="a\n")), "no printable text"),
        (jwks(jwk(x=...)), "no `x`"),
        (jwks(jwk(x=1)), "no `x`"),
        (jwks(jwk(x=b64(bytes(31)))), "no `x`"),
        (jwks(jwk(x=b64(bytes(32)) + "=")), "no `x`"),
        (jwks(jwk(x=b64(bytes(32))[:-1] + "B")), "no `x`"),
        (" " * 300_000, "are allowed"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_malformed_jwks_is_a_clear_configuration_error(text: str, why: str) -> None:
    with pytest.raises(InvalidKeySet, match=why):
        parse_jwks(text)


def test_the_cache_key_is_a_digest_so_that_tokens_are_not_kept() -> None:
    gate, text = verifier(), token()
    gate.verify(text, NOW)
    assert list(gate._cache) == [hashlib.sha256(text.encode()).digest()]


def test_public_keys_read_from_pem_tools_fit() -> None:
    public = OKPKey.import_key({"kty": "OKP", "crv": "Ed25519", "x": b64(OWN.public.raw)}).public_key
    raw = public.public_bytes(Encoding.Raw, PublicFormat.Raw)
    OperatorVerifier({"own-1": IssuerPublicKey(raw)}).verify(token(), NOW)
