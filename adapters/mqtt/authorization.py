"""Which topics a device may touch: CONTRACT §3's table, as functions of a topic's levels.

    publish     devices/{id}/telemetry | events | health | components | uplink      ─► UplinkTopic
                devices/{id}/commands/{command_id}/response                          ─► CommandAnswer
                devices/{id}/config/reported                                         ─► ConfigReport
                devices/{id}/credentials/renew     (one's own only)                  ─► Renewal
                devices/me/children                (one's own only)                  ─► ChildAttachment
                anything else                                                        ─► Granted, if a grant allows it
    subscribe   devices/{id}/commands, …/config, …/credentials/renew/response,
                …/children/response, and wildcards that match one of them            ─► Downlink
                anything else                                                        ─► Granted, if a grant allows it

`{id}` is one's own id, `me`, or the id of a child; that a named device is a child is for the caller to ask, here it is
only read. What begins with `devices/`, `provision/` or `$` is never brokered: no grant reaches it, so no profile can
open one device's topics to another. A filter whose device is a wildcard stands for everybody's and is refused.

Grants. A name may be published or received when an allowing filter matches it and no denying one does. A filter may be
subscribed when one allowing filter covers it, that is, matches every name that it matches, and no denying one does; the
names that a narrower denial takes out of it are dropped one by one as they are delivered (`may_receive`).

Pure: no I/O, no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias
from uuid import UUID

from adapters.mqtt.topics import Filter, matches
from registry.model import CommandId, DeviceId

UPLINK_KINDS: Final = {
    "telemetry": "telemetry",
    "events": "event",
    "health": "health",
    "components": "components",
    "uplink": None,
}
"""The last level of an uplink's topic, and the kind that is stored; None where the payload says it."""

COMMANDS: Final = ("commands",)
CONFIG: Final = ("config",)
RENEWED: Final = ("credentials", "renew", "response")
CHILD_ATTACHED: Final = ("children", "response")
_DOWN: Final = (COMMANDS, CONFIG, RENEWED, CHILD_ATTACHED)
_RESERVED: Final = frozenset({"devices", "provision"})
ME: Final = "me"


@dataclass(frozen=True, slots=True)
class UplinkTopic:
    """Something to be stored. `kind` None: the payload is the envelope of CONTRACT §2 and names it."""

    device_id: DeviceId
    kind: str | None


@dataclass(frozen=True, slots=True)
class CommandAnswer:
    """A device's answer to a command."""

    device_id: DeviceId
    command_id: CommandId


@dataclass(frozen=True, slots=True)
class ConfigReport:
    """What a device says it runs with."""

    device_id: DeviceId


@dataclass(frozen=True, slots=True)
class Renewal:
    """A CSR for the successor of the connection's certificate."""

    device_id: DeviceId


@dataclass(frozen=True, slots=True)
class ChildAttachment:
    """A gateway names a child."""

    device_id: DeviceId


@dataclass(frozen=True, slots=True)
class Downlink:
    """A filter on what is sent down to one device. `tails` are the topics below the device that it matches."""

    device_id: DeviceId
    filter: Filter
    tails: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Brokered:
    """A topic or filter outside the table: the grants decide."""


Target: TypeAlias = UplinkTopic | CommandAnswer | ConfigReport | Renewal | ChildAttachment | Brokered


@dataclass(frozen=True, slots=True)
class Grant:
    """One entry of a profile's `topic_grants`, for one direction."""

    levels: tuple[str, ...]
    allow: bool


@dataclass(frozen=True, slots=True)
class Grants:
    """What a profile grants. The empty one grants nothing."""

    publish: tuple[Grant, ...] = ()
    subscribe: tuple[Grant, ...] = ()

    def may_publish(self, name: tuple[str, ...]) -> bool:
        """Whether a message may be published under this name."""
        return not reserved(name) and _allowed(self.publish, name)

    def may_receive(self, name: tuple[str, ...]) -> bool:
        """Whether a message of this name may be delivered."""
        return not reserved(name) and _allowed(self.subscribe, name)

    def may_subscribe(self, levels: tuple[str, ...]) -> bool:
        """Whether a filter may be subscribed."""
        if reserved(levels):
            return False
        if any(not grant.allow and covers(grant.levels, levels) for grant in self.subscribe):
            return False
        return any(grant.allow and covers(grant.levels, levels) for grant in self.subscribe)


NO_GRANTS: Final = Grants()


def publish_target(levels: tuple[str, ...], own: DeviceId) -> Target | None:
    """Where a message of this topic goes; None where nobody may publish."""
    if levels[0] != "devices":
        return None if reserved(levels) else Brokered()
    if len(levels) < 3:
        return None
    device_id = _device(levels[1], own)
    if device_id is None:
        return None
    match levels[2:]:
        case (kind,) if kind in UPLINK_KINDS:
            return UplinkTopic(device_id, UPLINK_KINDS[kind])
        case ("commands", command, "response"):
            command_id = _uuid(command)
            return None if command_id is None else CommandAnswer(device_id, CommandId(command_id))
        case ("config", "reported"):
            return ConfigReport(device_id)
        case ("credentials", "renew") if device_id == own:
            return Renewal(device_id)
        case ("children",) if device_id == own:
            return ChildAttachment(device_id)
        case _:
            return None


def subscribe_target(topic_filter: Filter, own: DeviceId) -> Downlink | Brokered | None:
    """What a filter stands for; None where nobody may subscribe."""
    levels = topic_filter.levels
    if levels[0] != "devices":
        return None if reserved(levels) else Brokered()
    if len(levels) < 3 or topic_filter.group is not None:  # a share would take a device's commands from it
        return None
    device_id = _device(levels[1], own)
    if device_id is None:
        return None
    tails = tuple(tail for tail in _DOWN if matches(levels[2:], tail))
    return Downlink(device_id, topic_filter, tails) if tails else None


def reserved(levels: Sequence[str]) -> bool:
    """Whether a name or filter is the table's own, or could match what is: no grant reaches it."""
    first = levels[0]
    return first in _RESERVED or first.startswith("$")


def covers(wide: tuple[str, ...], narrow: tuple[str, ...]) -> bool:
    """Whether every name that the filter `narrow` matches is matched by `wide` as well. 5.0 §4.7.1."""
    for at, level in enumerate(wide):
        if level == "#":
            return True
        if at >= len(narrow) or narrow[at] == "#":
            return False
        if level not in ("+", narrow[at]):
            return False
    return len(wide) == len(narrow)


def _allowed(grants: tuple[Grant, ...], name: tuple[str, ...]) -> bool:
    allowed = False
    for grant in grants:
        if matches(grant.levels, name):
            if not grant.allow:
                return False
            allowed = True
    return allowed


def _device(text: str, own: DeviceId) -> DeviceId | None:
    if text == ME or text == str(own):
        return own
    found = _uuid(text)
    return None if found is None else DeviceId(found)


def _uuid(text: str) -> UUID | None:
    """The id in its one spelling: lower case, with hyphens. Two spellings of one topic would be two topics."""
    if len(text) != 36:
        return None
    try:
        found = UUID(text)
    except ValueError:
        return None
    return found if str(found) == text else None
