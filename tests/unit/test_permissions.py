"""The whole matrix of roles and permissions, and what an absent rule means."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from registry.errors import ErrorCode, InvalidArgument, PermissionDenied
from registry.permissions import Permission, Role, allows, held, require

# What a member who lists exactly this one permission may do: written out, not derived from the module's own tables.
MEMBER_MATRIX: dict[str, set[str]] = {
    "devices": {"devices", "devices:read"},
    "devices:read": {"devices:read"},
    "profiles": {"profiles", "profiles:read"},
    "profiles:read": {"profiles:read"},
    "provisioning": {"provisioning", "provisioning:read"},
    "provisioning:read": {"provisioning:read"},
    "telemetry:read": {"telemetry:read"},
    "events:read": {"events:read"},
    "audit:read": {"audit:read"},
    "sessions": {"sessions", "sessions:read"},
    "sessions:read": {"sessions:read"},
    "ca": {"ca"},
}


@dataclass(frozen=True, slots=True)
class Operator:
    role: Role
    permissions: frozenset[Permission]


def member(*listed: str) -> Operator:
    return Operator(Role.MEMBER, frozenset(Permission(word) for word in listed))


def test_the_matrix_has_a_row_for_every_permission() -> None:
    assert set(MEMBER_MATRIX) == {permission.value for permission in Permission}


@pytest.mark.parametrize("needed", list(Permission))
@pytest.mark.parametrize("listed", MEMBER_MATRIX)
def test_a_member_may_do_what_its_token_lists_and_what_that_implies(listed: str, needed: Permission) -> None:
    assert allows(member(listed), needed) is (needed.value in MEMBER_MATRIX[listed])


@pytest.mark.parametrize("needed", list(Permission))
def test_a_member_without_permissions_may_do_nothing(needed: Permission) -> None:
    assert not allows(member(), needed)


@pytest.mark.parametrize("needed", list(Permission))
@pytest.mark.parametrize("listed", [frozenset(), frozenset({Permission.CA}), frozenset(Permission)])
@pytest.mark.parametrize("role", [Role.PLATFORM_ADMIN, Role.TENANT_ADMIN])
def test_an_admin_may_do_everything_whatever_its_token_lists(
    role: Role, listed: frozenset[Permission], needed: Permission
) -> None:
    assert allows(Operator(role, listed), needed)


@pytest.mark.parametrize("one", list(Permission))
@pytest.mark.parametrize("other", list(Permission))
def test_two_listed_permissions_allow_their_union(one: Permission, other: Permission) -> None:
    both = held(Role.MEMBER, [one, other])
    assert {each.value for each in both} == MEMBER_MATRIX[one.value] | MEMBER_MATRIX[other.value]


def test_what_is_implied_implies_nothing_more() -> None:
    for listed in Permission:
        once = held(Role.MEMBER, [listed])
        assert held(Role.MEMBER, once) == once


def test_only_the_enumeration_itself_is_a_permission() -> None:
    admin = Operator(Role.TENANT_ADMIN, frozenset())
    assert not allows(admin, "devices")  # type: ignore[arg-type]  # a word is not a permission


def test_an_unknown_role_holds_nothing_beyond_its_list() -> None:
    assert held("owner", []) == frozenset()  # type: ignore[arg-type]  # an absent rule refuses


def test_require_returns_or_names_what_was_needed_and_what_is_held() -> None:
    require(member("devices"), Permission.DEVICES_READ)
    with pytest.raises(PermissionDenied) as refusal:
        require(member("devices", "ca"), Permission.AUDIT_READ)
    assert refusal.value.code is ErrorCode.PERMISSION_DENIED
    assert "audit:read" in refusal.value.message
    assert "ca, devices, devices:read" in refusal.value.message


def test_require_says_so_when_nothing_is_held() -> None:
    with pytest.raises(PermissionDenied, match=r"permission ca; the role member here holds: none"):
        require(member(), Permission.CA)


@pytest.mark.parametrize("word", MEMBER_MATRIX)
def test_permissions_are_parsed_from_their_word(word: str) -> None:
    assert Permission.parse(word).value == word


@pytest.mark.parametrize("word", ["platform_admin", "tenant_admin", "member"])
def test_roles_are_parsed_from_their_word(word: str) -> None:
    assert Role.parse(word).value == word


@pytest.mark.parametrize("word", ["", "Devices", "devices ", "devices:write", "ca:read", "*", "DEVICES"])
def test_other_words_are_no_permissions(word: str) -> None:
    with pytest.raises(InvalidArgument, match="telemetry:read") as refusal:
        Permission.parse(word)
    assert refusal.value.field == "permissions"


@pytest.mark.parametrize("word", ["", "admin", "MEMBER", "member\n"])
def test_other_words_are_no_roles(word: str) -> None:
    with pytest.raises(InvalidArgument, match="tenant_admin") as refusal:
        Role.parse(word)
    assert refusal.value.field == "role"


def test_a_refused_word_cannot_forge_a_line_or_fill_the_log() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        Permission.parse("x\n\x1b[31m\u202e" + "y" * 10_000)
    assert refusal.value.message.isprintable()
    assert refusal.value.message.isascii()
    assert len(refusal.value.message) < 400
