"""The glue that a fleet writes beside mosquitto: a subscriber that stores each message in PostgreSQL.

    BENCH_DSN=… python -m tests.bench.mqtt_subscriber each|batched PORT

As somebody would write it who knows the trade: uvloop and asyncpg, one subscription with QoS 1 over plain TCP on the
same machine, a prepared statement, a pool of ten connections, as many messages under way as the broker gives, and
PUBACK only after the commit. `each` inserts each message by a statement of its own. `batched` inserts what waits, up to
a thousand messages, by one statement on one connection: the product's own idea. The row is the product's row of an
event. It says `ready` when it is subscribed.

What the glue does not do and the product does: check the payload and its sender, keep readings of telemetry, retry.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Final, Literal
from uuid import UUID

import asyncpg
import uvloop

from registry.storage.uplinks import new_ids

POOL: Final = 10
BATCH: Final = 1_000
IN_FLIGHT: Final = 1_000
"""Receive Maximum: what the broker may send without an acknowledgement."""
TENANT: Final = UUID(int=0xBE9C)
_INSERT: Final = """
INSERT INTO uplink (uplink_id, tenant_id, device_id, kind, payload, received_at, transport)
VALUES ($1, $2, $3, 'event', $4::text::json, now(), 'mqtt')
"""
_INSERT_MANY: Final = """
INSERT INTO uplink (uplink_id, tenant_id, device_id, kind, payload, received_at, transport)
SELECT u.uplink_id, $2, u.device_id, 'event', u.payload::json, now(), 'mqtt'
FROM unnest($1::uuid[], $3::uuid[], $4::text[]) AS u (uplink_id, device_id, payload)
"""
Message = tuple[str, str, bytes]
"""Device id, payload, and the PUBACK."""


class Subscriber(asyncio.Protocol):
    """The connection to the broker; puts messages in `queue`."""

    def __init__(self, queue: asyncio.Queue[Message]) -> None:
        self._queue = queue
        self._rest = b""
        self.transport: asyncio.Transport | None = None
        self.subscribed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's has the interface without the class
        limit = b"\x21" + IN_FLIGHT.to_bytes(2, "big")
        body = b"\x00\x04MQTT\x05\x02\x00\x00" + bytes((len(limit),)) + limit + b"\x00\x04glue"
        assert self.transport is not None
        self.transport.write(b"\x10" + bytes((len(body),)) + body)
        topic = b"devices/#"
        wanted = b"\x00\x01\x00" + len(topic).to_bytes(2, "big") + topic + b"\x01"
        self.transport.write(b"\x82" + bytes((len(wanted),)) + wanted)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.gone.done():
            self.gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while end - at >= 2:
            length, start = data[at + 1], at + 2
            if length & 0x80:  # a Variable Byte Integer of two bytes is enough here
                if end - at < 3:
                    break
                length, start = length & 0x7F | data[at + 2] << 7, at + 3
            if start + length > end:
                break
            self._packet(data[at], data[start : start + length])
            at = start + length
        self._rest = data[at:]

    def _packet(self, first: int, body: bytes) -> None:
        if first >> 4 == 3:
            topic_end = 2 + int.from_bytes(body[:2], "big")
            payload_at = topic_end + 3 + body[topic_end + 2]  # properties are below 128 bytes
            device_id = body[10:topic_end].split(b"/", 1)[0].decode()
            ack = b"\x40\x02" + body[topic_end : topic_end + 2]
            self._queue.put_nowait((device_id, body[payload_at:].decode(), ack))
        elif first >> 4 == 9:
            self.subscribed.set_result(None)


async def store_each(pool: asyncpg.Pool, queue: asyncio.Queue[Message], subscriber: Subscriber) -> None:
    """One of ten: a message, a statement, an acknowledgement."""
    async with pool.acquire() as connection:
        statement = await connection.prepare(_INSERT)
        while True:
            device_id, payload, ack = await queue.get()
            (uplink_id,) = new_ids(1, int(time.time() * 1000), os.urandom)
            await statement.fetch(uplink_id, TENANT, device_id, payload)
            assert subscriber.transport is not None
            subscriber.transport.write(ack)


async def store_batched(pool: asyncpg.Pool, queue: asyncio.Queue[Message], subscriber: Subscriber) -> None:
    """All that wait, a statement, their acknowledgements."""
    async with pool.acquire() as connection:
        statement = await connection.prepare(_INSERT_MANY)
        while True:
            batch = [await queue.get()]
            while len(batch) < BATCH and not queue.empty():
                batch.append(queue.get_nowait())
            ids = new_ids(len(batch), int(time.time() * 1000), os.urandom)
            devices, payloads, acks = zip(*batch, strict=True)
            await statement.fetch(ids, TENANT, devices, payloads)
            assert subscriber.transport is not None
            subscriber.transport.write(b"".join(acks))


async def run(how: Literal["each", "batched"], port: int) -> None:
    """Until the broker goes."""
    queue: asyncio.Queue[Message] = asyncio.Queue()
    async with asyncpg.create_pool(os.environ["BENCH_DSN"], min_size=POOL, max_size=POOL) as pool:
        loop = asyncio.get_running_loop()
        _, subscriber = await loop.create_connection(lambda: Subscriber(queue), "127.0.0.1", port)
        await subscriber.subscribed
        work = store_each if how == "each" else store_batched
        tasks = [loop.create_task(work(pool, queue, subscriber)) for _ in range(POOL if how == "each" else 1)]
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.wait([subscriber.gone, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


if __name__ == "__main__":
    kind = sys.argv[1]
    assert kind in ("each", "batched")
    uvloop.run(run("each" if kind == "each" else "batched", int(sys.argv[2])))
