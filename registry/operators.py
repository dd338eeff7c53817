"""Operators' tokens: minting them with our own issuer key, and verifying them, ours and those of a configured JWKS.

Theory. A token is a compact JWS (RFC 7515 §3.1) over a claims set (RFC 7519), signed with Ed25519 and nothing else. To
verify is a line of gates, each of which only refuses:

    text ─ size, ASCII ─► three segments ─ strict base64url, strict JSON ─► header, claims
         ─ alg, typ, no key brought along ─► issuer picks the table, kid the key ─ signature ─► proven claims
         ─ audience, lifetime, names ─► principal and interval ─ now within it ─► caller

Invariants.
- *The issuer chooses the key table, and we own the tables.* `iss` equal to our own issuer is looked up among our own
  keys, every other issuer among the JWKS keys. So a JWKS key cannot vouch for our issuer, nor ours for another, and the
  header never brings a key: `kid` is a look-up and `jku`, `jwk`, `x5u`, `x5c` are refused (RFC 8725 §3.1, §3.10).
- *One text per token.* Segments are canonical base64url (RFC 7515 §2: no padding; unused bits zero), JSON members are
  unique (RFC 8725 §2.4, RFC 7519 §4), the text is UTF-8. Two different texts are never the same token.
- *Only time changes.* Everything but the clock is decided once; what the clock decides is the interval
  [valid_from, valid_until). The cache keeps principal and interval of *accepted* tokens, and the interval is
  compared on every hit by the function that compares it on a miss. So a hit saves a signature check, decides nothing.
- *All refusals look alike* to the caller. The reason is a constant text of this file for the operator's log: it
  repeats nothing of the token.

A verifier is bound to its keys for life: after a change of keys make a new one, which starts with an empty cache. It
belongs to one event loop, holds no clock and does no I/O. Losing the cache costs signature checks and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Final, NoReturn, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey

from registry.errors import InvalidArgument, Unauthenticated
from registry.permissions import Permission, Role
from registry.secrets import RandomBytes, Secret

AUDIENCE: Final = "gatehouse"
OWN_ISSUER: Final = "gatehouse"

DEFAULT_TTL: Final = timedelta(hours=1)
MAX_LIFETIME: Final = timedelta(hours=24)
"""A token cannot be taken back before it expires, so it may not be made for longer than a day."""

LEEWAY_SECONDS: Final = 30
"""Difference between an issuer's clock and ours that is forgiven."""

MAX_TOKEN: Final = 8192
"""Characters. A token with every permission has about 600; an HTTP header field is capped near this anyway."""

MAX_TENANT: Final = 128
"""Characters of the `tenant` claim: a UUID has 36, a slug fewer than 64."""

MAX_NAME: Final = 256
"""Characters of `iss`, `sub`, `jti` and `kid`: they go into audit rows and logs."""

MAX_JWKS: Final = 256 * 1024
"""Characters of a JWKS document, and with `MAX_JWKS_KEYS` far above what an issuer publishes while rotating."""
MAX_JWKS_KEYS: Final = 64

MAX_CACHED_TOKENS: Final = 4096
"""Verified tokens kept by default, about 1 KiB each."""

KEY_BYTES: Final = 32
"""An Ed25519 private or public key is 32 bytes (RFC 8032 §5.1.5)."""

JsonObject = dict[str, object]

Word = TypeVar("Word", bound=Enum)


class InvalidKeySet(ValueError):
    """The configured JWKS or keys cannot be used; the text says why and repeats no key."""


@dataclass(frozen=True, slots=True)
class OperatorPrincipal:
    """An operator whose token was accepted. `tenant_claim` still has to be resolved to a tenant by the caller."""

    subject: str
    tenant_claim: str
    """A tenant's id (UUID) or slug, 1–128 printable characters without white space."""
    role: Role
    permissions: frozenset[Permission]
    """As listed in the token; ask `permissions.allows`, which knows what the role grants and what is implied."""
    issuer: str
    expires_at: datetime
    """The token's `exp`, UTC. Duty of the caller: end a stream that was opened with this token by then."""
    token_id: str | None
    """The token's `jti` where it has one, for the audit."""


