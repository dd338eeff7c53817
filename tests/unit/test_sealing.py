"""Sealed values: bound to their place, one error for all damage, and a ring that can be rotated."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from registry.sealing import KeyRing, KeyRingError, SealBroken, SealContext, changing, load_or_create, save
from registry.secrets import Secret

CONTEXT = SealContext("psk", "tenant-1", "credential-1", 1)
VALUE = Secret(b"thirty-two bytes of a secret key")


def test_what_is_sealed_opens() -> None:
    ring = KeyRing.generate()
    sealed = ring.seal(VALUE, CONTEXT)
    assert ring.open(sealed, CONTEXT) == VALUE
    assert VALUE.reveal() not in sealed
    assert ring.seal(VALUE, CONTEXT) != sealed


@pytest.mark.parametrize(
    "elsewhere",
    [
        replace(CONTEXT, purpose="ca-key"),
        replace(CONTEXT, owner="tenant-2"),
        replace(CONTEXT, object_id="credential-2"),
        replace(CONTEXT, version=2),
        SealContext("psk", "tenant-1credential", "-1", 1),  # the same characters, divided otherwise
    ],
)
def test_a_value_opens_nowhere_else(elsewhere: SealContext) -> None:
    ring = KeyRing.generate()
    with pytest.raises(SealBroken):
        ring.open(ring.seal(VALUE, CONTEXT), elsewhere)


def test_every_flipped_bit_and_every_cut_is_noticed() -> None:
    ring = KeyRing.generate()
    sealed = ring.seal(VALUE, CONTEXT)
    for place in range(len(sealed)):
        for bit in range(8):
            damaged = bytearray(sealed)
            damaged[place] ^= 1 << bit
            with pytest.raises(SealBroken):
                ring.open(bytes(damaged), CONTEXT)
        with pytest.raises(SealBroken):
            ring.open(sealed[:place], CONTEXT)


@settings(max_examples=200)
@given(st.binary(max_size=120))
def test_random_bytes_do_not_open(data: bytes) -> None:
    ring = KeyRing({"k1": Secret(bytes(32))}, "k1")
    with pytest.raises(SealBroken):
        ring.open(data, CONTEXT)


def test_a_rotated_ring_opens_the_old_and_seals_with_the_new() -> None:
    old = KeyRing.generate("k1")
    sealed = old.seal(VALUE, CONTEXT)
    new = old.with_new_active("k2")
    assert new.open(sealed, CONTEXT) == VALUE
    assert new.seal(VALUE, CONTEXT)[2:4] == b"k2"
    with pytest.raises(SealBroken):
        old.open(new.seal(VALUE, CONTEXT), CONTEXT)
    with pytest.raises(KeyRingError):
        new.with_new_active("k1")


def test_derivations_are_the_rings_active_key_first() -> None:
    old = KeyRing.generate("k1")
    new = old.with_new_active("k2")
    [one] = old.derivations(b"label", b"material")
    first, second = new.derivations(b"label", b"material")
    assert (second == one, first == one, len(one.reveal())) == (True, False, 32)
    assert old.derivations(b"labelm", b"aterial") != [one]


def test_the_file_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "key-ring.json"
    made = load_or_create(path)
    again = load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert again.open(made.seal(VALUE, CONTEXT), CONTEXT) == VALUE
    assert [p.name for p in path.parent.iterdir()] == ["key-ring.json"]


def test_a_saved_ring_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "key-ring.json"
    old = load_or_create(path)
    save(old.with_new_active("k2"), path)
    read = load_or_create(path)
    assert (read.active, read.open(old.seal(VALUE, CONTEXT), CONTEXT)) == ("k2", VALUE)


def test_a_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key-ring.json"
    load_or_create(path)
    os.chmod(path, 0o640)
    with pytest.raises(KeyRingError, match="0640"):
        load_or_create(path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"active": "k1"}',
        '{"active": "k2", "keys": {"k1": "' + "A" * 43 + '="}}',
        '{"active": "k1", "keys": {"k1": "c2VjcmV0"}}',
        '{"active": "k1", "keys": {"k1": "not base64!"}}',
        '{"active": "k1", "keys": {"k1": 7}}',
    ],
)
def test_a_file_that_is_no_ring_is_refused_without_being_quoted(tmp_path: Path, content: str) -> None:
    path = tmp_path / "key-ring.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(KeyRingError) as refused:
        load_or_create(path)
    assert str(path) in str(refused.value)
    assert "c2VjcmV0" not in str(refused.value)


def test_a_ring_shows_no_key() -> None:
    ring = KeyRing.generate()
    assert "Secret(…)" in repr(ring.to_json())
    assert ring.to_json().reveal().count("k1") == 2
    assert "object at" in repr(ring)


def test_who_waits_to_change_a_ring_gets_what_the_other_has_made_of_it(tmp_path: Path) -> None:
    path = tmp_path / "key-ring.json"
    load_or_create(path)

    def add() -> tuple[str, ...]:
        with changing(path) as ring:
            save(ring.with_new("second"), path)
        return load_or_create(path).key_ids

    with ThreadPoolExecutor(1) as others:
        with changing(path) as ring:
            waiting = others.submit(add)
            save(ring.with_new("first"), path)
        assert waiting.result(20) == ("k1", "first", "second")


def test_a_ring_that_is_not_there_is_not_changed(tmp_path: Path) -> None:
    with pytest.raises(KeyRingError, match="No such file"), changing(tmp_path / "key-ring.json"):
        pass
