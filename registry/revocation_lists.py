"""Revocation lists: for others who trust our authorities. Our own admission never reads them (resolver.py).

    asked ─► one grouped question: does the latest list lack something, or is it half-way to its end?
               │ no: the list of the database, remembered by this node under its number
               └ yes: transaction, the list's row held ─► still so? ─► next number ─► take in, sign, keep ─► commit

Every authority, the root included, has one list, kept in the database, so all nodes give the same bytes and a number is
never given twice (RFC 5280 §5.2.3). A certificate says itself whether a list has named it (`listed_in`), and the
question is one look into a small index. So a list that is asked for after a revocation was answered names it, on every
node, without any event; events may be late. The questions of one node go one after another and whoever waits shares
the next answer: a crowd of verifiers costs one small query at a time.

What is listed: certificates of ours whose credential was revoked, whose device was deleted, or whose rotation's overlap
has ended, with the reason that fits. A device that is only inactive is not: that is a state which comes and goes, and
many verifiers know no `certificateHold`. An entry leaves with the second list after the certificate's own end (§3.3).

A list is good for 7 days and made anew at half of that, whoever asks. When the database is away, the one that this node
remembers is given until its own end. One that was made while a clock was far ahead is replaced when that is right
again: no verifier would take it, and what it left out or named too early is put right.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from certs.authority import Authority
from certs.crl import CRL_LIFETIME, RevocationReason, RevokedEntry, build_crl
from registry.batching import Batcher
from registry.errors import NotFound, Unavailable
from registry.ports import Clock
from registry.storage import certificates
from registry.storage.certificates import EndedCertificate, ListState
from registry.storage.database import Database
from registry.trust import Authorities

_APART: Final = timedelta(minutes=5)
"""So far apart may two nodes' clocks be; a list that is dated further ahead was made by a clock that was wrong."""
_QUESTIONS_AT_ONCE: Final = 256
_QUESTIONS_QUEUED: Final = 10_000
_REASONS: Final[Mapping[str, RevocationReason]] = {
    "rotated": RevocationReason.SUPERSEDED,
    "superseded": RevocationReason.SUPERSEDED,
    "retired: its successor was used": RevocationReason.SUPERSEDED,
    "device deleted": RevocationReason.CESSATION_OF_OPERATION,
    "template's devices revoked": RevocationReason.PRIVILEGE_WITHDRAWN,
}
"""The registry's own words for why a credential ended."""


@dataclass(frozen=True, slots=True)
class RevocationList:
    """A signed list (RFC 5280 §5). `issuer` is the SHA-256 fingerprint of its authority's certificate."""

    issuer: str
    number: int
    der: bytes = field(repr=False)
    this_update: datetime
    next_update: datetime


