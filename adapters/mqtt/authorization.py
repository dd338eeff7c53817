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

Grants (registry/topic_grants.py). A name may be published when an allowing filter matches it and no denying one does. A
filter may be subscribed when one allowing filter covers it, that is, matches every name that it matches, and no denying
one matches any of them. `me` in a grant's filter stands for the device's id.

Pure: no I/O; grants' filters are remembered parsed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias
from uuid import UUID

from adapters.mqtt.topics import Filter, InvalidTopic, matches, parse_filter
from registry.model import CommandId, DeviceId
from registry.topic_grants import Access, TopicGrant, judge

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


def overlaps(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    """Whether there is a name that both filters match."""
    for at in range(max(len(one), len(other))):
        if at == len(one):
            return other[at:] == ("#",)  # `sport/#` matches `sport` as well
        if at == len(other):
            return one[at:] == ("#",)
        if "#" in (one[at], other[at]):
            return True
        if one[at] != other[at] and "+" not in (one[at], other[at]):
            return False
    return True


def may_publish(grants: Sequence[TopicGrant], name: tuple[str, ...], own: DeviceId) -> bool:
    """Whether these grants let a device publish under a name."""
    return _may_use(grants, Access.PUBLISH, name, own)


def may_receive(grants: Sequence[TopicGrant], name: tuple[str, ...], own: DeviceId) -> bool:
    """Whether these grants let a device hear what is published under a name."""
    return _may_use(grants, Access.SUBSCRIBE, name, own)


def may_subscribe(grants: Sequence[TopicGrant], levels: tuple[str, ...], own: DeviceId) -> bool:
    """Whether these grants let a device subscribe with a filter; `levels` without a share."""
    if reserved(levels):
        return False
    return judge(
        grants,
        Access.SUBSCRIBE,
        covers=lambda text: (wide := _granted(text, own)) is not None and covers(wide, levels),
        touches=lambda text: (denied := _granted(text, own)) is None or overlaps(denied, levels),
    )


def _may_use(grants: Sequence[TopicGrant], access: Access, name: tuple[str, ...], own: DeviceId) -> bool:
    if not grants or reserved(name):
        return False
    return judge(
        grants,
        access,
        covers=lambda text: (wide := _granted(text, own)) is not None and matches(wide, name),
        touches=lambda text: (denied := _granted(text, own)) is None or matches(denied, name),
    )


@lru_cache(maxsize=8_192)
def _granted(text: str, own: DeviceId) -> tuple[str, ...] | None:
    """The levels of a grant's filter, `me` being this device; None for what is no filter: it allows nothing."""
    try:
        levels = parse_filter(text).levels
    except InvalidTopic:
        return None
    return tuple(str(own) if level == ME else level for level in levels)


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
