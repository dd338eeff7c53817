"""The core as the adapters see it: one bundle of services, put together by edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from registry.certificates import Certificates, ForeignCertificates
from registry.children import Children
from registry.claim_psk import ClaimPsks
from registry.commands import Commands
from registry.credentials import Credentials
from registry.device_config import DeviceConfigs
from registry.devices import Devices
from registry.enrolment import Enrolment
from registry.event_log import EventLog
from registry.feed import Feed
from registry.key_claim import KeyClaim
from registry.kick import Kick
from registry.node import Node
from registry.operators import OperatorVerifier
from registry.presence import Presence
from registry.profiles import Profiles
from registry.refusals import Refusals
from registry.registration_tokens import RegistrationTokens
from registry.resolver import Resolver
from registry.revocation_lists import RevocationLists
from registry.sessions import SessionTable
from registry.templates import Templates
from registry.tenants import Tenants
from registry.uplinks import Uplinks


@dataclass(frozen=True, slots=True)
class Registry:
    """Every service of one node. Adapters take it whole and call what their routes need."""

    tenants: Tenants
    operators: OperatorVerifier
    profiles: Profiles
    devices: Devices
    credentials: Credentials
    templates: Templates
    key_claim: KeyClaim
    claim_psks: ClaimPsks
    registration_tokens: RegistrationTokens
    certificates: Certificates
    foreign_certificates: ForeignCertificates
    enrolment: Enrolment
    revocation_lists: RevocationLists
    resolver: Resolver
    sessions: SessionTable
    uplinks: Uplinks
    commands: Commands
    device_configs: DeviceConfigs
    children: Children
    presence: Presence
    event_log: EventLog
    kick: Kick
    node: Node
    feed: Feed
    refusals: Refusals
    clock: Callable[[], datetime]
