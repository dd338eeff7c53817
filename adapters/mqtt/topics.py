"""Topic names, topic filters, who subscribes to what, and which retained messages a filter finds. 5.0 §4.7, §4.8.

Theory
------
A topic is a path of levels between slashes. A name has no wildcards; in a filter `+` stands for one level and `#`, at
the end only, for any number of them, none included. `sport/#` matches `sport` too. A wildcard at the start does not
match names that start with `$` [MQTT-4.7.2-1]. Levels are compared as they are, never normalised [MQTT-4.7.3-4]; an
empty level is a level.

Both tables are tries with one node for each level, made when a path first needs them and dropped with the last thing
under them, so memory follows what is stored. `Subscriptions.match` walks the name's levels and at each level at most
the three ways on (that level, `+`, `#`); the work is bounded by the nodes that match a prefix. `RetainedMessages.find`
is the mirror: the walk follows the filter through the names. Both are iterative; the depth is capped where a filter
or a name is parsed, because a packet could otherwise bring 65,535 levels.

A shared subscription (`$share/<group>/<filter>`, §4.8.2) is a filter with a group: of all members of the same group
and filter, one gets each message. The trie finds the groups; `SharedGroup.pick` chooses by turns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

MAX_TOPIC_BYTES: Final = 1_024
"""Of one name or filter. The protocol allows 65,535; ours are under 100, and aliases keep a copy of each."""

MAX_TOPIC_LEVELS: Final = 64
"""Of one name or filter. Each level is a node of some 200 bytes."""

_SHARE: Final = "$share/"

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class InvalidTopic(ValueError):
    """Not a topic name or not a topic filter. The text names the rule and never the topic."""


class TopicTooLong(InvalidTopic):
    """Well formed, and above a limit of ours."""


@dataclass(frozen=True, slots=True)
class Filter:
    """A parsed topic filter. `levels` is without the share; `group` is None for an ordinary subscription."""

    text: str
    levels: tuple[str, ...]
    group: str | None = None

    @property
    def path(self) -> str:
        """The filter without its share."""
        return "/".join(self.levels)


def parse_name(text: str, *, max_bytes: int = MAX_TOPIC_BYTES, max_levels: int = MAX_TOPIC_LEVELS) -> tuple[str, ...]:
    """The levels of a topic name. Raises InvalidTopic, or TopicTooLong for our limits."""
    _check_text(text, max_bytes)
    if "+" in text or "#" in text:
        raise InvalidTopic("a wildcard in a topic name")  # [MQTT-3.3.2-2], [MQTT-4.7.0-1]
    levels = tuple(text.split("/"))
    if len(levels) > max_levels:
        raise TopicTooLong(f"{len(levels)} topic levels; {max_levels} are allowed")
    return levels


def parse_filter(text: str, *, max_bytes: int = MAX_TOPIC_BYTES, max_levels: int = MAX_TOPIC_LEVELS) -> Filter:
    """A topic filter, shared or not. Raises InvalidTopic, or TopicTooLong for our limits."""
    _check_text(text, max_bytes)
    group: str | None = None
    path = text
    if text == "$share" or text.startswith(_SHARE):
        group, slash, path = text[len(_SHARE) :].partition("/")
        if not group or "+" in group or "#" in group:  # [MQTT-4.8.2-1], [MQTT-4.8.2-2]
            raise InvalidTopic("a shared subscription without a proper share name")
        if not slash or not path:
            raise InvalidTopic("a shared subscription without a filter")
    levels = tuple(path.split("/"))
    if len(levels) > max_levels:
        raise TopicTooLong(f"{len(levels)} topic levels; {max_levels} are allowed")
    last = len(levels) - 1
    for at, level in enumerate(levels):
        if "#" in level and (level != "#" or at != last):  # [MQTT-4.7.1-1]
            raise InvalidTopic("# that is not alone in the last level")
        if "+" in level and level != "+":  # [MQTT-4.7.1-2]
            raise InvalidTopic("+ that is not alone in its level")
    return Filter(text, levels, group)


def matches(filter_levels: tuple[str, ...], name_levels: tuple[str, ...]) -> bool:
    """Whether a filter matches a name; the plain reading of §4.7 that the tries are tested against."""
    if name_levels[0].startswith("$") and filter_levels[0] in ("+", "#"):
        return False
    for at, level in enumerate(filter_levels):
        if level == "#":
            return True
        if at >= len(name_levels) or level not in ("+", name_levels[at]):
            return False
    return len(filter_levels) == len(name_levels)


class SharedGroup(Generic[Key, Value]):
    """The members of one share name and filter, in the order in which they came."""

    __slots__ = ("_last", "members")

    def __init__(self) -> None:
        self.members: dict[Key, Value] = {}
        self._last: Key | None = None

    def pick(self, ready: Callable[[Key], bool]) -> tuple[Key, Value] | None:
        """The member whose turn it is: the next that is ready, else simply the next. None when there is none.

        The turn is remembered by member, so members that come and go do not make anybody lose theirs.
        """
        keys = list(self.members)
        if not keys:
            return None
        start = keys.index(self._last) + 1 if self._last in self.members else 0
        turn = keys[start:] + keys[:start]
        chosen = next((key for key in turn if ready(key)), turn[0])
        self._last = chosen
        return chosen, self.members[chosen]


class _Node(Generic[Key, Value]):
    __slots__ = ("children", "groups", "subscribers")

    def __init__(self) -> None:
        self.children: dict[str, _Node[Key, Value]] | None = None
        self.subscribers: dict[Key, Value] | None = None
        self.groups: dict[str, SharedGroup[Key, Value]] | None = None

    @property
    def empty(self) -> bool:
        return not self.children and not self.subscribers and not self.groups


@dataclass(frozen=True, slots=True)
class Matched(Generic[Key, Value]):
    """What a name found: every ordinary subscription, and the groups of which one member each gets the message."""

    subscribers: tuple[tuple[Key, Value], ...]
    groups: tuple[SharedGroup[Key, Value], ...]


class Subscriptions(Generic[Key, Value]):
    """Filters with their subscribers. `Key` says who, `Value` how (options, granted QoS)."""

    __slots__ = ("_count", "_root")

    def __init__(self) -> None:
        self._root: _Node[Key, Value] = _Node()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, topic_filter: Filter, key: Key, value: Value) -> Value | None:
        """Subscribe `key`; answers the value that was there and is replaced now, if any [MQTT-3.8.4-3]."""
        node = self._root
        for level in topic_filter.levels:
            children = node.children
            if children is None:
                children = node.children = {}
            child = children.get(level)
            if child is None:
                child = children[level] = _Node()
            node = child
        members = self._members(node, topic_filter.group)
        before = members.get(key)
        if key not in members:
            self._count += 1
        members[key] = value
        return before

    def remove(self, topic_filter: Filter, key: Key) -> Value | None:
        """Unsubscribe `key` from exactly this filter; answers what was there, if anything [MQTT-3.10.4-1]."""
        path: list[tuple[_Node[Key, Value], str]] = []
        node = self._root
        for level in topic_filter.levels:
            child = None if node.children is None else node.children.get(level)
            if child is None:
                return None
            path.append((node, level))
            node = child
        value = self._drop(node, topic_filter.group, key)
        if value is None:
            return None
        self._count -= 1
        for parent, level in reversed(path):
            if not node.empty:
                break
            assert parent.children is not None
            del parent.children[level]
            node = parent
        return value

    def match(self, name: tuple[str, ...]) -> Matched[Key, Value]:
        """Everything that the levels of a topic name match."""
        subscribers: list[tuple[Key, Value]] = []
        groups: list[SharedGroup[Key, Value]] = []
        here: list[_Node[Key, Value]] = [self._root]
        hidden = name[0].startswith("$")
        for level in name:
            ahead: list[_Node[Key, Value]] = []
            for node in here:
                children = node.children
                if not children:
                    continue
                exact = children.get(level)
                if exact is not None:
                    ahead.append(exact)
                if hidden:
                    continue
                one = children.get("+")
                if one is not None:
                    ahead.append(one)
                every = children.get("#")
                if every is not None:
                    _collect(every, subscribers, groups)
            hidden = False
            here = ahead
            if not here:
                break
        for node in here:
            _collect(node, subscribers, groups)
            every = node.children.get("#") if node.children else None
            if every is not None:  # `sport/#` matches `sport`
                _collect(every, subscribers, groups)
        return Matched(tuple(subscribers), tuple(groups))

    @staticmethod
    def _members(node: _Node[Key, Value], group: str | None) -> dict[Key, Value]:
        if group is None:
            if node.subscribers is None:
                node.subscribers = {}
            return node.subscribers
        if node.groups is None:
            node.groups = {}
        shared = node.groups.get(group)
        if shared is None:
            shared = node.groups[group] = SharedGroup()
        return shared.members

    @staticmethod
    def _drop(node: _Node[Key, Value], group: str | None, key: Key) -> Value | None:
        if group is None:
            return None if node.subscribers is None else node.subscribers.pop(key, None)
        shared = None if node.groups is None else node.groups.get(group)
        if shared is None or node.groups is None:
            return None
        value = shared.members.pop(key, None)
        if not shared.members:
            del node.groups[group]
        return value


def _collect(
    node: _Node[Key, Value],
    subscribers: list[tuple[Key, Value]],
    groups: list[SharedGroup[Key, Value]],
) -> None:
    if node.subscribers:
        subscribers.extend(node.subscribers.items())
    if node.groups:
        groups.extend(node.groups.values())


class _Leaf(Generic[Value]):
    __slots__ = ("children", "stored", "value")

    def __init__(self) -> None:
        self.children: dict[str, _Leaf[Value]] | None = None
        self.value: Value | None = None
        self.stored = False


class RetainedMessages(Generic[Value]):
    """One message for each topic name (5.0 §3.3.1.3), found by filter. How many are kept is the caller's to judge."""

    __slots__ = ("_count", "_root")

    def __init__(self) -> None:
        self._root: _Leaf[Value] = _Leaf()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, name: tuple[str, ...], value: Value) -> Value | None:
        """Keep `value` for this name; answers the one that it replaces [MQTT-3.3.1-5]."""
        node = self._root
        for level in name:
            if node.children is None:
                node.children = {}
            child = node.children.get(level)
            if child is None:
                child = node.children[level] = _Leaf()
            node = child
        before = node.value
        self._count += not node.stored
        node.value, node.stored = value, True
        return before

    def get(self, name: tuple[str, ...]) -> Value | None:
        """What is kept for exactly this name."""
        node: _Leaf[Value] | None = self._root
        for level in name:
            node = None if node is None or node.children is None else node.children.get(level)
        return None if node is None else node.value

    def remove(self, name: tuple[str, ...]) -> Value | None:
        """Forget what is kept for this name, as an empty retained message asks [MQTT-3.3.1-6]."""
        path: list[tuple[_Leaf[Value], str]] = []
        node = self._root
        for level in name:
            child = None if node.children is None else node.children.get(level)
            if child is None:
                return None
            path.append((node, level))
            node = child
        value = node.value
        self._count -= node.stored
        node.value, node.stored = None, False
        for parent, level in reversed(path):
            if node.children or node.stored:
                break
            assert parent.children is not None
            del parent.children[level]
            node = parent
        return value

    def find(self, topic_filter: Filter) -> Iterator[tuple[str, Value]]:
        """Names and messages that the filter matches. The table must not change during the walk: copy first."""
        levels = topic_filter.levels
        waiting: list[tuple[_Leaf[Value], int, tuple[str, ...]]] = [(self._root, 0, ())]
        while waiting:
            node, at, name = waiting.pop()
            if at == len(levels):
                if node.stored and node.value is not None:
                    yield "/".join(name), node.value
                continue
            level = levels[at]
            if level == "#":
                if node.stored and node.value is not None:
                    yield "/".join(name), node.value
                for child_level, child in _visible(node, len(name)):
                    waiting.append((child, at, (*name, child_level)))
            elif level == "+":
                for child_level, child in _visible(node, len(name)):
                    waiting.append((child, at + 1, (*name, child_level)))
            elif node.children is not None and level in node.children:
                waiting.append((node.children[level], at + 1, (*name, level)))


def _visible(node: _Leaf[Value], depth: int) -> Iterator[tuple[str, _Leaf[Value]]]:
    """The children, `depth` levels down, that a wildcard may match. [MQTT-4.7.2-1]"""
    if node.children is None:
        return
    for level, child in node.children.items():
        if depth > 0 or not level.startswith("$"):
            yield level, child


def _check_text(text: str, max_bytes: int) -> None:
    if not text:
        raise InvalidTopic("an empty topic")  # [MQTT-4.7.3-1]
    if not text.isprintable() and any(_is_control(character) for character in text):
        # U+0000 is forbidden [MQTT-4.7.3-2]; the others a receiver may refuse (5.0 §1.5.4), and no log wants them
        raise InvalidTopic("a control character in a topic")
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > max_bytes:
        raise TopicTooLong(f"a topic of {size} bytes; {max_bytes} are allowed")  # [MQTT-4.7.3-3] is far above


def _is_control(character: str) -> bool:
    return character < " " or "\x7f" <= character < "\xa0"
