"""The OpenAPI document and the page that shows it. Everything is served from here: no browser is sent elsewhere.

The page's scripts and styles are files of their own, so that the content security policy can forbid all inline scripts:
names of devices and tenants that an answer shows stay text.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Final

import msgspec
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.response import Response

from adapters.http.api_request import ApiRequest
from adapters.http.operations import BASE
from registry.errors import NotFound

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Swagger UI sets styles inline; scripts come from files only."""

_PAGE: Final = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Gatehouse API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/swagger.css">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This page needs scripts; the document itself is at <a href="/api/v1/openapi.json">/api/v1/openapi.json</a>.
</noscript>
<script src="/docs/bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START: Final = f"""window.addEventListener("load", () => {{
  window.ui = SwaggerUIBundle({{
    url: "{BASE}/openapi.json",
    dom_id: "#swagger-ui",
    presets: [SwaggerUIBundle.presets.apis],
    validatorUrl: null,
    persistAuthorization: false,
  }});
}});
""".encode()
_ASSETS: Final = {
    "swagger.css": ("swagger_style.css", "text/css; charset=utf-8"),
    "bundle.js": ("swagger_bundle.js", "text/javascript; charset=utf-8"),
}


def routes(openapi: dict[str, Any]) -> tuple[HTTPRouteHandler, ...]:
    """The routes that serve `openapi` and its page."""
    encoded = msgspec.json.encode(openapi)
    # Read once: 1.5 MB, which all readers share, slow ones too (adapters/tls/stream.py).
    assets = {name: (files("offapi").joinpath(file).read_bytes(), media) for name, (file, media) in _ASSETS.items()}

    @HTTPRouteHandler(f"{BASE}/openapi.json", http_method="GET", operation_id="GetOpenApi", include_in_schema=False)
    async def get_openapi() -> Response[bytes]:
        return Response(encoded, media_type="application/json")

    @HTTPRouteHandler("/docs", http_method="GET", operation_id="GetDocs", include_in_schema=False)
    async def get_docs() -> Response[bytes]:
        return _shown(_PAGE, "text/html; charset=utf-8")

    @HTTPRouteHandler("/docs/{name:str}", http_method="GET", operation_id="GetDocsAsset", include_in_schema=False)
    async def get_asset(request: ApiRequest, name: FromPath[str]) -> Response[bytes]:
        if name == "start.js":
            return _shown(_START, "text/javascript; charset=utf-8")
        if name not in assets:
            raise NotFound("there is nothing at this path")
        return _shown(*assets[name])

    return get_openapi, get_docs, get_asset


def _shown(content: bytes, media_type: str) -> Response[bytes]:
    headers = {"content-security-policy": POLICY, "referrer-policy": "no-referrer"}
    return Response(content, media_type=media_type, headers=headers)
