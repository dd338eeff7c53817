"""What Schemathesis has to be taught (SCHEMATHESIS_HOOKS): to write the CBOR and the files that may be sent."""

from __future__ import annotations

from typing import Any

import cbor2
import schemathesis


@schemathesis.serializer("application/pkcs10", "application/x-pem-file")
def text(context: schemathesis.SerializationContext, value: Any) -> bytes:
    del context
    return str(value).encode(errors="surrogatepass")


@schemathesis.serializer("application/cbor")
def cbor(context: schemathesis.SerializationContext, value: Any) -> bytes:
    del context
    return cbor2.dumps(value)
