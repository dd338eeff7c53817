"""The core as the adapters see it: one bundle of services, put together by edge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from registry.credentials import Credentials
from registry.devices import Devices
from registry.event_log import EventLog
from registry.feed import Feed
from registry.key_claim import KeyClaim
from registry.kick import Kick
from registry.node import Node
from registry.operators import OperatorVerifier
from registry.profiles import Profiles
from registry.refusals import Refusals
from registry.resolver import Resolver
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
    resolver: Resolver
    sessions: SessionTable
    uplinks: Uplinks
    event_log: EventLog
    kick: Kick
    node: Node
    feed: Feed
    refusals: Refusals
    ca_chain_pem: Callable[[], bytes]
    clock: Callable[[], datetime]
