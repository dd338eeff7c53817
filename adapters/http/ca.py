"""What others need in order to trust this server and its devices: the authority's chain and its revocation lists.

Open to all, counted per address. The chain names every authority that matters, the active one first, the root last; it
grows with a roll-over. Each authority has a revocation list of its own (RFC 5280 §5), found by the fingerprint that the
distribution point of its certificates names; without one the active authority's is given. A list is made afresh when it
lacks a revocation that was committed before the question.
"""

from __future__ import annotations

from typing import Annotated, Final

from litestar.response import Response
from msgspec import UNSET, Meta, UnsetType

from adapters.http.api_request import ApiRequest
from adapters.http.models import Request, given
from adapters.http.operations import Media, Operation, Reply, operation
from certs.crl import crl_pem

PEM_CHAIN: Final = "application/pem-certificate-chain"
"""RFC 8555 §9.1."""
CRL_DER: Final = "application/pkix-crl"
"""RFC 2585 §4.2."""
CRL_PEM: Final = "application/x-pem-file"


class CrlQuery(Request, frozen=True, kw_only=True):
    """Whose list."""

    issuer: (
        Annotated[
            str,
            Meta(
                pattern="^[0-9A-Fa-f]{64}$",
                description="SHA-256 fingerprint of an authority's certificate; the active one's if it is left out",
            ),
        ]
        | UnsetType
    ) = UNSET


@operation(
    Operation(
        "GET",
        "/ca/chain",
        "GetCaChain",
        "The built-in certificate authority's chain, PEM",
        "Certificates",
        {200: Reply("The chain", Media(PEM_CHAIN, {"type": "string"}))},
    )
)
async def get_ca_chain(request: ApiRequest) -> Response[bytes]:
    """GET /ca/chain"""
    return Response(request.registry.certificates.chain_pem(), media_type=PEM_CHAIN)


@operation(
    Operation(
        "GET",
        "/ca/crl",
        "GetCaCrl",
        "An authority's revocation list, DER or PEM",
        "Certificates",
        {
            200: Reply(
                "The list; PEM for who accepts it and not DER",
                Media(CRL_DER, {"type": "string", "format": "binary"}),
                other_bodies=(Media(CRL_PEM, {"type": "string"}),),
            )
        },
        query=CrlQuery,
        headers={"Accept": f"`{CRL_PEM}` asks for PEM; else it is DER"},
        refusals=(404,),
    )
)
async def get_ca_crl(request: ApiRequest) -> Response[bytes]:
    """GET /ca/crl"""
    found = await request.registry.revocation_lists.current(given(request.asked(CrlQuery).issuer))
    wants_pem = _wants_pem(request.headers.get("accept", ""))
    body, media = (crl_pem(found.der), CRL_PEM) if wants_pem else (found.der, CRL_DER)
    return Response(body, media_type=media, headers={"Vary": "Accept"})


def _wants_pem(accept: str) -> bool:
    """Whether PEM is named, or text, and DER is not."""
    kinds = {part.partition(";")[0].strip().lower() for part in accept.split(",")}
    if CRL_DER in kinds:
        return False
    return bool(kinds & {CRL_PEM, "application/pem-certificate-chain", "text/plain"})


ROUTES: Final = (get_ca_chain, get_ca_crl)