@dataclass(frozen=True, slots=True)
class IssuerPublicKey:
    """An Ed25519 public key; `raw` is its 32 bytes."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != KEY_BYTES:
            raise InvalidKeySet(f"an Ed25519 public key has {KEY_BYTES} bytes, not {len(self.raw)}")


@dataclass(frozen=True, slots=True)
class JwksKey:
    """A key of somebody else's issuer, from a JWKS; `kid` is None where the JWKS gives none."""

    kid: str | None
    key: IssuerPublicKey


class IssuerKey:
    """Our own signing key. Its repr shows the `kid` only."""

    __slots__ = ("_private", "kid", "public")

    kid: Final[str]
    """The RFC 7638 thumbprint of the public key; a natural `kid` for `mint` and `OperatorVerifier`."""
    public: Final[IssuerPublicKey]

    def __init__(self, seed: bytes) -> None:
        """The key whose RFC 8032 private key is `seed`, 32 bytes; ValueError for any other length."""
        if len(seed) != KEY_BYTES:
            raise ValueError(f"an Ed25519 private key has {KEY_BYTES} bytes, not {len(seed)}")
        self._private = OKPKey.import_key(Ed25519PrivateKey.from_private_bytes(seed))
        self.kid = self._private.thumbprint()
        self.public = IssuerPublicKey(self._private.public_key.public_bytes_raw())

    @classmethod
    def generate(cls, random: RandomBytes = secrets.token_bytes) -> IssuerKey:
        """A new key from 32 bytes of `random`."""
        return cls(random(KEY_BYTES))

    @classmethod
    def from_bytes(cls, sealed: Secret[bytes]) -> IssuerKey:
        """The key that `to_bytes` gave; ValueError when it does not have 32 bytes."""
        return cls(sealed.reveal())

    def to_bytes(self) -> Secret[bytes]:
        """The 32 raw bytes, for sealing."""
        private = self._private.private_key
        assert isinstance(private, Ed25519PrivateKey)
        return Secret(private.private_bytes_raw())

    def sign(self, header: JsonObject, payload: bytes) -> str:
        """A compact JWS over `payload`; `header` must name one of the accepted `alg`s."""
        return jws.serialize_compact(header, payload, self._private, registry=_ED25519_ONLY)

    def __repr__(self) -> str:
        return f"IssuerKey(kid={self.kid!r})"


def mint(
    private_key: IssuerKey,
    kid: str,
    *,
    subject: str,
    tenant: str,
    role: Role,
    permissions: Iterable[Permission],
    now: datetime,
    ttl: timedelta = DEFAULT_TTL,
    issuer: str = OWN_ISSUER,
    token_id: str | None = None,
    max_ttl: timedelta = MAX_LIFETIME,
) -> str:
    """A token for an operator of `tenant` (id or slug), valid from `now` for `ttl`, in whole seconds.

    `kid` is the name under which verifiers know the key. InvalidArgument when `ttl` is under a second or over
    `max_ttl`, or when a verifier would refuse a name.
    """
    for field, value in {"subject": subject, "issuer": issuer, "kid": kid}.items():
        if not _is_name(value, MAX_NAME):
            raise InvalidArgument(f"{field} must have 1 to {MAX_NAME} printable characters", field=field)
    if token_id is not None and not _is_name(token_id, MAX_NAME):
        raise InvalidArgument(f"token_id must have 1 to {MAX_NAME} printable characters", field="token_id")
    if not _is_tenant(tenant):
        raise InvalidArgument(f"tenant must have 1 to {MAX_TENANT} printable characters without spaces", field="tenant")
    if not timedelta(seconds=1) <= ttl <= max_ttl:
        raise InvalidArgument(
            f"ttl is {ttl.total_seconds():g} s, allowed are 1 to {max_ttl.total_seconds():g} s", field="ttl"
        )
    issued_at = math.floor(_timestamp(now))
    claims: JsonObject = {
        "iss": issuer,
        "aud": AUDIENCE,
        "sub": subject,
        "tenant": tenant,
        "role": role.value,
        "permissions": sorted(permission.value for permission in frozenset(permissions)),
        "iat": issued_at,
        "exp": issued_at + math.floor(ttl.total_seconds()),
    }
    if token_id is not None:
        claims["jti"] = token_id
    header: JsonObject = {"alg": "EdDSA", "typ": "JWT", "kid": kid}
    return private_key.sign(header, json.dumps(claims, separators=(",", ":")).encode("ascii"))