class RevocationLists:
    """The lists of this database's authorities."""

    def __init__(
        self, database: Database, authorities: Authorities, *, clock: Clock, lifetime: timedelta = CRL_LIFETIME
    ) -> None:
        self._database = database
        self._authorities = authorities
        self._clock = clock
        self._lifetime = lifetime
        self._remembered: dict[UUID, RevocationList] = {}
        self._questions: Batcher[UUID, RevocationList] = Batcher(
            "revocation lists", self._answer, max_items=_QUESTIONS_AT_ONCE, max_queued=_QUESTIONS_QUEUED
        )

    async def current(self, issuer: str | None = None) -> RevocationList:
        """The latest list of an authority, named by its certificate's SHA-256 fingerprint (hex, any case); None is the
        active one. It names every certificate whose revocation was committed before the call.

        Raises NotFound (no such authority, or one that has expired), Unavailable.
        """
        return await self._questions.submit(self._named(issuer))

    async def all(self) -> list[RevocationList]:
        """The lists of all authorities that matter, the active one's first, the root's last."""
        current = self._authorities.current
        every = (*current.issuing, current.root)
        return [await self._questions.submit(self._authorities.id_of(each)) for each in every]

    async def stop(self) -> None:
        """Finish the questions under way."""
        await self._questions.stop()

    def _named(self, issuer: str | None) -> UUID:
        current = self._authorities.current
        if issuer is None:
            return self._authorities.id_of(current.active)
        for authority in (*current.issuing, current.root):
            if authority.fingerprint == issuer.lower():
                return self._authorities.id_of(authority)
        raise NotFound("no authority of this server has a certificate with this SHA-256 fingerprint")

    async def _answer(self, wanted: Sequence[UUID]) -> Sequence[RevocationList | BaseException]:
        answers: dict[UUID, RevocationList | BaseException] = {}
        for authority_id in dict.fromkeys(wanted):
            try:
                answers[authority_id] = await self._latest(authority_id)
            except Unavailable as away:
                answers[authority_id] = self._still_good(authority_id) or away
        return [answers[each] for each in wanted]

    def _still_good(self, authority_id: UUID) -> RevocationList | None:
        remembered = self._remembered.get(authority_id)
        return remembered if remembered is not None and self._clock() < remembered.next_update else None

    async def _latest(self, authority_id: UUID) -> RevocationList:
        authority = self._authorities.by_id(authority_id)
        if authority is None:
            raise Unavailable("the authority is not opened here yet")
        now = self._clock()
        remembered = self._remembered.get(authority_id)
        async with self._database.connection() as connection:
            state = await certificates.list_state(connection, authority_id, now)
            if not _due(state, now):
                if remembered is None or remembered.number != state.number:
                    stored = await certificates.latest_list(connection, authority_id)
                    assert stored is not None
                    remembered = self._remembered[authority_id] = RevocationList(authority.fingerprint, *stored)
                return remembered
        made = self._remembered[authority_id] = await self._sign(authority, authority_id, now)
        return made

    async def _sign(self, authority: Authority, authority_id: UUID, now: datetime) -> RevocationList:
        async with self._database.transaction() as connection:
            state = await certificates.list_state(connection, authority_id, now, hold=True)
            stored = await certificates.latest_list(connection, authority_id)
            if stored is not None and not _due(state, now):
                return RevocationList(authority.fingerprint, *stored)  # another node was first
            number, before = state.number + 1, state.this_update
            if _ahead(state, now):
                await certificates.take_out_of_lists(connection, authority_id, now)
                before = now
            elif before is not None:
                now = max(now, before)  # another node's clock may be a little ahead
            await certificates.take_into_list(connection, authority_id, now, number)
            ended = await certificates.listed(connection, authority_id, before)
            entries = [_entry(each) for each in ended]
            # Thousands of entries take a while to encode; others' requests go on meanwhile.
            der = await asyncio.to_thread(build_crl, authority, entries, number, now, self._lifetime)
            this_update = now.replace(microsecond=0)
            made = RevocationList(authority.fingerprint, number, der, this_update, this_update + self._lifetime)
            await certificates.put_list(connection, authority_id, number, der, made.this_update, made.next_update)
        return made


def reason_of(words: str) -> RevocationReason:
    """The reason code for the words with which a credential was revoked.

    An operator may give one of the codes as the words, such as `key_compromise` or `keyCompromise`.
    """
    known = _REASONS.get(words)
    if known is not None:
        return known
    plain = words.strip().lower().replace("_", "").replace("-", "").replace(" ", "")
    codes = {reason.value.replace("_", ""): reason for reason in RevocationReason}
    return codes.get(plain, RevocationReason.UNSPECIFIED)


def _due(state: ListState, now: datetime) -> bool:
    if state.lacks or state.this_update is None or state.next_update is None or _ahead(state, now):
        return True
    return now >= state.this_update + (state.next_update - state.this_update) / 2


def _ahead(state: ListState, now: datetime) -> bool:
    """Whether the latest list was made by a clock that was wrong."""
    return state.this_update is not None and state.this_update - now > _APART


def _entry(ended: EndedCertificate) -> RevokedEntry:
    return RevokedEntry(ended.serial, ended.ended_at, reason_of(ended.reason))
