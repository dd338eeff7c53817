"""What all nodes share: a new issuing authority reaches running nodes, a key ring is rotated and no secret is lost."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from certs.chains import unbundle
from certs.keys import generate_p256
from registry import psk
from registry.devices import NewDevice
from registry.errors import InvalidArgument, Unavailable
from registry.events import SYSTEM
from registry.feed import Feed
from registry.model import Contact, CredentialKind, NodeId, PskIdentity, TenantId, Transport
from registry.ports import IssuedCertificate
from registry.registration_tokens import NewToken
from registry.sealing import KeyRing, KeyRingError, load_or_create
from registry.secrets import Secret
from registry.storage import trust as stored
from registry.storage.database import Database
from registry.templates import NewTemplate, claim_psk, claim_psk_context
from registry.trust import (
    RESEAL_CHUNK,
    Resealed,
    Trust,
    WrongKeyRing,
    drop_key,
    open_trust,
    reseal,
    roll_over,
    rotate_key_ring,
    stage_key,
)
from tests.certificate_services import CertificateServices, DeviceKey, leaf, openssl, right, verify
from tests.nodes import until
from tests.services import CONTACT, OPERATOR, Clock, Services


@pytest.fixture
async def services(database: Database) -> CertificateServices:
    return await CertificateServices.open(database)


async def roll(services: CertificateServices) -> str:
    """A roll-over by somebody else: `services` is not told."""
    done = await roll_over(services.database, services.ring, clock=services.clock, random=os.urandom, actor=OPERATOR)
    return done.active


def issuer(issued: IssuedCertificate) -> bytes:
    return unbundle(issued.chain_pem)[0]


# -- roll-over ---------------------------------------------------------------------------------------------------------


async def test_two_first_starts_at_once_make_one_set(dsn: str, database: Database) -> None:
    ring, second = KeyRing.generate(), await Database.open(dsn)
    try:
        one, two = await asyncio.gather(
            CertificateServices.open(database, ring=ring), CertificateServices.open(second, ring=ring)
        )
    finally:
        await second.close()
    assert one.trust.authorities.chain == two.trust.authorities.chain
    assert len(one.trust.authorities.chain) == 2
    assert [key.kid for key in one.trust.issuer_keys] == [key.kid for key in two.trust.issuer_keys]


async def test_after_a_roll_over_the_new_authority_signs_without_a_restart(
    services: CertificateServices, tenant_id: TenantId, tmp_path: Path
) -> None:
    before = await services.provisioned(tenant_id)
    former = services.trust.authorities.active.fingerprint
    active = await roll(services)
    assert services.trust.authorities.active.fingerprint == former  # this node has heard nothing

    after = await services.provisioned(tenant_id)
    assert services.trust.authorities.active.fingerprint == active != former
    assert issuer(after.issued) != issuer(before.issued)
    for each in (before, after):
        assert verify(tmp_path, services, each.issued).endswith("OK\n")
    chain = unbundle(services.certificates.chain_pem())
    assert chain == services.trust.authorities.chain
    assert [issuer(after.issued), issuer(before.issued)] == list(chain[:2])
    rows = await services.certificate_rows("issued")
    assert len({row["authority_id"] for row in rows}) == 2


async def test_servers_are_certified_by_the_new_authority_too(services: CertificateServices) -> None:
    active = await roll(services)
    made = await services.certificates.issue_server(generate_p256(os.urandom), ["localhost"])
    assert services.trust.authorities.active.fingerprint == active
    first, second = x509.load_pem_x509_certificates(made.chain_pem)
    first.verify_directly_issued_by(second)
    assert second == services.trust.authorities.active.certificate


async def test_a_lost_answer_is_given_again_with_the_former_issuer(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    made, key = await services.tokens.create(tenant_id, NewToken("Pump"), OPERATOR), DeviceKey.new()
    first = await services.tokens.provision(made.secret, key.csr(), CONTACT)
    await roll(services)
    await services.trust.live.refresh()
    assert (await services.tokens.provision(made.secret, key.csr(), CONTACT)).issued == first.issued


async def test_a_node_that_has_heard_of_no_roll_over_gives_no_answer_again_with_the_wrong_issuer(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    """The device asks another node for what the first one has answered, sooner than the event comes there."""
    other = await CertificateServices.open(services.database, ring=services.ring, clock=services.clock)
    made, key = await services.tokens.create(tenant_id, NewToken("Pump"), OPERATOR), DeviceKey.new()
    await roll(services)
    first = await services.tokens.provision(made.secret, key.csr(), CONTACT)
    with pytest.raises(Unavailable, match="being replaced"):
        await other.tokens.provision(made.secret, key.csr(), CONTACT)
    await other.trust.live.stop()  # what it has begun to read
    assert (await other.tokens.provision(made.secret, key.csr(), CONTACT)).issued == first.issued


async def test_a_node_that_has_heard_of_no_roll_over_takes_nothing_of_the_new_authority_for_foreign(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    """Registering our own certificate as a foreign one would undo its revocation."""
    other = await CertificateServices.open(services.database, ring=services.ring, clock=services.clock)
    await roll(services)
    done = await services.provisioned(tenant_id)
    await services.credentials.revoke(tenant_id, done.device_id, done.issued.credential_id, OPERATOR)
    with pytest.raises(InvalidArgument, match="this server's own authority"):
        await other.foreign.register(tenant_id, done.device_id, done.issued.certificate_pem, OPERATOR)


async def test_a_renewal_is_signed_by_the_new_authority(
    services: CertificateServices, tenant_id: TenantId, tmp_path: Path
) -> None:
    key = DeviceKey.new()
    done = await services.provisioned(tenant_id, key)
    await roll(services)
    fresh = await services.enrolment.renew(right(done), key.renewal(done.issued), CONTACT)
    assert issuer(fresh) == services.trust.authorities.active.certificate_der
    assert leaf(fresh).subject == leaf(done.issued).subject
    assert verify(tmp_path, services, fresh).endswith("OK\n")


@asynccontextmanager
async def following(database: Database, trust: Trust) -> AsyncIterator[Feed]:
    feed = Feed(database, NodeId("follower"))
    feed.add_follower(trust.live)
    await feed.start()
    running = asyncio.create_task(feed.run())
    try:
        yield feed
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await trust.live.stop()
        await feed.close()


async def test_the_event_reaches_running_nodes_and_no_tenant(
    services: CertificateServices, tenant_id: TenantId
) -> None:
    async with following(services.database, services.trust) as feed:
        active = await roll(services)
        feed.hint()
        await until(lambda: services.trust.authorities.active.fingerprint == active)
    assert await services.kinds(SYSTEM) == ["ca.rolled_over"]
    assert await services.kinds(tenant_id) == []
    [row] = await services.rows("SELECT tenant_id, action FROM audit WHERE object_type = 'authority'")
    assert tuple(row) == (None, "roll_over")


async def test_roll_overs_at_once_leave_one_active_authority(services: CertificateServices) -> None:
    made = await asyncio.gather(*(roll(services) for _ in range(4)))
    await services.trust.live.refresh()
    assert len(set(made)) == 4
    assert services.trust.authorities.active.fingerprint in made
    assert len(services.trust.authorities.issuing) == 5
    assert not await services.trust.live.refresh()


async def test_issuing_goes_on_while_authorities_change(services: CertificateServices, tenant_id: TenantId) -> None:
    async def rolls() -> None:
        for _ in range(2):
            await roll(services)

    done, _ = await asyncio.gather(
        asyncio.gather(*(services.provisioned(tenant_id, hardware_id=f"HW-{n}") for n in range(20))), rolls()
    )
    assert len({leaf(each.issued).serial_number for each in done}) == 20
    chain = set(services.trust.authorities.chain)
    await services.trust.live.refresh()
    assert {issuer(each.issued) for each in done} <= chain | set(services.trust.authorities.chain)


async def test_an_authority_of_before_leaves_the_chain_when_it_has_expired(services: CertificateServices) -> None:
    former = services.trust.authorities.active
    services.clock.advance(days=4 * 365)
    await roll(services)
    await services.trust.live.refresh()
    assert len(services.trust.authorities.chain) == 3
    services.clock.now = former.not_after + timedelta(days=1)
    reopened = await open_trust(services.database, services.ring, clock=services.clock, random=os.urandom)
    assert former.certificate_der not in reopened.authorities.chain
    assert len(reopened.authorities.chain) == 2


# -- the key ring ------------------------------------------------------------------------------------------------------


async def devices_with_psks(services: Services, tenant_id: TenantId, count: int) -> dict[str, Secret[bytes]]:
    """Identities and keys."""
    made: dict[str, Secret[bytes]] = {}
    for n in range(count):
        new = NewDevice("Meter", f"HW-{n}", credential_type=CredentialKind.PSK)
        issued = (await services.devices.register(tenant_id, new, OPERATOR)).issued
        assert isinstance(issued, psk.IssuedPsk)
        made[issued.identity] = issued.key
    return made


async def offered(services: CertificateServices, identity: str) -> Secret[bytes]:
    contact = Contact(Transport.COAP, "192.0.2.9:5684", "corr-3")
    return (await services.resolver.offer(PskIdentity(identity.encode()), contact)).key


async def test_every_sealed_value_opens_after_the_old_key_is_gone(
    database: Database, tenant_id: TenantId, tmp_path: Path
) -> None:
    path = tmp_path / "key-ring.json"
    ring = load_or_create(path)
    services = await CertificateServices.open(database, ring=ring)
    keys = await devices_with_psks(services, tenant_id, 3)
    template = await services.templates.create(tenant_id, NewTemplate("Batch"), OPERATOR)
    await roll(services)

    _, report = await rotate_key_ring(database, ring, path, actor=OPERATOR)
    assert (report.active, report.resealed, report.left) == ("k2", 3 + 1 + 1 + 3 + 1, 0)
    assert await drop_key(database, path, "k1", actor=OPERATOR)
    assert await services.kinds(SYSTEM) == ["ca.rolled_over", "key_ring.rotated"]

    alone = load_or_create(path)
    assert alone.key_ids == ("k2",)
    reopened = await CertificateServices.open(database, ring=alone)
    await services.trust.live.refresh()
    assert reopened.trust.authorities.chain == services.trust.authorities.chain
    assert [k.kid for k in reopened.trust.issuer_keys] == [k.kid for k in services.trust.issuer_keys]
    for identity, key in keys.items():
        assert await offered(reopened, identity) == key
    [row] = await services.rows("SELECT sealed_claim_psk FROM provisioning_template")
    context = claim_psk_context(tenant_id, template.template.template_id)
    assert alone.open(row["sealed_claim_psk"], context) == claim_psk(template.provision_key)
    assert await reopened.provisioned(tenant_id)
    with pytest.raises(WrongKeyRing):
        await open_trust(database, KeyRing.generate(), clock=services.clock, random=os.urandom)


async def test_a_running_node_goes_on_while_the_ring_is_rotated(
    database: Database, tenant_id: TenantId, tmp_path: Path
) -> None:
    path = tmp_path / "key-ring.json"
    running = await CertificateServices.open(database, ring=load_or_create(path))
    keys = await devices_with_psks(running, tenant_id, 2)
    command = load_or_create(path)
    await rotate_key_ring(database, command, path, actor=OPERATOR)

    assert running.ring.active == "k1"
    for identity, key in keys.items():
        assert await offered(running, identity) == key  # the ring was read again when it was needed
    assert running.ring.active == "k2"
    assert not running.ring.refresh()


async def test_the_event_makes_a_running_node_seal_under_the_new_key(
    database: Database, tenant_id: TenantId, tmp_path: Path
) -> None:
    path = tmp_path / "key-ring.json"
    running = await CertificateServices.open(database, ring=load_or_create(path))
    async with following(database, running.trust) as feed:
        await rotate_key_ring(database, load_or_create(path), path, actor=OPERATOR)
        feed.hint()
        await until(lambda: running.ring.active == "k2")
    await devices_with_psks(running, tenant_id, 1)
    assert (await reseal(database, running.ring)).resealed == 0


async def test_resealing_goes_on_where_it_was_stopped(
    database: Database, tenant_id: TenantId, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "key-ring.json"
    services = await CertificateServices.open(database, ring=load_or_create(path))
    keys = await devices_with_psks(services, tenant_id, 5)
    monkeypatch.setattr("registry.trust.RESEAL_CHUNK", 2)
    assert RESEAL_CHUNK > 2
    put, chunks = stored.put_sealed, 0

    async def stops_at_the_second(connection: object, column: object, values: object) -> None:
        nonlocal chunks
        chunks += 1
        if chunks == 2:
            raise RuntimeError("stopped")
        await put(connection, column, values)  # type: ignore[arg-type]

    with monkeypatch.context() as stopping:
        stopping.setattr(stored, "put_sealed", stops_at_the_second)
        with pytest.raises(RuntimeError, match="stopped"):
            await rotate_key_ring(database, services.ring, path, actor=OPERATOR)

    again = load_or_create(path)
    assert again.active == "k2"
    with pytest.raises(KeyRingError, match="rest under"):
        await drop_key(database, path, "k1", actor=OPERATOR)
    assert (await reseal(database, again)).resealed == 3 + 1 + 2 + 1
    await drop_key(database, path, "k1", actor=OPERATOR)
    reopened = await CertificateServices.open(database, ring=load_or_create(path))
    assert [await offered(reopened, identity) for identity in keys] == list(keys.values())


async def test_a_staged_key_is_known_everywhere_before_it_seals(database: Database, tmp_path: Path) -> None:
    path, elsewhere = tmp_path / "key-ring.json", tmp_path / "other-node.json"
    ring = load_or_create(path)
    await open_trust(database, ring, clock=Clock(), random=os.urandom)
    staged = stage_key(ring, path)
    assert (staged.active, staged.key_ids) == ("k1", ("k1", "k2"))
    elsewhere.write_bytes(path.read_bytes())
    elsewhere.chmod(0o600)
    other = load_or_create(elsewhere)

    await rotate_key_ring(database, ring, path, actor=OPERATOR, key_id="k2")
    assert ring.active == "k2"
    assert await open_trust(database, other, clock=Clock(), random=os.urandom)
    with pytest.raises(KeyRingError):
        await rotate_key_ring(database, ring, path, actor=OPERATOR, key_id="k9")


async def test_two_rotations_at_once_lose_no_key(
    database: Database, tenant_id: TenantId, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has read the file before the first one wrote it, and finds nothing sealed again yet."""
    path = tmp_path / "key-ring.json"
    services = await CertificateServices.open(database, ring=load_or_create(path))
    keys = await devices_with_psks(services, tenant_id, 2)
    first, second = load_or_create(path), load_or_create(path)
    held: list[asyncio.Event] = []

    async def waits(database: Database, ring: KeyRing) -> Resealed:
        held.append(asyncio.Event())
        await held[-1].wait()
        return await reseal(database, ring)

    monkeypatch.setattr("registry.trust.reseal", waits)
    rotations = []
    for number, ring in enumerate((first, second), start=1):
        rotations.append(asyncio.create_task(rotate_key_ring(database, ring, path, actor=OPERATOR)))
        await until(lambda number=number: len(held) == number)  # type: ignore[misc]
    for rotation, event in zip(rotations, held, strict=True):
        event.set()
        await rotation
    alone = load_or_create(path)
    reopened = await CertificateServices.open(database, ring=alone)
    assert [await offered(reopened, identity) for identity in keys] == list(keys.values())
    assert (alone.active, alone.key_ids) == ("k3", ("k1", "k2", "k3"))