def parse_jwks(text: str) -> tuple[JwksKey, ...]:
    """The Ed25519 verification keys of a JWKS document (RFC 7517 §5, RFC 8037 §2).

    Keys of another type or curve and keys for another use are passed over, as RFC 7517 §5 asks; real issuers publish
    RSA keys beside. InvalidKeySet when the document is malformed, when a `kid` occurs twice among all keys, when any
    key carries private members, or when no usable key is left.
    """
    if len(text) > MAX_JWKS:
        raise InvalidKeySet(f"the JWKS has {len(text)} characters, {MAX_JWKS} are allowed")
    try:
        document = _parse_object(text.encode("utf-8", "surrogatepass"))
    except _Malformed as error:
        raise InvalidKeySet(f"the JWKS is not a JSON object with unique members ({error})") from None
    entries = document.get("keys")
    if not isinstance(entries, list) or not entries:
        raise InvalidKeySet("the JWKS has no list `keys` with at least one key")
    if len(entries) > MAX_JWKS_KEYS:
        raise InvalidKeySet(f"the JWKS has {len(entries)} keys, {MAX_JWKS_KEYS} are allowed")

    usable: list[JwksKey] = []
    kids: set[str] = set()
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise InvalidKeySet(f"key {position} of the JWKS is not an object")
        if private := sorted(_PRIVATE_JWK_MEMBERS & entry.keys()):
            raise InvalidKeySet(
                f"key {position} of the JWKS carries the private member {private[0]!r}; "
                "configure public keys only, and treat this key as disclosed"
            )
        kid = entry.get("kid")
        if kid is not None:
            if not _is_name(kid, MAX_NAME):
                raise InvalidKeySet(f"key {position} of the JWKS has a `kid` that is no printable text")
            if kid in kids:
                raise InvalidKeySet(f"the `kid` of key {position} of the JWKS occurs twice")
            kids.add(kid)
        if _is_for_verifying_with_ed25519(entry):
            usable.append(JwksKey(kid, _jwk_public_key(entry, position)))
    if not usable:
        raise InvalidKeySet("the JWKS has no Ed25519 key for signatures (kty OKP, crv Ed25519, use sig)")
    return tuple(usable)


