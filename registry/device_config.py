"""What a device should run with, what it says it runs with, and how it hears of a change.

    operator ── put ──► desired: version n+1 ── event ──► every node ──► listeners of live sessions ──► device
                                                                                                          │
    operator ◄── get ── desired and reported ◄───────────────────────────── report(version, config?) ─────┘

The desired configuration is the device record's `config`. It was merged from the profile's and the device's own when
the device was registered (registry/devices.py) and is a whole ever since: putting one replaces it. Its version is 1
then and rises by one with every change, whichever way it comes (here, or with the record). Putting what is there
already changes nothing. Who names the version that he has seen is refused if it is no longer the one (compare and set);
of two who put at once without it, the later to lock the device's row stays.

A live session gets the configuration when it attaches (MQTT: on subscribing) and each newer one, the newest only: what
was replaced meanwhile is passed over. A version that was sent and lost is sent again at the next attach; the device
sees by `reported` and `version` whether it has work to do.

What a device reports is its word, kept as the last one it said: it may be older than before (a device that was reset),
never newer than what there is. Repeating a report changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec

from registry import fields
from registry.downlinks import Attachment, Downlinks
from registry.errors import FailedPrecondition, InvalidArgument, NotFound
from registry.events import EventKind, NewEvent
from registry.feed import Seen
from registry.model import Actor, DeviceId, Json, TenantId
from registry.payloads import Payload, Source
from registry.ports import Clock, EventHint
from registry.storage import audit, events
from registry.storage import device_config as storage
from registry.storage.database import Connection, Database
from registry.storage.device_config import DeviceConfig, ReportedConfig, Watched

__all__ = ["DeviceConfig", "DeviceConfigs", "ReportedConfig"]

_NEWS: Final = frozenset({EventKind.CONFIG_CHANGED, EventKind.DEVICE_UPDATED})
"""After these there may be something to tell: a configuration, or a gateway to tell it to."""


class OtherVersion(FailedPrecondition):
    """The configuration is not the one that the caller has seen."""


class ConfigListener(Protocol):
    """A live session that is told of its device's configuration."""

    def configure(self, config: DeviceConfig) -> None:
        """Send it down, or queue it for sending; a queued older one may be dropped. Must not raise, must not wait."""
        ...


@dataclass(slots=True, eq=False)
class ConfigAttachment(Attachment):
    """A listener's place, as `DeviceConfigs.attach` gave it."""

    listener: ConfigListener
    version: int = 0
    """The newest one that was given to it."""


@dataclass(frozen=True, slots=True)
class ConfigReport:
    """What a device says it has applied."""

    version: int
    config: Mapping[str, Json] | None = None


def encode_config(config: DeviceConfig) -> bytes:
    """What goes down to a device, as JSON: `{version, config}` (CONTRACT §2)."""
    return msgspec.json.encode({"version": config.version, "config": config.config})


def report_from(payload: Payload) -> ConfigReport:
    """The report in a payload: `{"version": n, "config"?: {…}}`. Raises InvalidArgument."""
    try:
        read = _REPORT.decode(payload.text)
    except msgspec.MsgspecError as error:
        raise InvalidArgument(f"the report is refused: {error}", field="reported") from None
    return ConfigReport(read.version, None if read.config is None else fields.document("config", read.config))


