"""What a device tried and may not, kept for its operator: MQTT tells the device little of it, and 3.1.1 nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from registry.events import EventKind
from registry.sessions import Session as RegistrySession

if TYPE_CHECKING:
    from adapters.mqtt.server import MqttServer

MAX_TEXT: Final = 200
"""Characters of a reason that is told, to the device or to its operator."""


def note_refusal(server: MqttServer, session: RegistrySession, reason: str) -> None:
    """Keep for the operator what a device tried and may not; repetitions are counted together."""
    server.registry.refusals.note(
        tenant_id=session.tenant_id,
        device_id=session.device_id,
        kind=EventKind.AUTH_REFUSED,
        reason=reason,
        contact=session.contact,
        detail={"credential_id": str(session.identity.credential_id)},
    )
