"""Certificates: made by the built-in authority from a device's request, or somebody else's and known by fingerprint.

    prepare   request ─► checked ─► serial, dates, subject decided ─► intent committed (grouped, a statement of its own)
    issue     in the caller's transaction:  key free? ─► sign ─► certificate row issued ─► credential row
    commit    by the caller, together with the device or token or rotation that wanted it

States of a certificate's row: `intended` → `issued`, or `intended` → `abandoned` (it was signed in a transaction that
failed, or its signer died and `tidy` gave it up after an hour), or gone (withdrawn before it was signed, as by the
losers of a race). A serial is never used again, whatever became of it. A crash between intent and
signing leaves an intent; a crash between signing and commit leaves an intent too, and the signed bytes die with the
process, which had shown them to nobody.

What can race. Two nodes issue at once: serials are random, and each holds its device. A roll-over: an intent whose
authority is no longer active is not accepted, and is prepared again with the new one. One key for two devices (a cloned
flash image): a lock on the key lets one of the two requests see the other's certificate. Of living certificates of a
tenant no two devices have the same key; of other tenants nothing is asked, because whoever sold a device on must not be
able to keep its buyer out. The key of one of our own servers is nobody's.

Waiting for the intent inside the caller's transaction would hold one pooled connection while waiting for another: ten
such callers in a pool of ten would all wait. So `prepare` comes before the transaction, and `issue` asks for nothing.

Of our own certificates the DER is kept (an answer that was lost can be given again, and revocation lists need the
serial). Of foreign ones only the SHA-256 of the DER is kept, with the dates and what an operator may read (seed 003);
they are refused where they are ours, because re-registering one would undo its revocation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from certs.authority import Authority
from certs.chains import BadCertificate, bundle, fingerprint, read_foreign_certificate
from certs.issuing import (
    SERVER_LIFETIME,
    DeviceFacts,
    DeviceProfile,
    IssuanceIntent,
    prepare_device,
    prepare_server,
    sign,
)
from certs.keys import PrivateKeyPem
from certs.renewal import renewal_window
from certs.request import BadRequest, CheckedRequest, RequestPolicy, check_csr
from registry import fields
from registry.batching import Batcher
from registry.credentials import Credentials
from registry.errors import FailedPrecondition, InvalidArgument, Unavailable
from registry.model import Actor, Credential, CredentialId, CredentialKind, Device, DeviceId, Fingerprint, TenantId
from registry.ports import Clock, IssuedCertificate, PreparedIssue
from registry.secrets import RandomBytes
from registry.storage import certificates, credentials, tenants
from registry.storage.certificates import NewIntent, StoredCertificate, Unfinished
from registry.storage.credentials import NewCredential
from registry.storage.database import Connection, Database
from registry.tenants import MAX_CACHED_TENANTS
from registry.trust import Authorities

log = logging.getLogger(__name__)

UNFINISHED_AFTER: Final = timedelta(hours=1)
"""An intent this old has lost its signer: between intent and commit lie milliseconds."""
KEPT_AFTER_END: Final = timedelta(days=90)
"""Rows stay this long after the certificate's own end: for late questions, and for the last list that names it."""
TIDY_AT_ONCE: Final = 1000

_ATTEMPTS: Final = 3
"""Rounds of preparing; a second one follows a roll-over."""
_INTENTS_AT_ONCE: Final = 128
_INTENTS_QUEUED: Final = 5_000
"""Requests that wait for their intent: a batch of devices that is switched on together; more are told to come later."""


@dataclass(frozen=True, slots=True)
class ServerLeaf:
    """A certificate for our own listeners. `chain_pem`: the leaf, then its issuer, as TLS sends them."""

    chain_pem: bytes
    serial: str
    not_before: datetime
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Tidied:
    """How many intents were given up, and how many rows of ended certificates went."""

    abandoned: int
    deleted: int