class DeviceConfigs:
    """The configurations of all devices, and the live sessions of this node that are told. Follows the feed."""

    def __init__(self, database: Database, *, clock: Clock, feed: EventHint) -> None:
        self._database = database
        self._clock = clock
        self._feed = feed
        self._downlinks: Downlinks[ConfigAttachment] = Downlinks("configurations down", self._serve)

    async def get(self, tenant_id: TenantId, device_id: DeviceId) -> DeviceConfig:
        """Raises NotFound, Unavailable."""
        async with self._database.connection() as connection:
            return _found(await storage.get(connection, tenant_id, device_id))

    async def put(
        self,
        tenant_id: TenantId,
        device_id: DeviceId,
        config: Mapping[str, Json],
        actor: Actor,
        *,
        seen_version: int | None = None,
    ) -> DeviceConfig:
        """Replace what the device should run with; if `seen_version` is given, only while that is the newest.

        Raises NotFound, InvalidArgument, OtherVersion, Unavailable.
        """
        checked = fields.document("config", config)
        async with self._database.transaction() as connection:
            before = _found(await storage.get(connection, tenant_id, device_id, lock=True))
            if seen_version is not None and seen_version != before.version:
                raise OtherVersion(f"the newest version is {before.version}; the change is for version {seen_version}")
            version = await storage.put(connection, tenant_id, device_id, checked, self._clock())
            if version is None:
                return before
            await record_change(connection, tenant_id, device_id, version, actor)
            await audit.insert(connection, tenant_id, actor, "update", "config", str(device_id), {"version": version})
        self._feed.hint()
        return DeviceConfig(device_id, version, checked, before.reported)

    async def report(self, source: Source, report: ConfigReport, correlation_id: str) -> DeviceConfig:
        """Keep what the device says it has applied; it is stored when this returns.

        Raises NotFound, InvalidArgument (a version that there has never been), Unavailable. Duty of the caller:
        `source.via` may speak for the device (`Children.is_child`).
        """
        actor = Actor(f"device:{source.via or source.device_id}", correlation_id)
        async with self._database.transaction() as connection:
            before = _found(await storage.get(connection, source.tenant_id, source.device_id, lock=True))
            if not 1 <= report.version <= before.version:
                raise InvalidArgument(
                    f"version is {report.version}; there have been 1 to {before.version}", field="version"
                )
            said = before.reported
            if said is not None and said.version == report.version and _same(said.config, report.config):
                return before
            reported = ReportedConfig(report.version, report.config, self._clock())
            await storage.report(connection, source.tenant_id, source.device_id, reported)
            data = {"version": report.version, "desired_version": before.version}
            await events.insert(
                connection,
                NewEvent(EventKind.CONFIG_REPORTED, source.tenant_id, actor, device_id=source.device_id, data=data),
            )
        self._feed.hint()
        return DeviceConfig(before.device_id, before.version, before.config, reported)

    def attach(
        self,
        tenant_id: TenantId,
        device_id: DeviceId,
        listener: ConfigListener,
        *,
        via: DeviceId | None = None,
        seen: int = 0,
    ) -> ConfigAttachment:
        """Give the listener the present configuration, and each newer one, until `detach`.

        `via` is the gateway whose session it is, for a child; it hears nothing once the child is no longer its own.
        `seen` is the version that the peer was given before; nothing comes before a newer one.
        """
        attachment = ConfigAttachment(tenant_id, device_id, via, listener, seen)
        self._downlinks.add(attachment)
        return attachment

    def detach(self, attachment: ConfigAttachment) -> None:
        """Tell it nothing more. Idempotent."""
        self._downlinks.remove(attachment)

    async def follow(self, seen: Seen) -> None:
        """The feed's word: a device may have another configuration."""
        if seen.event.kind in _NEWS and seen.event.device_id is not None:
            self._downlinks.stir(seen.event.device_id)

    async def restored(self) -> None:
        """The feed was away: look at everything."""
        self._downlinks.stir_all()

    async def stop(self) -> None:
        """Finish what is under way."""
        await self._downlinks.stop()

    async def _serve(self, attachments: Sequence[ConfigAttachment]) -> None:
        watched = [Watched(a.tenant_id, a.device_id, a.version, a.via) for a in attachments]
        async with self._database.connection() as connection:
            found = await storage.newer(connection, watched)
        for attachment, config in zip(attachments, found, strict=True):
            if config is not None and attachment.live:
                attachment.version = config.version
                attachment.listener.configure(config)


async def record_change(
    connection: Connection, tenant_id: TenantId, device_id: DeviceId, version: int, actor: Actor
) -> None:
    """Tell, in the transaction that made it, that a device has another desired configuration."""
    data = {"version": version}
    await events.insert(
        connection, NewEvent(EventKind.CONFIG_CHANGED, tenant_id, actor, device_id=device_id, data=data)
    )


class _Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    config: dict[str, Json] | None = None


_REPORT: Final = msgspec.json.Decoder(_Report)


def _same(one: Json, other: Json) -> bool:
    """Whether two values are the same JSON: in Python 1, 1.0 and True are equal."""
    return msgspec.json.encode(one, order="sorted") == msgspec.json.encode(other, order="sorted")


def _found(config: DeviceConfig | None) -> DeviceConfig:
    if config is None:
        raise NotFound("no such device in this tenant")
    return config
