"""Topics: what is a name and a filter, and that both tries agree with the plain reading of the matching rules."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adapters.mqtt.topics import (
    Filter,
    InvalidTopic,
    RetainedMessages,
    SharedGroup,
    Subscriptions,
    TopicTooLong,
    matches,
    parse_filter,
    parse_name,
)

LEVELS = ("", "a", "b", "$x", "é")
names = st.lists(st.sampled_from(LEVELS), min_size=1, max_size=4).map(tuple).filter(lambda levels: levels != ("",))
filters = (
    st.tuples(st.lists(st.sampled_from((*LEVELS, "+")), max_size=4), st.sampled_from(((), ("#",))))
    .map(lambda drawn: "/".join((*drawn[0], *drawn[1])))
    .filter(bool)
)


@pytest.mark.parametrize("name", ["a", "/", "a/b", "/a", "a/", "a//b", "$SYS/x", "a b", "\ufeffa", "日本/é"])
def test_names_that_are_names(name: str) -> None:
    assert "/".join(parse_name(name)) == name


@pytest.mark.parametrize("name", ["", "+", "a/#", "a+b", "a#", "a\0b", "a\nb", "\x85", "\x7f"])
def test_names_that_are_not(name: str) -> None:
    with pytest.raises(InvalidTopic):
        parse_name(name)


@pytest.mark.parametrize("text", ["#", "+", "+/+", "a/#", "/+", "+/a/#", "a/+/b", "$SYS/#", "$sharex/a", "a//#"])
def test_filters_that_are_filters(text: str) -> None:
    parsed = parse_filter(text)
    assert (parsed.path, parsed.group) == (text, None)


def test_a_shared_filter_has_its_group() -> None:
    parsed = parse_filter("$share/workers/a/+/#")
    assert (parsed.group, parsed.path, parsed.text) == ("workers", "a/+/#", "$share/workers/a/+/#")
    assert parse_filter("$share/workers//finance").levels == ("", "finance")


@pytest.mark.parametrize(
    "text",
    ["", "a#", "#/a", "a/#/b", "a+", "+a/b", "##", "a/b#", "$share", "$share/", "$share/a", "$share/a/", "$share//a",
     "$share/a+/b", "$share/#/b", "$share/a/b#", "a\0", "a\x1b"],
)  # fmt: skip
def test_filters_that_are_not(text: str) -> None:
    with pytest.raises(InvalidTopic):
        parse_filter(text)


def test_limits_of_ours_are_told_apart() -> None:
    assert len(parse_name("/" * 63)) == 64
    for parse in (parse_name, parse_filter):
        with pytest.raises(TopicTooLong):
            parse("/" * 64)
        with pytest.raises(TopicTooLong):
            parse("é" * 513)
        parse("é" * 512)


@pytest.mark.parametrize(
    ("topic_filter", "name", "expected"),
    [  # 5.0 §4.7.1, §4.7.2
        ("sport/tennis/player1/#", "sport/tennis/player1", True),
        ("sport/tennis/player1/#", "sport/tennis/player1/score/wimbledon", True),
        ("sport/#", "sport", True),
        ("#", "a/b/c", True),
        ("sport/tennis/+", "sport/tennis/player1", True),
        ("sport/tennis/+", "sport/tennis/player1/ranking", False),
        ("sport/+", "sport", False),
        ("sport/+", "sport/", True),
        ("+/+", "/finance", True),
        ("/+", "/finance", True),
        ("+", "/finance", False),
        ("#", "$SYS/a", False),
        ("+/monitor/Clients", "$SYS/monitor/Clients", False),
        ("$SYS/#", "$SYS/a", True),
        ("$SYS/monitor/+", "$SYS/monitor/Clients", True),
        ("a/+", "a/$x", True),
        ("a/#", "a/$x/b", True),
        ("a", "A", False),
        ("a/b", "a//b", False),
        ("+/#", "a", True),
        ("+/#", "$a/b", False),
    ],
)
def test_the_matching_rules(topic_filter: str, name: str, expected: bool) -> None:
    parsed, levels = parse_filter(topic_filter), parse_name(name)
    assert matches(parsed.levels, levels) is expected
    table: Subscriptions[str, int] = Subscriptions()
    table.add(parsed, "me", 1)
    assert bool(table.match(levels).subscribers) is expected
    retained: RetainedMessages[str] = RetainedMessages()
    retained.put(levels, "kept")
    assert list(retained.find(parsed)) == ([(name, "kept")] if expected else [])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(filters, st.integers(0, 2)), max_size=12), names)
def test_the_trie_finds_exactly_what_matches(subscribed: list[tuple[str, int]], name: tuple[str, ...]) -> None:
    table: Subscriptions[int, str] = Subscriptions()
    for text, key in subscribed:
        table.add(parse_filter(text), key, text)
    expected = {(key, text) for text, key in subscribed if matches(parse_filter(text).levels, name)}
    found = table.match(name).subscribers
    assert len(found) == len(expected)
    assert set(found) == expected


@settings(max_examples=400, deadline=None)
@given(st.lists(names, max_size=12), filters)
def test_the_retained_store_finds_exactly_what_matches(kept: list[tuple[str, ...]], text: str) -> None:
    parsed = parse_filter(text)
    store: RetainedMessages[str] = RetainedMessages()
    for name in kept:
        store.put(name, "/".join(name))
    found = list(store.find(parsed))
    assert sorted(found) == sorted({("/".join(name),) * 2 for name in kept if matches(parsed.levels, name)})


class TablesFollowADictionary(RuleBasedStateMachine):
    """Add and remove in any order: the count is right, and nothing is left behind when all is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Subscriptions[int, int] = Subscriptions()
        self.model: dict[tuple[str, int], int] = {}
        self.retained: RetainedMessages[int] = RetainedMessages()
        self.kept: dict[tuple[str, ...], int] = {}

    @rule(
        text=filters,
        group=st.sampled_from(("", "$share/g/", "$share/h/")),
        key=st.integers(0, 2),
        value=st.integers(0, 9),
    )
    def add(self, text: str, group: str, key: int, value: int) -> None:
        assert self.table.add(parse_filter(group + text), key, value) == self.model.get((group + text, key))
        self.model[group + text, key] = value

    @rule(data=st.data(), text=filters, key=st.integers(0, 2))
    def remove(self, data: st.DataObject, text: str, key: int) -> None:
        text, key = data.draw(st.sampled_from(sorted(self.model))) if self.model else (text, key)
        assert self.table.remove(parse_filter(text), key) == self.model.pop((text, key), None)
        assert self.table.remove(parse_filter(text), key) is None

    @rule(name=names, value=st.integers(0, 9))
    def keep(self, name: tuple[str, ...], value: int) -> None:
        assert self.retained.put(name, value) == self.kept.get(name)
        self.kept[name] = value

    @rule(name=names)
    def forget(self, name: tuple[str, ...]) -> None:
        assert self.retained.get(name) == self.kept.get(name)
        assert self.retained.remove(name) == self.kept.pop(name, None)

    @invariant()
    def counts_agree(self) -> None:
        assert len(self.table) == len(self.model)
        assert len(self.retained) == len(self.kept)
        assert self.table._root.empty is not bool(self.model)
        assert bool(self.retained._root.children) is bool(self.kept)


