"""The certificates that a client needs in order to trust this server, over HTTP. Open to all."""

from __future__ import annotations

from typing import Final

from litestar.response import Response

from adapters.http.api_request import ApiRequest
from adapters.http.operations import Media, Operation, Reply, operation

PEM_CHAIN: Final = "application/pem-certificate-chain"
"""RFC 8555 §9.1."""


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
    return Response(request.registry.ca_chain_pem(), media_type=PEM_CHAIN)


ROUTES: Final = (get_ca_chain,)