async def test_keys_that_are_staged_at_once_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "key-ring.json"
    first, second = load_or_create(path), load_or_create(path)
    stage_key(first, path)
    assert stage_key(second, path).key_ids == load_or_create(path).key_ids == ("k1", "k2", "k3")


async def test_a_ring_that_is_not_the_databases_rotates_nothing(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "key-ring.json"
    await CertificateServices.open(database, ring=KeyRing.generate())
    wrong = load_or_create(path)
    with pytest.raises(WrongKeyRing):
        await rotate_key_ring(database, wrong, path, actor=OPERATOR)
    assert load_or_create(path).key_ids == ("k1",)


async def test_the_active_key_is_not_dropped(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "key-ring.json"
    load_or_create(path)
    with pytest.raises(KeyRingError):
        await drop_key(database, path, "k1", actor=OPERATOR)
    assert load_or_create(path).key_ids == ("k1",)


async def test_a_ring_file_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "key-ring.json"
    ring = load_or_create(path)
    path.write_text("half a fi")
    assert not ring.refresh()
    assert ring.key_ids == ("k1",)
    path.unlink()
    assert not ring.refresh()


async def test_the_program_openssl_agrees_about_the_chain(services: CertificateServices, tmp_path: Path) -> None:
    await roll(services)
    await services.trust.live.refresh()
    (tmp_path / "chain.pem").write_bytes(services.certificates.chain_pem())
    (tmp_path / "root.pem").write_bytes(services.certificates.chain_pem())
    done = openssl(
        *("verify", "-x509_strict", "-attime", str(int(services.clock().timestamp()))),
        *("-CAfile", str(tmp_path / "root.pem"), str(tmp_path / "chain.pem")),
    )
    assert done.stdout.endswith("OK\n"), done.stderr
