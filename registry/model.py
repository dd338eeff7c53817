"""The core's values: who is who, and what they may hold. All frozen; ids are distinct types.

    tenant ── device_profile
        └──── device ── credential (api_key | psk | x509)
                 │           └── session (while a peer is connected with it)
                 └── gateway_id → device (its parent)

A device has one active credential *type*; during a rotation's overlap two credentials of it may be valid (CONTRACT §2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Any, NewType
from uuid import UUID

import msgspec

TenantId = NewType("TenantId", UUID)
DeviceId = NewType("DeviceId", UUID)
CredentialId = NewType("CredentialId", UUID)
SessionId = NewType("SessionId", UUID)
UplinkId = NewType("UplinkId", UUID)
CommandId = NewType("CommandId", UUID)
ProfileId = NewType("ProfileId", str)
TemplateId = NewType("TemplateId", str)
NodeId = NewType("NodeId", str)
Fingerprint = NewType("Fingerprint", str)
"""SHA-256 of a certificate's DER, 64 lower-case hexadecimal digits (seed 003)."""

Json = Any
"""A decoded JSON value; it stays opaque to the core."""


class DeviceStatus(Enum):
    """CONTRACT §2. The last four are seed 004's; `registered` is one whose credential was issued and never seen."""

    PENDING = "pending"
    REGISTERED = "registered"
    ACTIVE = "active"
    INACTIVE = "inactive"
    MAINTENANCE = "maintenance"
    OFFLINE = "offline"


class CredentialKind(Enum):
    """The three ways to authenticate (seed 003)."""

    API_KEY = "api_key"
    PSK = "psk"
    X509 = "x509"


class AnchorMode(Enum):
    """Blockchain anchoring mode (seed 002). Gatehouse keeps and hands it on; it anchors nothing itself."""

    MERKLE_BATCH = "ANCHOR_MODE_MERKLE_BATCH"
    PER_EVENT = "ANCHOR_MODE_PER_EVENT"
    HASH_CHAIN = "ANCHOR_MODE_HASH_CHAIN"


class TemplateStatus(Enum):
    """A provisioning template takes claims only while it is active."""

    ACTIVE = "active"
    DISABLED = "disabled"
    USED = "used"


class Transport(Enum):
    """How a peer reached us."""

    HTTPS = "https"
    MQTT = "mqtt"
    COAP = "coap"
    LWM2M = "lwm2m"


@dataclass(frozen=True, slots=True)
class Actor:
    """Who does something, for the audit and the events, and the id that joins them with the log and the answer.

    `name` is `operator:<sub>`, `device:<device_id>`, `template:<template_id>` or `system:<part>`.
    """

    name: str
    correlation_id: str


@dataclass(frozen=True, slots=True)
class Tenant:
    """An organisation; everything else belongs to exactly one."""

    tenant_id: TenantId
    slug: str
    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What devices of one type have in common; devices inherit from it where they say nothing themselves."""

    tenant_id: TenantId
    profile_id: ProfileId
    name: str
    description: str
    tags: Mapping[str, str]
    config: Mapping[str, Json]
    anchor_mode: AnchorMode | None
    components: list[Json]
    telemetry_schema: Mapping[str, Json]
    writable_fields: list[str]
    topic_grants: list[Json]
    allow_short_psk: bool
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Device:
    """A device record with every field of seed 002."""

    tenant_id: TenantId
    device_id: DeviceId
    hardware_id: str | None
    name: str
    status: DeviceStatus
    groups: list[str]
    tags: Mapping[str, str]
    anchor_mode: AnchorMode
    profile_id: ProfileId | None
    site_id: str | None
    gateway_id: DeviceId | None
    firmware: str | None
    meta: Mapping[str, Json]
    config: Mapping[str, Json]
    credential_type: CredentialKind
    template_id: TemplateId | None
    created_at: datetime
    updated_at: datetime
    activated_at: datetime | None
    last_seen_at: datetime | None


@dataclass(frozen=True, slots=True)
class Credential:
    """A credential as an operator may see it: no secret, no hash."""

    tenant_id: TenantId
    device_id: DeviceId
    credential_id: CredentialId
    kind: CredentialKind
    label: str
    detail: Mapping[str, Json]
    identity: str | None
    """The PSK identity, for a PSK."""
    fingerprint: Fingerprint | None
    """SHA-256 of the DER, for a certificate."""
    not_before: datetime | None
    expires_at: datetime | None
    superseded_by: CredentialId | None
    retire_on_use: bool
    revoked_at: datetime | None
    revoked_reason: str | None
    created_at: datetime
    first_used_at: datetime | None


@dataclass(frozen=True, slots=True)
class Template:
    """A provisioning template (seed 001) without its key, which was shown once."""

    tenant_id: TenantId
    template_id: TemplateId
    name: str
    profile_id: ProfileId | None
    hardware_id_pattern: str | None
    expires_at: datetime | None
    one_time: bool
    max_claims: int | None
    claims: int
    credential_type: CredentialKind
    default_groups: list[str]
    status: TemplateStatus
    created_by: str
    created_at: datetime
    updated_at: datetime


# Evidence: what a protocol machine found in its bytes. It claims; the resolver decides.


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A presented API key, hashed at the border (`secrets.digest`), so that the raw text goes no further."""

    digest: bytes
    device_id: str | None = None
    """The device it was presented for, where the protocol names one (MQTT user name); must then match."""


@dataclass(frozen=True, slots=True)
class PskIdentity:
    """The identity of a PSK handshake, still unproved."""

    identity: bytes


@dataclass(frozen=True, slots=True)
class ClientCertificate:
    """The peer's certificate, whose private key the TLS handshake has proved."""

    der: bytes


Evidence = ApiKey | PskIdentity | ClientCertificate


class Contact(msgspec.Struct, frozen=True, gc=False):
    """Where evidence came from; for the operator's log and the session table.

    Every admission makes one, and two identities. So both are structs, for a tenth of a frozen dataclass's cost.
    """

    transport: Transport
    peer: str
    correlation_id: str


class Identity(msgspec.Struct, frozen=True, gc=False):
    """An admitted device. Only the resolver makes one, and only this opens a session (DESIGN, the funnel, 4)."""

    tenant_id: TenantId
    device_id: DeviceId
    credential_id: CredentialId
    credential_kind: CredentialKind
    gateway_id: DeviceId | None
    """The parent gateway, for a child device."""
    expires_at: datetime | None
    """When the credential stops being valid by itself; the session ends with it."""


@dataclass(frozen=True, slots=True)
class RenewalRight:
    """The right of a certificate's holder to ask for its successor, and nothing else: it opens no session.

    Only the resolver makes one (`admit_for_renewal`). `in_grace`: the certificate has expired, but recently.
    """

    tenant_id: TenantId
    device_id: DeviceId
    credential_id: CredentialId
    in_grace: bool


@dataclass(frozen=True, slots=True)
class ClosedSession:
    """One line of a revocation's receipt (CONTRACT §2)."""

    session_id: SessionId
    transport: Transport
    node_id: NodeId
    closed_after_ms: float
    """Milliseconds from the revocation (its `revoked_at`) to the closed transport."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a revocation did. `remaining` counts the sessions that no node has confirmed as closed."""

    credential_id: CredentialId | None
    device_id: DeviceId | None
    revoked_at: datetime
    sessions: list[ClosedSession] = field(default_factory=list)
    remaining: int = 0