class OperatorVerifier:
    """Turns the text of a token into an `OperatorPrincipal`, or refuses."""

    __slots__ = (
        "_accepted_issuers",
        "_audience",
        "_cache",
        "_foreign_keys",
        "_leeway",
        "_max_cached",
        "_max_lifetime",
        "_own_issuer",
        "_own_keys",
    )

    def __init__(
        self,
        own_keys: Mapping[str, IssuerPublicKey],
        jwks: Iterable[JwksKey] = (),
        *,
        audience: str = AUDIENCE,
        own_issuer: str = OWN_ISSUER,
        accepted_issuers: frozenset[str] | None = None,
        leeway_seconds: float = LEEWAY_SECONDS,
        max_lifetime: timedelta = MAX_LIFETIME,
        max_cached: int = MAX_CACHED_TOKENS,
    ) -> None:
        """`own_keys` by their `kid` vouch for `own_issuer` alone; `jwks` keys for `accepted_issuers` (None: any other).

        `leeway_seconds` >= 0, `max_lifetime` > 0, `max_cached` >= 0 (0: no cache), else ValueError. InvalidKeySet for
        a `kid` given twice in `jwks` or for an `accepted_issuers` that names `own_issuer`.
        """
        if accepted_issuers is not None and own_issuer in accepted_issuers:
            raise InvalidKeySet(f"the issuer {own_issuer!r} is our own; a JWKS cannot vouch for it")
        if not (leeway_seconds >= 0 and max_cached >= 0 and max_lifetime > timedelta()):
            raise ValueError("leeway_seconds and max_cached must not be negative, max_lifetime must be positive")
        self._own_keys = _KeyTable((kid, key) for kid, key in own_keys.items())
        self._foreign_keys = _KeyTable((entry.kid, entry.key) for entry in jwks)
        self._audience = audience
        self._own_issuer = own_issuer
        self._accepted_issuers = accepted_issuers
        self._leeway = leeway_seconds
        self._max_lifetime = max_lifetime.total_seconds()
        self._max_cached = max_cached
        self._cache: OrderedDict[bytes, _Verified] = OrderedDict()

    def verify(self, token: str, now: datetime) -> OperatorPrincipal:
        """The operator whom `token` proves at `now` (aware); Unauthenticated for every token that is not accepted.

        ValueError when `now` is naive, which is our bug and not the caller's.
        """
        at = _timestamp(now)
        if len(token) > MAX_TOKEN:
            raise Unauthenticated("token too long")
        try:
            text = token.encode("ascii")
        except UnicodeEncodeError:
            raise Unauthenticated("token is not ASCII") from None

        fingerprint = hashlib.sha256(text).digest()
        known = self._cache.get(fingerprint)
        if known is not None:
            self._cache.move_to_end(fingerprint)
            return self._in_time(known, at, fingerprint)
        verified = self._verify_all_but_time(token)
        principal = self._in_time(verified, at, fingerprint)
        self._remember(fingerprint, verified)
        return principal

    def _in_time(self, verified: _Verified, at: float, fingerprint: bytes) -> OperatorPrincipal:
        if at >= verified.valid_until:
            self._cache.pop(fingerprint, None)
            raise Unauthenticated("token expired")
        if at < verified.valid_from:
            raise Unauthenticated("token not valid yet, or expires too far in the future")
        return verified.principal

    def _remember(self, fingerprint: bytes, verified: _Verified) -> None:
        self._cache[fingerprint] = verified
        if len(self._cache) > self._max_cached:
            self._cache.popitem(last=False)

    def _verify_all_but_time(self, token: str) -> _Verified:
        try:
            header, claims = _parse_token(token)
            _check_header(header)
            key = self._key_for(header, claims)
            _check_signature(token, key)
            return self._read_claims(claims)
        except _Malformed as error:
            raise Unauthenticated(str(error)) from None

    def _key_for(self, header: JsonObject, claims: JsonObject) -> OKPKey:
        # The issuer is not proven yet. It only picks the table whose keys may prove it.
        issuer = _name(claims, "iss", MAX_NAME)
        if issuer == self._own_issuer:
            return self._own_keys.find(header)
        if self._accepted_issuers is not None and issuer not in self._accepted_issuers:
            raise _Malformed("issuer not accepted")
        return self._foreign_keys.find(header)

    def _read_claims(self, claims: JsonObject) -> _Verified:
        # RFC 7519 §4.1.3 lets `aud` be a list. One that names others too is a token those others could replay here.
        if claims.get("aud") not in (self._audience, [self._audience]):
            raise _Malformed("wrong audience")
        expires = _numeric_date(claims, "exp")
        if expires is None:
            raise _Malformed("exp missing")
        issued = _numeric_date(claims, "iat")
        not_before = _numeric_date(claims, "nbf")
        if issued is not None and not 0 < expires - issued <= self._max_lifetime:
            raise _Malformed("lifetime is not positive, or too long")
        starts = (when for when in (issued, not_before, expires - self._max_lifetime) if when is not None)
        token_id = _name(claims, "jti", MAX_NAME) if "jti" in claims else None
        principal = OperatorPrincipal(
            subject=_name(claims, "sub", MAX_NAME),
            tenant_claim=_tenant(claims),
            role=_role(claims),
            permissions=_permissions(claims),
            issuer=_name(claims, "iss", MAX_NAME),
            expires_at=datetime.fromtimestamp(expires, UTC),
            token_id=token_id,
        )
        return _Verified(principal, valid_from=max(starts) - self._leeway, valid_until=expires + self._leeway)


