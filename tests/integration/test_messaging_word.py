"""Word for a node, of sessions and connections that it has no more, is heard however often the database is away.

What stands between the reading of a word and its end is cut at each of its steps, and the next pull is whole. Nobody
would say it again: a session that is served elsewhere, or nowhere, sends its old owner nothing more.
"""

from __future__ import annotations

from types import ModuleType
from unittest import mock

import pytest

from registry.errors import Unavailable
from registry.messaging_values import SessionKey
from registry.model import DeviceId, TenantId
from registry.storage import messaging, messaging_sessions
from tests.messaging_brokers import Seconds, broker_on


@pytest.mark.parametrize(
    ("module", "step"), [(messaging_sessions, "remove_word"), (messaging, "relays"), (messaging, "waiting")]
)
async def test_word_is_heard_though_the_pull_that_read_it_failed(
    dsn: str, tenant_id: TenantId, device_id: DeviceId, module: ModuleType, step: str
) -> None:
    async def away(*_: object) -> None:
        raise Unavailable("the database is away")

    async with broker_on(dsn, "a", Seconds()) as a, broker_on(dsn, "b", Seconds()) as b:
        key = SessionKey(tenant_id, device_id, "s")
        served, _ = await a.connect(key)
        await b.connect(key, clean=True)  # ends the session, and begins another one
        with mock.patch.object(module, step, away), pytest.raises(Unavailable):
            await a.pull()
        await a.pull()
        assert set(a.evictions) == {served.ownership}
        assert {told for told, _ in a.taken_elsewhere} == {key}
        heard = len(a.evictions), len(a.taken_elsewhere)
        await a.pull()
        assert (len(a.evictions), len(a.taken_elsewhere)) == heard
