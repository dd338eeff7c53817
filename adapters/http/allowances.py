"""How often somebody may ask: token buckets per tenant, per credential or operator, and per address.

    a device      its credential's, then its tenant's
    an operator   its own, then that of its tenant's operators: a flood of devices must not keep out who can stop it
    nobody yet    its address's

A refusal takes nothing, from no bucket, and tells when to come back.

Failed authentications are counted against the address, and only they. Whoever fails too often is told to slow down
instead of being told `UNAUTHENTICATED` again; from then on a credential that this node does not remember is looked up
only `LOOK_UPS_PER_FAILURE` times as often as failures are allowed, for all of the address together. What is remembered
and what has a session is not disturbed; a good credential that is neither gets in behind the same NAT within some
tries. Keys have 256 bits; this is about load, not about guessing.

The buckets are this node's memory (registry/rate_limits.py): bounded, lost on restart, not shared with other nodes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final

from adapters.tls.admission import address_block
from registry.errors import ResourceExhausted
from registry.rate_limits import RateLimiter

LOOK_UPS_PER_FAILURE: Final = 10
"""A look-up of a credential is one row of a batched query, a refusal leaves an entry as well."""


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
        operator_tenant: RateLimiter,
        operator: RateLimiter,
        provisioning: RateLimiter,
        address: RateLimiter,
        failures: RateLimiter,
        look_ups: RateLimiter,
    ) -> None:
        self._tenant = tenant
        self._credential = credential
        self._operator_tenant = operator_tenant
        self._operator = operator
        self._provisioning = provisioning
        self._address = address
        self._failures = failures
        self._look_ups = look_ups
        self.counters = AllowanceCounters()

    def spend(self, tenant: Hashable, holder: Hashable, now: float) -> None:
        """One request of a device; `holder` is its credential. `now` is loop time."""
        wait = self._credential.take(holder, now)
        if wait is not None:
            self.counters.credential += 1
            raise ResourceExhausted("this credential has sent too many requests", retry_after=wait)
        wait = self._tenant.take(tenant, now)
        if wait is not None:
            self._credential.give_back(holder)
            self.counters.tenant += 1
            raise ResourceExhausted("this tenant's devices have sent too many requests", retry_after=wait)

    def spend_operator(self, tenant: Hashable, name: str, now: float) -> None:
        """One request of an operator. `now` is loop time."""
        wait = self._operator.take((tenant, name), now)
        if wait is not None:
            self.counters.credential += 1
            raise ResourceExhausted("this operator has sent too many requests", retry_after=wait)
        wait = self._operator_tenant.take(tenant, now)
        if wait is not None:
            self._operator.give_back((tenant, name))
            self.counters.tenant += 1
            raise ResourceExhausted("this tenant's operators have sent too many requests", retry_after=wait)

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

    def spend_look_up(self, address: str) -> None:
        """One look-up of a credential that this node does not remember; free until its address has failed too often."""
        block, now = address_block(address), asyncio.get_running_loop().time()
        if self._failures.wait(block, now) is None:
            return
        wait = self._look_ups.take(block, now)
        if wait is not None:
            self.counters.failures += 1
            raise ResourceExhausted("this address has failed to authenticate too often", retry_after=wait)

    def spend_failure(self, address: str) -> None:
        """One failed authentication."""
        wait = self._failures.take(address_block(address), asyncio.get_running_loop().time())
        if wait is not None:
            self.counters.failures += 1
            raise ResourceExhausted("this address has failed to authenticate too often", retry_after=wait)
