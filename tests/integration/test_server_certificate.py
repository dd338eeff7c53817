"""The listeners' own certificate is renewed whatever becomes of the file that clients read."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from adapters.tls.context import ServerCredentials, TlsContext
from edge import serve
from edge.config import load
from edge.server_certificate import ServerCertificate
from registry.storage.database import Database
from registry.trust import roll_over
from tests.certificate_services import CertificateServices
from tests.nodes import until
from tests.services import OPERATOR


class Listener:
    """Remembers what it was given to show."""

    def __init__(self) -> None:
        self.shown: list[ServerCredentials] = []

    def replace(self, credentials: ServerCredentials) -> None:
        self.shown.append(credentials)


async def test_after_a_roll_over_a_full_disk_keeps_no_listener_from_its_new_certificate(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serve, "AUTHORITIES_SECONDS", 0.0)
    monkeypatch.setattr(serve, "CHECK_SECONDS", 0.0)
    services = await CertificateServices.open(database)
    config = load(None, tmp_path, {"HOME": str(tmp_path)}, directory=tmp_path)
    certificate = ServerCertificate(config, services.trust, services.certificates, services.clock)
    chain = tmp_path / "there" / "ca-chain.pem"
    chain.parent.mkdir()
    certificate.write_chain(chain)
    await certificate.load()
    chain.parent.rename(tmp_path / "away")  # as good as full
    listener = Listener()
    renewing = asyncio.create_task(serve._renew(certificate, cast(Sequence[TlsContext], [listener]), chain))
    try:
        await roll_over(database, services.ring, clock=services.clock, random=os.urandom, actor=OPERATOR)
        await services.trust.live.refresh()
        with caplog.at_level(logging.ERROR):
            await until(lambda: listener.shown or renewing.done())
            assert not renewing.done()
        assert "certificate.chain_unwritten" in caplog.messages
        (tmp_path / "away").rename(chain.parent)
        await until(lambda: chain.read_bytes() == services.certificates.chain_pem())
    finally:
        renewing.cancel()
        await asyncio.wait([renewing])


async def test_a_certificate_that_has_not_begun_since_the_clock_was_set_back_is_replaced(
    database: Database, tmp_path: Path
) -> None:
    services = await CertificateServices.open(database)
    config = load(None, tmp_path, {"HOME": str(tmp_path)}, directory=tmp_path)
    certificate = ServerCertificate(config, services.trust, services.certificates, services.clock)
    services.clock.advance(days=10)
    await certificate.load()
    assert not certificate.due()
    services.clock.advance(days=-10)
    assert certificate.due()
    await certificate.load()
    assert not certificate.due()
