"""The program that the group commit is measured against: `gatehouse`, with another way to store uplinks.

    python -m tests.bench.rivals one-insert serve …     each uplink is a statement of its own, and its own commit
    python -m tests.bench.rivals naive serve …          the same, after a look-up of the caller's credential

Everything before and after the storing is the product's: TLS, HTTP, authentication, session, checks, the pool of
connections and its size. A rival stores the same rows as the product does for the same uplink. That it exists here and
not as a setting is on purpose: nobody should be able to configure it.

The statements are the plainest that do it, one row of literal parameters each, and cheaper than the product's with a
batch of one would be. Nothing is retried and no message id is honoured, which favours the rival.
"""

from __future__ import annotations

import asyncio
import sys

import edge.wiring
from edge.cli import main
from registry.payloads import NewUplink
from registry.storage.uplinks import new_ids
from registry.uplinks import StoredUplink, Uplinks

_UPLINK = """
INSERT INTO uplink (uplink_id, tenant_id, device_id, kind, payload, message_id, observed_at, received_at,
                    transport, via)
VALUES ($1, $2, $3, $4, $5::text::json, $6, $7, now(), $8, $9)
"""
_UPLINK_AND_READING = f"""
WITH stored AS ({_UPLINK})
INSERT INTO reading (tenant_id, device_id, component, sensor, observed_at, received_at, uplink_id, ordinal, number)
VALUES ($2, $3, $10, $11, coalesce($7, now()), now(), $1, 0, $12)
"""  # the statement above
_CREDENTIAL = """
SELECT c.credential_id, c.expires_at, d.status
FROM credential c JOIN device d ON d.tenant_id = c.tenant_id AND d.device_id = c.device_id
WHERE c.tenant_id = $1 AND c.device_id = $2 AND c.revoked_at IS NULL
"""


class OneInsertEach(Uplinks):
    """Stores each uplink by itself; knows uplinks with at most one reading, a double, as the benchmark sends them."""

    looks_up = False

    def submit(self, uplink: NewUplink) -> asyncio.Future[StoredUplink]:
        """The future is done when the uplink is committed, or has the error."""
        return asyncio.get_running_loop().create_task(self._insert(uplink))

    async def _insert(self, uplink: NewUplink) -> StoredUplink:
        (uplink_id,) = new_ids(1, int(self._clock() * 1000), self._random)
        row = (
            uplink_id,
            uplink.tenant_id,
            uplink.device_id,
            uplink.kind,
            uplink.payload,
            uplink.message_id,
            uplink.observed_at,
            uplink.transport.value,
            uplink.via,
        )
        async with self._database.connection() as connection:
            if self.looks_up:
                await connection.fetchrow(_CREDENTIAL, uplink.tenant_id, uplink.device_id)
            if uplink.readings:
                (reading,) = uplink.readings
                await connection.execute(
                    _UPLINK_AND_READING, *row, reading.component, reading.sensor, float(reading.value)
                )
            else:
                await connection.execute(_UPLINK, *row)
        return StoredUplink(uplink_id, False)


class Naive(OneInsertEach):
    """And asks the database who is calling, each time."""

    looks_up = True


if __name__ == "__main__":
    # What wiring builds in the product's place.
    setattr(edge.wiring, "Uplinks", {"one-insert": OneInsertEach, "naive": Naive}[sys.argv.pop(1)])  # noqa: B010
    main()
