"""What an operator may do: roles, permissions, and the one question `allows`.

Theory. A role grants a fixed set of permissions (`_GRANTED_BY_ROLE`); a member is granted only what its token lists;
a permission may imply a smaller one (`_IMPLIED_BY`: `devices` holds `devices:read`). The answer is membership in the
closure of those two tables and nothing else. There is no rule that denies and no order among rules, so the tables can
be read alone: what they do not name is refused, a role or a permission added without a row included.

The permissions are about the caller's own tenant. Which tenant that is, is not decided here: it comes from the token
(seed 002), and every query names it. Nothing here has state, so nothing can race and nothing can be lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from types import MappingProxyType
from typing import Protocol

from registry.errors import InvalidArgument, PermissionDenied

_SHOWN = 40
"""Characters of a refused word that a message repeats: enough to recognise a typing error."""


class Role(Enum):
    """Who an operator is; the value is the word in the token's `role` claim."""

    PLATFORM_ADMIN = "platform_admin"
    TENANT_ADMIN = "tenant_admin"
    MEMBER = "member"

    @classmethod
    def parse(cls, text: str) -> Role:
        """The role that `text` names exactly (no case folding); InvalidArgument names the known ones."""
        try:
            return cls(text)
        except ValueError:
            raise InvalidArgument(_unknown("role", text, cls), field="role") from None


class Permission(Enum):
    """One thing that may be allowed; the value is the word in the token's `permissions` claim."""

    DEVICES = "devices"
    DEVICES_READ = "devices:read"
    PROFILES = "profiles"
    PROFILES_READ = "profiles:read"
    PROVISIONING = "provisioning"
    PROVISIONING_READ = "provisioning:read"
    TELEMETRY_READ = "telemetry:read"
    EVENTS_READ = "events:read"
    AUDIT_READ = "audit:read"
    SESSIONS = "sessions"
    SESSIONS_READ = "sessions:read"
    CA = "ca"

    @classmethod
    def parse(cls, text: str) -> Permission:
        """The permission that `text` names exactly (no case folding); InvalidArgument names the known ones."""
        try:
            return cls(text)
        except ValueError:
            raise InvalidArgument(_unknown("permission", text, cls), field="permissions") from None


class Caller(Protocol):
    """Whoever holds a role and listed permissions: an `OperatorPrincipal`."""

    @property
    def role(self) -> Role: ...

    @property
    def permissions(self) -> frozenset[Permission]: ...


def allows(caller: Caller, permission: Permission) -> bool:
    """Whether `caller` may do what `permission` names, in its own tenant."""
    return permission in held(caller.role, caller.permissions)


def require(caller: Caller, permission: Permission) -> None:
    """Return if `allows`; otherwise raise PermissionDenied that names the permission that was needed."""
    if allows(caller, permission):
        return
    holds = ", ".join(sorted(each.value for each in held(caller.role, caller.permissions))) or "none"
    raise PermissionDenied(
        f"this needs the permission {permission.value}; the role {caller.role.value} here holds: {holds}"
    )


def held(role: Role, listed: Iterable[Permission]) -> frozenset[Permission]:
    """Every permission of a caller with `role` whose token lists `listed`: granted, listed and implied."""
    direct = _GRANTED_BY_ROLE.get(role, _NOTHING).union(listed)
    implied = (_IMPLIED_BY.get(permission, _NOTHING) for permission in direct)
    return direct.union(*implied)


_NOTHING: frozenset[Permission] = frozenset()

_GRANTED_BY_ROLE: Mapping[Role, frozenset[Permission]] = MappingProxyType(
    {
        Role.PLATFORM_ADMIN: frozenset(Permission),
        Role.TENANT_ADMIN: frozenset(Permission),
        Role.MEMBER: _NOTHING,
    }
)

_IMPLIED_BY: Mapping[Permission, frozenset[Permission]] = MappingProxyType(
    {
        Permission.DEVICES: frozenset({Permission.DEVICES_READ}),
        Permission.PROFILES: frozenset({Permission.PROFILES_READ}),
        Permission.PROVISIONING: frozenset({Permission.PROVISIONING_READ}),
        Permission.SESSIONS: frozenset({Permission.SESSIONS_READ}),
    }
)
"""One level deep: nothing that is implied implies more (a test holds this)."""


def _unknown(what: str, text: str, known: type[Enum]) -> str:
    words = ", ".join(str(each.value) for each in known)
    return f"unknown {what} {text[:_SHOWN]!a}; known are: {words}"
