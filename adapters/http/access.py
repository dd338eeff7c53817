"""Who may do what over HTTP: one line per operation. What has no line is refused.

    OPEN          anybody; counted per address
    CLAIM         anybody with a secret that provisions, which the operation judges; attempts are counted per address
    ENROLMENT     the same with the secret as HTTP Basic's password
    RENEWAL       a device with its own certificate, also for some days after the certificate's end
    DEVICE        a device with its own credential
    a Permission  an operator whose role or token holds it, in its own tenant (registry/permissions.py)
    DeviceOr      either of these two

A tested table (tests/integration/test_http_api_access.py walks it): a new operation without a line fails every request
with PERMISSION_DENIED, not with an open door.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final

from registry.permissions import Permission


class Public(Enum):
    """Access that no operator's permission gives."""

    OPEN = "open"
    CLAIM = "claim"
    ENROLMENT = "enrolment"
    RENEWAL = "renewal"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class DeviceOr:
    """A device with its own credential, or an operator who holds the permission."""

    permission: Permission


Access = Public | Permission | DeviceOr

ACCESS: Final[Mapping[str, Access]] = MappingProxyType(
    {
        "Provision": Public.CLAIM,
        "ProvisionDevice": Public.CLAIM,
        "EstSimpleEnroll": Public.ENROLMENT,
        "EstSimpleReenroll": Public.RENEWAL,
        "EstCaCerts": Public.OPEN,
        "EstCsrAttrs": Public.OPEN,
        "GetCaChain": Public.OPEN,
        "GetCaCrl": Public.OPEN,
        "GetOpenApi": Public.OPEN,
        "GetDocs": Public.OPEN,
        "GetDocsAsset": Public.OPEN,
        "SendUplink": Public.DEVICE,
        "SendTelemetry": Public.DEVICE,
        "AttachChild": Public.DEVICE,
        "NextCommand": Public.DEVICE,
        "AnswerCommand": Public.DEVICE,
        "ReportDeviceConfig": Public.DEVICE,
        "GetDeviceConfig": DeviceOr(Permission.DEVICES_READ),
        "PutDeviceConfig": Permission.DEVICES,
        "QueueCommand": Permission.DEVICES,
        "ListCommands": Permission.DEVICES_READ,
        "GetCommand": Permission.DEVICES_READ,
        "CancelCommand": Permission.DEVICES,
        "RegisterDevice": Permission.DEVICES,
        "ListDevices": Permission.DEVICES_READ,
        "SummarizeDevices": Permission.DEVICES_READ,
        "GetDevice": Permission.DEVICES_READ,
        "UpdateDevice": Permission.DEVICES,
        "DeleteDevice": Permission.DEVICES,
        "GetDeviceTimeline": Permission.EVENTS_READ,
        "ListUplinks": Permission.TELEMETRY_READ,
        "ListReadings": Permission.TELEMETRY_READ,
        "CreateRegistrationToken": Permission.DEVICES,
        "ListRegistrationTokens": Permission.DEVICES_READ,
        "RevokeRegistrationToken": Permission.DEVICES,
        "RegisterDeviceCert": Permission.DEVICES,
        "ListDeviceCerts": Permission.DEVICES_READ,
        "RevokeDeviceCert": Permission.DEVICES,
        "CreateApiKey": Permission.DEVICES,
        "CreatePsk": Permission.DEVICES,
        "ListCredentials": Permission.DEVICES_READ,
        "RotateCredential": Permission.DEVICES,
        "RevokeCredential": Permission.DEVICES,
        "CreateProfile": Permission.PROFILES,
        "ListProfiles": Permission.PROFILES_READ,
        "GetProfile": Permission.PROFILES_READ,
        "UpdateProfile": Permission.PROFILES,
        "DeleteProfile": Permission.PROFILES,
        "CreateTemplate": Permission.PROVISIONING,
        "ListTemplates": Permission.PROVISIONING_READ,
        "GetTemplate": Permission.PROVISIONING_READ,
        "UpdateTemplate": Permission.PROVISIONING,
        "DeleteTemplate": Permission.PROVISIONING,
        "ListTemplateDevices": Permission.PROVISIONING_READ,
        "RevokeTemplateDevices": Permission.PROVISIONING,
        "ListSessions": Permission.SESSIONS_READ,
        "KickSession": Permission.SESSIONS,
        "ListEvents": Permission.EVENTS_READ,
        "StreamEvents": Permission.EVENTS_READ,
        "ListAudit": Permission.AUDIT_READ,
    }
)