class _Malformed(Exception):
    """A gate refused; the text is the reason for the operator's log. Leaves this file as another error, always."""


@dataclass(frozen=True, slots=True)
class _Verified:
    """A token that time alone can still refuse: accepted while valid_from <= now < valid_until (POSIX seconds)."""

    principal: OperatorPrincipal
    valid_from: float
    valid_until: float


class _KeyTable:
    """The keys that may vouch for one side (ours, or the JWKS'), by `kid`."""

    __slots__ = ("_all", "_by_kid")

    def __init__(self, keys: Iterable[tuple[str | None, IssuerPublicKey]]) -> None:
        self._all: list[OKPKey] = []
        self._by_kid: dict[str, OKPKey] = {}
        for kid, public in keys:
            key = OKPKey.import_key({"kty": "OKP", "crv": "Ed25519", "x": _encode(public.raw)})
            self._all.append(key)
            if kid is None:
                continue
            if kid in self._by_kid:
                raise InvalidKeySet(f"the kid {kid!a} occurs twice")
            self._by_kid[kid] = key

    def find(self, header: JsonObject) -> OKPKey:
        if "kid" not in header:
            if len(self._all) != 1:
                raise _Malformed("no kid, and not exactly one key that fits")
            return self._all[0]
        key = self._by_kid.get(_name(header, "kid", MAX_NAME))
        if key is None:
            raise _Malformed("kid unknown for this issuer")
        return key


class _Ed25519Only(jws.JWSRegistry):
    """Both names of the one algorithm: `EdDSA` (RFC 8037 §3.1) and, fully specified, `Ed25519` (RFC 9864 §2.2).

    joserfc's own `EdDSA` would accept Ed448 keys, and warns on every use; here both names mean Ed25519.
    """

    algorithms = dict.fromkeys(("EdDSA", "Ed25519"), jws.JWSRegistry.algorithms["Ed25519"])
    max_header_length = MAX_TOKEN
    max_payload_length = MAX_TOKEN

    def __init__(self) -> None:
        # Unknown header members are to be ignored (RFC 7515 §4); the dangerous ones were refused before.
        super().__init__(algorithms=list(self.algorithms), strict_check_header=False)


_ED25519_ONLY: Final = _Ed25519Only()

_SEGMENT = re.compile(r"[A-Za-z0-9_-]+")

_TYPES: Final = frozenset({"jwt", "application/jwt", "at+jwt", "application/at+jwt"})
"""What `typ` may say, in lower case (RFC 7519 §5.1, RFC 9068 §2.1); other kinds of JWT mean something else
(RFC 8725 §3.11)."""

_REFUSED_HEADERS: Final = frozenset({"jku", "jwk", "x5u", "x5c", "crit", "b64", "zip", "enc", "cty"})
"""Members that bring a key (RFC 7515 §4.1.2–6), change what is signed (`crit` §4.1.11, `b64` RFC 7797), or speak of
compression, encryption or nesting (RFC 7516, RFC 7519 §5.2)."""

_PRIVATE_JWK_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
"""RFC 7518 §6.2.2, §6.3.2, §6.4 and RFC 8037 §2."""


def _parse_token(token: str) -> tuple[JsonObject, JsonObject]:
    """Header and claims of a compact JWS, nothing about them trusted yet; _Malformed when it is none."""
    segments = token.split(".")
    if len(segments) != 3:
        raise _Malformed("not three segments")
    header, claims, signature = segments
    _decode(signature)
    return _parse_object(_decode(header)), _parse_object(_decode(claims))


def _check_header(header: JsonObject) -> None:
    if header.get("alg") not in ("EdDSA", "Ed25519"):
        raise _Malformed("alg is not EdDSA or Ed25519")
    if not _REFUSED_HEADERS.isdisjoint(header):
        raise _Malformed("header carries a refused member")
    kind = header.get("typ", "JWT")
    if not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise _Malformed("typ is not JWT or at+jwt")