class Certificates:
    """The issuer of this node's flows (ports.CertificateIssuer)."""

    def __init__(
        self,
        database: Database,
        authorities: Authorities,
        *,
        clock: Clock,
        random: RandomBytes,
        profile: DeviceProfile | None = None,
    ) -> None:
        """`profile` says how device certificates are made. `{issuer}` in its `crl_url` becomes the SHA-256 fingerprint
        of the issuing authority's certificate, since each authority has a revocation list of its own."""
        self._database = database
        self._authorities = authorities
        self._clock = clock
        self._random = random
        self._profile = profile or DeviceProfile()
        self._slugs: dict[TenantId, str] = {}
        self._intents: Batcher[NewIntent, bool] = Batcher(
            "certificate intents", self._record, max_items=_INTENTS_AT_ONCE, max_queued=_INTENTS_QUEUED
        )

    # -- the issuer ------------------------------------------------------------------------------------------------

    async def prepare(
        self,
        tenant_id: TenantId,
        device_id: DeviceId,
        csr: bytes,
        *,
        now: datetime,
        policy: RequestPolicy | None = None,
    ) -> PreparedIssue:
        """See ports.CertificateIssuer. `policy` says more about what the request may contain (a renewal's subject);
        the authorities' keys are forbidden whatever it says."""
        request = self.checked(csr, policy)
        facts = DeviceFacts(str(device_id), await self._organisation(tenant_id))
        for _ in range(_ATTEMPTS):
            authority = self._signer(now)
            certificate = prepare_device(request, facts, authority, now, self._random, self._told(authority))
            intent = certificate.intent
            renew_after = renewal_window(intent.not_before, intent.not_after, self._random).opens_at
            authority_id = self._authorities.id_of(authority)
            if await self._intents.submit(_row(intent, authority_id, tenant_id, device_id, renew_after, now)):
                return PreparedIssue(
                    tenant_id, device_id, certificate, authority_id, self._chain(authority), renew_after
                )
            await self._authorities.refresh()
        raise Unavailable("the issuing authority is being replaced; try again")

    async def issue(
        self, connection: Connection, device: Device, prepared: PreparedIssue, *, now: datetime
    ) -> IssuedCertificate:
        """See ports.CertificateIssuer."""
        if (device.tenant_id, device.device_id) != (prepared.tenant_id, prepared.device_id):
            raise ValueError("a certificate that was prepared for one device cannot be issued to another")
        intent = prepared.certificate.intent
        spki = bytes.fromhex(intent.spki_sha256)
        await certificates.lock_key(connection, spki)
        if await certificates.key_is_taken(connection, spki, device.tenant_id, device.device_id, now):
            raise InvalidArgument(
                "csr is for a public key that another device of this tenant or this server has a certificate for; "
                "each device makes a key of its own",
                field="csr",
            )
        signed = sign(prepared.certificate)
        found_by = Fingerprint(fingerprint(signed.der))
        credential_id = CredentialId(fields.fresh_uuid(self._random))
        finished = await certificates.finish(
            connection,
            prepared.authority_id,
            intent.serial_hex,
            signed.der,
            bytes.fromhex(found_by),
            credential_id,
            now,
        )
        if not finished:
            raise Unavailable("the preparation of the certificate has been given up; try again")
        await credentials.insert(connection, _credential(device, credential_id, found_by, prepared, now))
        return IssuedCertificate(
            credential_id=credential_id,
            certificate_pem=bundle((signed.der,)),
            chain_pem=prepared.chain_pem,
            fingerprint=found_by,
            not_before=intent.not_before,
            not_after=intent.not_after,
            renew_after=prepared.renew_after,
        )

    async def withdraw(self, prepared: PreparedIssue) -> None:
        """See ports.CertificateIssuer."""
        give_up = certificates.withdraw if prepared.certificate.spent else certificates.forget
        try:
            async with self._database.connection() as connection:
                await give_up(connection, prepared.authority_id, prepared.certificate.intent.serial_hex)
        except Unavailable:
            log.info("certificate.intent_left", extra={"fields": {"serial": prepared.certificate.intent.serial_hex}})

    async def again(
        self, connection: Connection, device: Device, csr: bytes, *, now: datetime
    ) -> IssuedCertificate | None:
        """See ports.CertificateIssuer."""
        spki = bytes.fromhex(self.checked(csr).spki_sha256)
        stored = await certificates.of_key(connection, device.tenant_id, device.device_id, spki, now)
        return self.issued_before(stored) if stored else None

    def checked(self, csr: bytes, policy: RequestPolicy | None = None) -> CheckedRequest:
        """The request of a CSR (PEM or DER), its key proved. Raises InvalidArgument, which quotes nothing of it."""
        wanted = replace(policy or RequestPolicy(), forbidden_spki=self._authorities.current.forbidden_spki)
        try:
            return check_csr(csr, wanted)
        except BadRequest as bad:
            log.info("certificate.request_refused", extra={"fields": {"reason": bad.reason.value}})
            raise InvalidArgument(f"csr: {bad.message}", field="csr") from None

    def issued_before(self, stored: StoredCertificate) -> IssuedCertificate:
        """A living certificate of ours as it was answered when it was issued. Raises Unavailable."""
        issuer = self._authorities.by_id(stored.authority_id)
        if issuer is None:  # another node has issued it after a roll-over that this one has not heard of
            self._authorities.refresh_soon()
            raise Unavailable("the issuing authority is being replaced; try again")
        return IssuedCertificate(
            credential_id=stored.credential_id,
            certificate_pem=bundle((stored.der,)),
            chain_pem=self._chain(issuer),
            fingerprint=Fingerprint(stored.fingerprint.hex()),
            not_before=stored.not_before,
            not_after=stored.not_after,
            renew_after=stored.renew_after,
        )

    # -- our own listeners -----------------------------------------------------------------------------------------

    async def issue_server(
        self, key: PrivateKeyPem, names: Sequence[str], *, lifetime: timedelta = SERVER_LIFETIME
    ) -> ServerLeaf:
        """A certificate for our own listeners; its serial and intent are on record before it is signed.

        `names`: DNS names and IP addresses. Raises BadServerName, BadKey, FailedPrecondition, Unavailable.
        """
        now = self._clock()
        for _ in range(_ATTEMPTS):
            authority = self._signer(now)
            prepared = prepare_server(key, names, authority, now, self._random, lifetime=lifetime)
            intent = prepared.intent
            authority_id = self._authorities.id_of(authority)
            renew_after = renewal_window(intent.not_before, intent.not_after, self._random).opens_at
            if not await self._intents.submit(_row(intent, authority_id, None, None, renew_after, now)):
                await self._authorities.refresh()
                continue
            signed = sign(prepared)
            found_by = bytes.fromhex(fingerprint(signed.der))
            async with self._database.connection() as connection:
                await certificates.finish(connection, authority_id, intent.serial_hex, signed.der, found_by, None, now)
            chain = bundle((signed.der, authority.certificate_der))
            return ServerLeaf(chain, intent.serial_hex, intent.not_before, intent.not_after)
        raise Unavailable("the issuing authority is being replaced; try again")

    # -- for operators ---------------------------------------------------------------------------------------------

    def chain_pem(self) -> bytes:
        """All authorities that matter, the active one first, the root last: what `GET /ca/chain` answers."""
        return bundle(self._authorities.current.chain)

    async def renew_after(self, tenant_id: TenantId, device_id: DeviceId) -> datetime | None:
        """When the device is advised to renew its certificate; None where it has none of ours."""
        async with self._database.connection() as connection:
            return await certificates.renew_after(connection, tenant_id, device_id, self._clock())

    async def unfinished(self, limit: int = 100) -> list[Unfinished]:
        """Intents that lost their signer, oldest first, of all tenants: something to look into after a crash."""
        async with self._database.connection() as connection:
            return await certificates.unfinished(connection, self._clock() - UNFINISHED_AFTER, limit)

    async def tidy(self) -> Tidied:
        """Give up intents that lost their signer; forget certificates that ended long ago. Bounded; call it hourly."""
        now = self._clock()
        async with self._database.connection() as connection:
            abandoned = await certificates.abandon(connection, now - UNFINISHED_AFTER, TIDY_AT_ONCE)
            deleted = await certificates.delete_ended(connection, now - KEPT_AFTER_END, TIDY_AT_ONCE)
        return Tidied(abandoned, deleted)

    async def stop(self) -> None:
        """Finish the intents under way."""
        await self._intents.stop()

    # -- parts -----------------------------------------------------------------------------------------------------

    async def _record(self, intents: Sequence[NewIntent]) -> Sequence[bool]:
        async with self._database.connection() as connection:
            accepted = await certificates.record_intents(connection, intents)
        return [(each.authority_id, each.serial) in accepted for each in intents]

    async def _organisation(self, tenant_id: TenantId) -> str:
        """What stands for the tenant in certificates: its slug, which is unique and never changes."""
        known = self._slugs.get(tenant_id)
        if known is not None:
            return known
        async with self._database.connection() as connection:
            tenant = await tenants.by_id(connection, tenant_id)
        if tenant is None:
            raise FailedPrecondition("the tenant does not exist")
        if len(self._slugs) >= MAX_CACHED_TENANTS:
            self._slugs.clear()
        self._slugs[tenant_id] = tenant.slug
        return tenant.slug

    def _signer(self, now: datetime) -> Authority:
        authority = self._authorities.current.active
        if authority.not_before <= now < authority.not_after:
            return authority
        raise FailedPrecondition(
            f"the issuing authority is valid from {authority.not_before} to {authority.not_after}, and it is {now}; "
            "`gatehouse ca rollover` makes another one"
        )

    def _told(self, authority: Authority) -> DeviceProfile:
        url = self._profile.crl_url
        if url is None:
            return self._profile
        return replace(self._profile, crl_url=url.replace("{issuer}", authority.fingerprint))

    def _chain(self, issuer: Authority) -> bytes:
        return bundle((issuer.certificate_der, self._authorities.current.root.certificate_der))


