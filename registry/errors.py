"""Domain errors. They know no protocol: each adapter maps a code to its own wire once, at its border.

The codes are gRPC's (CONTRACT §2). A message says what was, and what was allowed, and may be shown to the caller.
`Unauthenticated` is the exception: its `reason` is for the operator's log and timeline only, and its message is the
same whatever the reason, so that unknown, wrong, expired, disabled and revoked look alike to the peer (DESIGN, the
funnel, 6). `Refused` does the same for provisioning (seed 001: a uniform PermissionDenied).
"""

from __future__ import annotations

from enum import Enum


class ErrorCode(Enum):
    """What kind of failure it is; the value is the word on the wire."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    UNAVAILABLE = "UNAVAILABLE"
    INTERNAL = "INTERNAL"


class RegistryError(Exception):
    """Any answer of the core that is not a success. `message` is safe to show to the caller."""

    code = ErrorCode.INTERNAL

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        """Seconds after which another try is worth it, where that is known."""


class InvalidArgument(RegistryError):
    """The request is malformed whatever the state of the system; `field` names the culprit where there is one."""

    code = ErrorCode.INVALID_ARGUMENT

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class Unauthenticated(RegistryError):
    """Nobody was recognised. Every reason looks alike from outside; `reason` is for the operator only."""

    code = ErrorCode.UNAUTHENTICATED
    PUBLIC_MESSAGE = "valid credentials are required"

    def __init__(self, reason: str) -> None:
        super().__init__(self.PUBLIC_MESSAGE)
        self.reason = reason


class PermissionDenied(RegistryError):
    """The caller is known and may not do this."""

    code = ErrorCode.PERMISSION_DENIED


class Refused(PermissionDenied):
    """A provisioning attempt that is turned away. Every reason looks alike from outside (seed 001)."""

    PUBLIC_MESSAGE = "provisioning refused"

    def __init__(self, reason: str) -> None:
        super().__init__(self.PUBLIC_MESSAGE)
        self.reason = reason


class NotFound(RegistryError):
    """No such object in the caller's tenant."""

    code = ErrorCode.NOT_FOUND


class AlreadyExists(RegistryError):
    """The name or identifier is taken."""

    code = ErrorCode.ALREADY_EXISTS


class FailedPrecondition(RegistryError):
    """The request is well-formed but the object is not in a state that allows it."""

    code = ErrorCode.FAILED_PRECONDITION


class ResourceExhausted(RegistryError):
    """A limit is reached; nothing was done."""

    code = ErrorCode.RESOURCE_EXHAUSTED


class Unavailable(RegistryError):
    """The core cannot answer now (the database is away, a queue is full); nothing was acknowledged."""

    code = ErrorCode.UNAVAILABLE

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)
