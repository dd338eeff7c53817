"""Revocation lists: what was revoked before is named by whoever is asked next, under numbers that only rise."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from certs.crl import RevocationReason, crl_pem
from registry.credentials import RotateRequest
from registry.devices import DeviceChanges
from registry.errors import NotFound, Unavailable
from registry.model import DeviceStatus, TenantId
from registry.ports import IssuedCertificate
from registry.registration_tokens import Provisioned
from registry.revocation_lists import RevocationList, reason_of
from registry.storage import certificates
from registry.storage.database import Database
from registry.trust import roll_over
from tests.certificate_services import CertificateServices, DeviceKey, leaf, openssl, verify
from tests.services import NOON, OPERATOR


@pytest.fixture
async def services(database: Database) -> CertificateServices:
    return await CertificateServices.open(database)


async def revoke(services: CertificateServices, done: Provisioned, reason: str = "revoked by operator") -> None:
    await services.credentials.revoke(done.tenant_id, done.device_id, done.issued.credential_id, OPERATOR, reason)


def opened(made: RevocationList) -> x509.CertificateRevocationList:
    return x509.load_der_x509_crl(made.der)


def reasons(made: RevocationList, issued: Sequence[IssuedCertificate]) -> list[str | None]:
    """The reason of each certificate in the list: None where it is not in it."""
    found: list[str | None] = []
    for each in issued:
        entry = opened(made).get_revoked_certificate_by_serial_number(leaf(each).serial_number)
        if entry is None:
            found.append(None)
            continue
        try:
            found.append(entry.extensions.get_extension_for_class(x509.CRLReason).value.reason.name)
        except x509.ExtensionNotFound:
            found.append("unspecified")
    return found


async def test_openssl_reads_the_list_and_refuses_who_is_in_it(
    services: CertificateServices, tenant_id: TenantId, tmp_path: Path
) -> None:
    revoked, spared = await services.provisioned(tenant_id), await services.provisioned(tenant_id)
    await revoke(services, revoked, "key_compromise")
    made = await services.lists.current()
    for name, each in (("list", made), ("root-list", (await services.lists.all())[-1])):
        (tmp_path / f"{name}.pem").write_bytes(crl_pem(each.der))
    (tmp_path / "list.der").write_bytes(made.der)
    issuer = services.trust.authorities.active
    (tmp_path / "issuer.der").write_bytes(issuer.certificate_der)
    openssl("x509", "-inform", "DER", "-in", str(tmp_path / "issuer.der"), "-out", str(tmp_path / "issuer.pem"))

    read = openssl(
        *("crl", "-inform", "DER", "-in", str(tmp_path / "list.der"), "-noout", "-text"),
        *("-CAfile", str(tmp_path / "issuer.pem"), "-verify"),
    )
    assert "verify OK" in read.stderr
    assert "Key Compromise" in read.stdout
    assert f"{leaf(revoked.issued).serial_number:X}" in read.stdout.replace(":", "")
    lists = ("-CRLfile", str(tmp_path / "list.pem"), "-crl_check")
    assert "certificate revoked" in verify(tmp_path, services, revoked.issued, *lists)
    assert verify(tmp_path, services, spared.issued, *lists).endswith("OK\n")
    whole = ("-CRLfile", str(tmp_path / "list.pem"), "-CRLfile", str(tmp_path / "root-list.pem"), "-crl_check_all")
    assert verify(tmp_path, services, spared.issued, *whole).endswith("OK\n")


async def test_the_number_rises_with_each_list_and_nothing_new_makes_no_list(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    done = [await services.provisioned(tenant_id) for _ in range(3)]
    empty = await services.lists.current()
    assert (empty.number, len(opened(empty))) == (1, 0)
    assert (empty.this_update, empty.next_update) == (NOON, NOON + timedelta(days=7))
    assert await services.lists.current() == empty
    for count, each in enumerate(done, 1):
        await revoke(services, each)
        made = await services.lists.current()
        number = opened(made).extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        assert (made.number, number, len(opened(made))) == (1 + count, 1 + count, count)
    assert await services.lists.current() == made


async def test_every_way_to_end_has_its_reason(services: CertificateServices, tenant_id: TenantId) -> None:
    key = DeviceKey.new()
    plain, deleted, rotated, inactive, spared = [
        await services.provisioned(tenant_id, key if n == 2 else None) for n in range(5)
    ]
    await revoke(services, plain)
    await services.devices.delete(tenant_id, deleted.device_id, OPERATOR)
    await services.credentials.rotate(
        tenant_id, rotated.device_id, RotateRequest(overlap_seconds=0, csr=key.csr()), OPERATOR
    )
    await services.devices.update(tenant_id, inactive.device_id, DeviceChanges(status=DeviceStatus.INACTIVE), OPERATOR)
    made = await services.lists.current()
    everybody = [each.issued for each in (plain, deleted, rotated, inactive, spared)]
    assert reasons(made, everybody) == ["unspecified", "cessation_of_operation", "superseded", None, None]


async def test_a_superseded_certificate_is_listed_when_its_overlap_ends(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    done = await services.provisioned(tenant_id)
    await services.credentials.rotate(
        tenant_id, done.device_id, RotateRequest(overlap_seconds=3600, csr=DeviceKey.new().csr()), OPERATOR
    )
    assert reasons(await services.lists.current(), [done.issued]) == [None]
    services.clock.advance(seconds=3600)
    made = await services.lists.current()
    assert reasons(made, [done.issued]) == ["superseded"]
    [entry] = opened(made)
    assert entry.revocation_date_utc == NOON + timedelta(hours=1)


async def test_a_list_is_made_anew_half_way_to_its_end(services: CertificateServices) -> None:
    first = await services.lists.current()
    services.clock.advance(days=3.4)
    assert await services.lists.current() == first
    services.clock.advance(days=0.1)
    second = await services.lists.current()
    assert (second.number, second.this_update) == (2, NOON + timedelta(days=3.5))


async def test_an_entry_leaves_after_one_list_beyond_the_certificates_own_end(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    done = await services.provisioned(tenant_id)
    await revoke(services, done)
    assert len(opened(await services.lists.current())) == 1
    services.clock.now = done.issued.not_after + timedelta(hours=1)
    beyond = await services.lists.current()
    assert len(opened(beyond)) == 1
    services.clock.advance(days=4)
    assert (await services.lists.current()).number == beyond.number + 1
    assert len(opened(await services.lists.current())) == 0


async def test_a_list_of_a_clock_that_was_ahead_is_replaced_by_one_of_now(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    revoked, rotated = await services.provisioned(tenant_id), await services.provisioned(tenant_id)
    await services.credentials.rotate(
        tenant_id, rotated.device_id, RotateRequest(overlap_seconds=3600, csr=DeviceKey.new().csr()), OPERATOR
    )
    services.clock.now = rotated.issued.not_after - timedelta(days=1)
    ahead = await services.lists.current()
    assert reasons(ahead, [revoked.issued, rotated.issued]) == [None, "superseded"]
    services.clock.now = revoked.issued.not_after + timedelta(days=1)
    beyond = await services.lists.current()
    services.clock.now = NOON
    await revoke(services, revoked)
    made = await services.lists.current()
    assert (made.number, made.this_update) == (beyond.number + 1, NOON)
    assert reasons(made, [revoked.issued, rotated.issued]) == ["unspecified", None]
    assert await services.lists.current() == made
    services.clock.advance(seconds=3600)
    assert reasons(await services.lists.current(), [revoked.issued, rotated.issued]) == ["unspecified", "superseded"]


async def test_another_nodes_clock_may_be_a_little_ahead(services: CertificateServices, tenant_id: TenantId) -> None:
    done = await services.provisioned(tenant_id)
    services.clock.advance(seconds=5)
    first = await services.lists.current()
    services.clock.advance(seconds=-5)
    assert await services.lists.current() == first
    await revoke(services, done)
    made = await services.lists.current()
    assert (made.number, made.this_update) == (first.number + 1, first.this_update)
    assert reasons(made, [done.issued]) == ["unspecified"]


async def test_two_nodes_give_one_list_and_see_each_others_revocations(
    dsn: str, services: CertificateServices, tenant_id: TenantId
) -> None:
    done = [await services.provisioned(tenant_id) for _ in range(8)]
    second = await Database.open(dsn)
    try:
        other = await CertificateServices.open(second, ring=services.ring, clock=services.clock)
        for n, each in enumerate(done):
            await revoke(services if n % 2 else other, each)
            mine, theirs, again = await asyncio.gather(
                services.lists.current(), other.lists.current(), services.lists.current()
            )
            assert mine == theirs == again
            assert mine.number == n + 1
            assert reasons(mine, [each.issued]) == ["unspecified"]
    finally:
        await second.close()


async def test_a_number_is_taken_by_one_node_at_a_time(
    dsn: str, services: CertificateServices, tenant_id: TenantId
) -> None:
    done = await services.provisioned(tenant_id)
    authority_id = services.trust.live.id_of(services.trust.authorities.active)
    first = await services.lists.current()
    await revoke(services, done)
    second = await Database.open(dsn, size=2)
    try:
        async with second.transaction() as connection:
            await certificates.list_state(connection, authority_id, NOON, hold=True)
            asked = asyncio.create_task(services.lists.current())
            async with asyncio.timeout(10), second.connection() as watcher:
                while not await watcher.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    assert not asked.done()
            await certificates.take_into_list(connection, authority_id, NOON, first.number + 1)
            await certificates.put_list(
                connection, authority_id, first.number + 1, b"the other node's", NOON, first.next_update
            )
        made = await asked
    finally:
        await second.close()
    assert (made.number, made.der) == (first.number + 1, b"the other node's")


async def test_lists_asked_for_while_revocations_commit_miss_none_that_was_before(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    done = [await services.provisioned(tenant_id) for _ in range(20)]
    numbers: list[int] = []

    async def revoke_and_look(each: Provisioned) -> None:
        await revoke(services, each)
        made = await services.lists.current()
        numbers.append(made.number)
        assert reasons(made, [each.issued]) == ["unspecified"]

    await asyncio.gather(*(revoke_and_look(each) for each in done))
    assert len(opened(await services.lists.current())) == 20
    assert max(numbers) <= 20


async def test_a_former_authority_goes_on_with_its_list(services: CertificateServices, tenant_id: TenantId) -> None:
    done = await services.provisioned(tenant_id)
    former = services.trust.authorities.active.fingerprint
    await roll_over(services.database, services.ring, clock=services.clock, random=os.urandom, actor=OPERATOR)
    await services.trust.live.refresh()
    await revoke(services, done)
    active = await services.lists.current()
    assert active.issuer != former
    assert reasons(active, [done.issued]) == [None]
    assert reasons(await services.lists.current(former.upper()), [done.issued]) == ["unspecified"]
    assert [each.issuer for each in await services.lists.all()][1] == former
    with pytest.raises(NotFound):
        await services.lists.current("00" * 32)


async def test_without_the_database_the_remembered_list_is_given_until_its_end(
    services: CertificateServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await services.lists.current()

    def away() -> None:
        raise Unavailable("the database is not available")

    monkeypatch.setattr(services.lists._database, "connection", away)
    assert await services.lists.current() == made
    services.clock.advance(days=7)
    with pytest.raises(Unavailable):
        await services.lists.current()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("keyCompromise", RevocationReason.KEY_COMPROMISE),
        ("key compromise", RevocationReason.KEY_COMPROMISE),
        ("affiliation-changed", RevocationReason.AFFILIATION_CHANGED),
        ("retired: its successor was used", RevocationReason.SUPERSEDED),
        ("lost in the harbour", RevocationReason.UNSPECIFIED),
        ("", RevocationReason.UNSPECIFIED),
    ],
)
def test_reason_codes(words: str, code: RevocationReason) -> None:
    assert reason_of(words) is code