TestTables = TablesFollowADictionary.TestCase
TestTables.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


def shared(table: Subscriptions[str, int], name: str) -> SharedGroup[str, int]:
    (group,) = table.match(parse_name(name)).groups
    return group


def test_members_of_a_group_take_turns_and_those_who_are_not_ready_are_passed_over() -> None:
    table: Subscriptions[str, int] = Subscriptions()
    for key in ("one", "two", "three"):
        table.add(parse_filter("$share/g/a/+"), key, 1)
    group = shared(table, "a/b")
    everyone = lambda key: True  # noqa: E731
    assert [(group.pick(everyone) or ("",))[0] for _ in range(4)] == ["one", "two", "three", "one"]
    table.remove(parse_filter("$share/g/a/+"), "two")
    assert [(group.pick(everyone) or ("",))[0] for _ in range(2)] == ["three", "one"]
    assert group.pick(lambda key: key == "one") == ("one", 1)
    assert group.pick(lambda key: False) == ("three", 1)  # nobody is ready: it will wait for that one
    assert SharedGroup[str, int]().pick(everyone) is None


def test_groups_and_ordinary_subscribers_do_not_mix() -> None:
    table: Subscriptions[str, int] = Subscriptions()
    table.add(parse_filter("a/#"), "me", 0)
    table.add(parse_filter("$share/g/a/#"), "me", 1)
    table.add(parse_filter("$share/h/a/b"), "me", 2)
    matched = table.match(("a", "b"))
    assert matched.subscribers == (("me", 0),)
    assert sorted(group.members["me"] for group in matched.groups) == [1, 2]
    assert table.remove(parse_filter("a/#"), "me") == 0
    assert len(table) == 2


def test_a_hostile_set_of_filters_costs_no_more_than_its_nodes() -> None:
    table: Subscriptions[int, int] = Subscriptions()
    for number in range(256):
        levels = tuple("+" if number >> bit & 1 else "a" for bit in range(8))
        table.add(Filter("/".join(levels), levels), number, number)
    assert len(table.match(("a",) * 8).subscribers) == 256
    assert len(table.match(("a",) * 7 + ("b",)).subscribers) == 128
    assert table.match(("a",) * 60).subscribers == ()
