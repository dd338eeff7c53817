"""Content-Formats of the resources: JSON and CBOR, which a request has and which an answer is to have.

A request says its Content-Format (RFC 7252 §5.10.3) or leaves it to the first byte of its payload. An answer has the
format that Accept names (§5.10.4); without Accept that of the request's payload, and of what has no payload JSON. What
is neither is 4.15 on the way in and 4.06 on the way out. Pure.
"""

from __future__ import annotations

from typing import Any, Final

import cbor2
import msgspec
from aiocoap.numbers.codes import Code

from adapters.coap.errors import Unserved
from adapters.coap.ports import Request, Response
from adapters.uplink_payloads import looks_like_cbor

# The CoAP Content-Formats registry (RFC 7252 §12.3, RFC 9148 §9.1)
TEXT: Final = 0
JSON: Final = 50
CBOR: Final = 60
PKCS7_CERTS: Final = 281
CSR_ATTRIBUTES: Final = 285
PKCS10: Final = 286
PKIX_CERTIFICATE: Final = 287


def is_cbor(request: Request) -> bool:
    """Whether a request's payload is CBOR and not JSON. Raises Unserved (4.15)."""
    match request.content_format:
        case 60:
            return True
        case 50:
            return False
        case None:
            return looks_like_cbor(request.payload)
        case other:
            raise Unserved(
                Code.UNSUPPORTED_CONTENT_FORMAT, f"content format {other}; {JSON} (JSON) and {CBOR} (CBOR) are taken"
            )


def wanted(request: Request, *offered: int) -> int:
    """The format of the answer: what Accept names of those `offered`, or the first of them. Raises Unserved (4.06)."""
    if request.accept is None:
        return offered[0]
    if request.accept not in offered:
        names = ", ".join(map(str, offered))
        raise Unserved(Code.NOT_ACCEPTABLE, f"accept {request.accept}; there is {names}")
    return request.accept


def answer_format(request: Request) -> int:
    """JSON or CBOR for an answer to this request. Raises Unserved (4.06, 4.15)."""
    if request.payload and is_cbor(request):
        return wanted(request, CBOR, JSON)
    return wanted(request, JSON, CBOR)


def encoded(value: Any, content_format: int) -> bytes:
    """A value of JSON's types, ids, enums and times as text, in either format."""
    if content_format == CBOR:
        return cbor2.dumps(msgspec.to_builtins(value))
    return msgspec.json.encode(value)


def content(json: bytes, content_format: int, **options: Any) -> Response:
    """2.05 with what the core encodes as JSON, in either format."""
    payload = cbor2.dumps(msgspec.json.decode(json)) if content_format == CBOR else json
    return Response(Code.CONTENT, payload, content_format, **options)
