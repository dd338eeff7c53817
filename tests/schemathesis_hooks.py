"""What Schemathesis has to be taught (SCHEMATHESIS_HOOKS): to write the CBOR that devices may send."""

from __future__ import annotations

from typing import Any

import cbor2
import schemathesis


@schemathesis.serializer("application/cbor")
def cbor(context: schemathesis.SerializationContext, value: Any) -> bytes:
    del context
    return cbor2.dumps(value)