class ForeignCertificates:
    """Certificates of other CAs, and self-signed ones, by which devices are let in (seed 003)."""

    def __init__(self, credentials: Credentials, authorities: Authorities) -> None:
        self._credentials = credentials
        self._authorities = authorities

    async def register(
        self,
        tenant_id: TenantId,
        device_id: DeviceId,
        pem: bytes,
        actor: Actor,
        *,
        overlap: timedelta | None = None,
    ) -> Credential:
        """Let a device in with a certificate (PEM, exactly one). Its fingerprint, dates and safe texts are kept.

        `overlap` as `Credentials.register_certificate` has it. List with `Credentials.list(kind=X509)`, revoke with
        `Credentials.revoke_by_fingerprint`. Raises InvalidArgument (also for one of our own, and for one that has
        expired), WrongKeyRing, and as `Credentials.register_certificate`.
        """
        try:
            foreign = read_foreign_certificate(pem)
        except BadCertificate as bad:
            raise InvalidArgument(f"certificate: {bad.message}", field="certificate") from None
        await self._authorities.refresh()  # it may be of an authority that this node has not heard of
        ours = self._authorities.current
        if foreign.der in ours.chain or ours.issuer_of(foreign.der) is not None:
            raise InvalidArgument(
                "certificate: it is of this server's own authority; a device gets those by enrolling, and only foreign "
                "ones are registered",
                field="certificate",
            )
        detail = {
            "subject": foreign.subject,
            "issuer": foreign.issuer,
            "serial": foreign.serial_hex,
            "public_key": foreign.public_key_kind,
            "origin": "foreign",
        }
        return await self._credentials.register_certificate(
            tenant_id,
            device_id,
            foreign.fingerprint,
            foreign.not_before,
            foreign.not_after,
            detail,
            actor,
            overlap=overlap,
        )


def _row(
    intent: IssuanceIntent,
    authority_id: UUID,
    tenant_id: TenantId | None,
    device_id: DeviceId | None,
    renew_after: datetime,
    now: datetime,
) -> NewIntent:
    return NewIntent(
        authority_id=authority_id,
        serial=intent.serial_hex,
        tenant_id=tenant_id,
        device_id=device_id,
        subject=intent.subject,
        spki_sha256=bytes.fromhex(intent.spki_sha256),
        not_before=intent.not_before,
        not_after=intent.not_after,
        renew_after=renew_after,
        intended_at=now,
    )


def _credential(
    device: Device, credential_id: CredentialId, found_by: Fingerprint, prepared: PreparedIssue, now: datetime
) -> NewCredential:
    intent = prepared.certificate.intent
    return NewCredential(
        tenant_id=device.tenant_id,
        device_id=device.device_id,
        credential_id=credential_id,
        kind=CredentialKind.X509,
        lookup=bytes.fromhex(found_by),
        created_at=now,
        detail={
            "subject": intent.subject,
            "serial": intent.serial_hex,
            "origin": "issued",
            "renew_after": prepared.renew_after.isoformat(),
        },
        not_before=intent.not_before,
        expires_at=intent.not_after,
    )
