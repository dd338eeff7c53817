"""Topic grants: what a profile lets its devices do beyond the fixed topics (CONTRACT §3).

    [{"filter": "site/+/alarm", "allow": ["publish", "subscribe"]}, {"filter": "site/7/#", "deny": ["publish"]}]

Nothing is granted by default, and a deny wins over every allow. What a filter matches is the adapter's knowledge: the
registry parses, and the adapter asks `judge` with what it knows. A grant that cannot be read (an older program's, or
a broken row) allows nothing and denies all that it might have.

Values only; what is remembered of them is in grant_table.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from registry.model import Json, ProfileId


class Access(Enum):
    """What may be granted; the values are the words of a profile."""

    PUBLISH = "publish"
    SUBSCRIBE = "subscribe"


@dataclass(frozen=True, slots=True)
class TopicGrant:
    """One entry. `filter` is the profile's text, with `me` where it stands."""

    filter: str
    allow: frozenset[Access]
    deny: frozenset[Access]


@dataclass(frozen=True, slots=True)
class DeviceGrants:
    """What a device may: the grants of its profile. A device without a profile has none."""

    profile_id: ProfileId | None = None
    grants: tuple[TopicGrant, ...] = ()


NO_GRANTS = DeviceGrants()


def judge(
    grants: Sequence[TopicGrant], access: Access, *, covers: Callable[[str], bool], touches: Callable[[str], bool]
) -> bool:
    """Whether `access` is granted: some allow covers all of what is asked, and no deny touches any of it.

    `covers(filter)`, `touches(filter)`: the adapter's word on what is asked. For a topic name both mean "matches"; a
    topic filter is covered by one that matches whatever it matches, and touched by one that matches some of that.
    """
    if any(access in grant.deny and touches(grant.filter) for grant in grants):
        return False
    return any(access in grant.allow and covers(grant.filter) for grant in grants)


def parse_grants(entries: Sequence[Json]) -> tuple[TopicGrant, ...]:
    """A profile's `topic_grants` as values. An entry that is broken denies everything under its filter, or, without a
    proper one, everything."""
    return tuple(_parse(entry) for entry in entries)


def _parse(entry: Json) -> TopicGrant:
    text = entry.get("filter") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text:
        return TopicGrant("#", frozenset(), frozenset(Access))
    try:
        return TopicGrant(text, _words(entry.get("allow")), _words(entry.get("deny")))
    except ValueError:
        return TopicGrant(text, frozenset(), frozenset(Access))


def _words(words: Json) -> frozenset[Access]:
    if words is None:
        return frozenset()
    if not isinstance(words, list):
        raise ValueError("no array")
    return frozenset(Access(word) for word in words)
