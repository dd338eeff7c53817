"""How often somebody may ask: token buckets per tenant, per credential or operator, and per address.

An authenticated request takes from its tenant's bucket and from its own; an unauthenticated one from its address's. A
refusal takes nothing and tells when to come back. Failed authentications are counted against the address, and only
they: whoever fails too often is told to slow down instead of being told `UNAUTHENTICATED` again, while a device behind
the same NAT with a good credential is not disturbed. Keys have 256 bits; this is about load, not about guessing.

The buckets are this node's memory (registry/rate_limits.py): bounded, lost on restart, not shared with other nodes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass

from adapters.tls.admission import address_block
from registry.errors import ResourceExhausted
from registry.rate_limits import RateLimiter


@dataclass(slots=True)
class AllowanceCounters:
    """How often each limit was hit, for the metrics."""

    tenant: int = 0
    credential: int = 0
    address: int = 0
    provisioning: int = 0
    failures: int = 0
    body: int = 0
    """Bodies that were larger than their operation takes."""


class Allowances:
    """The limits of one node. Every method raises ResourceExhausted when there is nothing left."""

    def __init__(
        self,
        *,
        tenant: RateLimiter,
        credential: RateLimiter,
        provisioning: RateLimiter,
        address: RateLimiter,
        failures: RateLimiter,
    ) -> None:
        self._tenant = tenant
        self._credential = credential
        self._provisioning = provisioning
        self._address = address
        self._failures = failures
        self.counters = AllowanceCounters()

    def spend(self, tenant: Hashable, holder: Hashable, now: float) -> None:
        """One request of an authenticated caller; `holder` is its credential or its name. `now` is loop time."""
        wait = self._credential.take(holder, now)
        if wait is not None:
            self.counters.credential += 1
            raise ResourceExhausted("this credential has sent too many requests", retry_after=wait)
        wait = self._tenant.take(tenant, now)
        if wait is not None:
            self.counters.tenant += 1
            raise ResourceExhausted("this tenant has sent too many requests", retry_after=wait)

    def spend_open(self, address: str) -> None:
        """One request that needs no authentication."""
        wait = self._address.take(address_block(address), asyncio.get_running_loop().time())
        if wait is not None:
            self.counters.address += 1
            raise ResourceExhausted("this address has sent too many requests", retry_after=wait)

    def spend_provisioning(self, address: str) -> None:
        """One attempt to provision, good or bad."""
        wait = self._provisioning.take(address_block(address), asyncio.get_running_loop().time())
        if wait is not None:
            self.counters.provisioning += 1
            raise ResourceExhausted("this address has sent too many provisioning attempts", retry_after=wait)

    def spend_failure(self, address: str) -> None:
        """One failed authentication."""
        wait = self._failures.take(address_block(address), asyncio.get_running_loop().time())
        if wait is not None:
            self.counters.failures += 1
            raise ResourceExhausted("this address has failed to authenticate too often", retry_after=wait)
