"""Places of refusals that are held: what names nobody known takes none of those of devices that are known."""

from __future__ import annotations

from uuid import uuid4

import pytest

from registry import refusals as subject
from registry.events import EventKind
from registry.model import Contact, DeviceId, TenantId, Transport
from registry.refusals import Refusals
from tests.http_api import Api, api

__all__ = ["api"]


def note(refusals: Refusals, tenant_id: TenantId | None) -> None:
    refusals.note(
        tenant_id=tenant_id,
        device_id=DeviceId(uuid4()),
        kind=EventKind.AUTH_REFUSED,
        reason="unknown api_key",
        contact=Contact(Transport.MQTT, "192.0.2.9:1", "c"),
        detail={},
    )


@pytest.mark.parametrize("invented_first", [True, False])
async def test_each_kind_has_its_own_places(api: Api, monkeypatch: pytest.MonkeyPatch, invented_first: bool) -> None:
    monkeypatch.setattr(subject, "MAX_NAMED", 4)
    monkeypatch.setattr(subject, "MAX_KEYS", 5)
    mine = Refusals(api.database, api.registry.feed)
    for tenant_id, places in sorted(
        [(None, 4), (api.tenant_id, 5)], key=lambda kind: (kind[0] is None) != invented_first
    ):
        before = mine.dropped
        for _ in range(places):
            note(mine, tenant_id)
        assert mine.dropped == before
        note(mine, tenant_id)
        assert mine.dropped == before + 1