def _check_signature(token: str, key: OKPKey) -> None:
    try:
        jws.deserialize_compact(token, key, registry=_ED25519_ONLY)
    except (JoseError, ValueError):
        raise _Malformed("signature does not verify") from None


def _parse_object(text: bytes) -> JsonObject:
    """A JSON object in UTF-8 whose members are unique at every depth, without NaN; _Malformed for all else."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # broken UTF-8 is a ValueError; deep nesting ends the recursion
        raise _Malformed("not JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise _Malformed("not a JSON object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> JsonObject:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Malformed("duplicate JSON members")
    return members


def _no_constant(_: str) -> NoReturn:
    raise _Malformed("NaN or Infinity is not JSON")


def _decode(segment: str) -> bytes:
    """Canonical base64url without padding (RFC 7515 §2, RFC 4648 §3.5); _Malformed for every other spelling."""
    if _SEGMENT.fullmatch(segment) is None or len(segment) % 4 == 1:
        raise _Malformed("not base64url")
    raw = base64.urlsafe_b64decode(segment + "=" * (-len(segment) % 4))
    if _encode(raw) != segment:
        raise _Malformed("base64url is not canonical")
    return raw


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _is_for_verifying_with_ed25519(jwk: JsonObject) -> bool:
    operations = jwk.get("key_ops", ["verify"])
    return (
        jwk.get("kty") == "OKP"
        and jwk.get("crv") == "Ed25519"
        and jwk.get("use", "sig") == "sig"
        and jwk.get("alg", "EdDSA") in ("EdDSA", "Ed25519")
        and isinstance(operations, list)
        and "verify" in operations
    )


def _jwk_public_key(jwk: JsonObject, position: int) -> IssuerPublicKey:
    x = jwk.get("x")
    try:
        return IssuerPublicKey(_decode(x if isinstance(x, str) else ""))
    except (_Malformed, InvalidKeySet):
        raise InvalidKeySet(f"key {position} of the JWKS has no `x` of {KEY_BYTES} bytes in base64url") from None


def _numeric_date(claims: JsonObject, name: str) -> float | None:
    """A NumericDate (RFC 7519 §2) in POSIX seconds, None when absent; within years that datetime can express."""
    if name not in claims:
        return None
    value = claims[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Malformed(f"{name} is not a number")
    if not 0 <= value < _YEAR_9000:  # also false for NaN and infinities
        raise _Malformed(f"{name} is out of range")
    return float(value)


_YEAR_9000: Final = 221_845_392_000


def _name(members: JsonObject, name: str, longest: int) -> str:
    value = members.get(name)
    if not isinstance(value, str) or not _is_name(value, longest):
        raise _Malformed(f"{name} is not a text of 1 to {longest} printable characters")
    return value


def _tenant(claims: JsonObject) -> str:
    value = claims.get("tenant")
    if not isinstance(value, str) or not _is_tenant(value):
        raise _Malformed(f"tenant is not a text of 1 to {MAX_TENANT} printable characters without spaces")
    return value


def _role(claims: JsonObject) -> Role:
    return _known(Role, claims.get("role"), "role unknown")


def _permissions(claims: JsonObject) -> frozenset[Permission]:
    listed = claims.get("permissions", [])
    if not isinstance(listed, list):
        raise _Malformed("permissions is not a list")
    return frozenset(_known(Permission, each, "permission unknown") for each in listed)


def _known(kind: type[Word], word: object, refusal: str) -> Word:
    try:
        return kind(word)
    except ValueError:
        raise _Malformed(refusal) from None


def _is_tenant(text: str) -> bool:
    return _is_name(text, MAX_TENANT) and not any(character.isspace() for character in text)


def _is_name(text: object, longest: int) -> bool:
    """Printable in Python's sense: no control, format or surrogate characters, no white space but the space."""
    return isinstance(text, str) and 1 <= len(text) <= longest and text.isprintable()


def _timestamp(now: datetime) -> float:
    if now.tzinfo is None:
        raise ValueError("now must be an aware datetime")
    return now.timestamp()
