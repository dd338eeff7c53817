"""Pre-shared keys in OpenSSL, through the binding that pyOpenSSL itself stands on.

Theory
------
pyOpenSSL has no name for pre-shared keys, but the binding below it, which `cryptography` builds and ships, exposes
OpenSSL's callback. That binding promises nothing, so everything that touches it for keys is in this one file: what it
needs is checked when a context is made, and its absence is a loud error, never a server without keys.

OpenSSL calls back in the middle of `do_handshake` and cannot wait (there is no "ask me again" for keys as there is for
certificates). So the key must be there before the ClientKeyExchange is fed; the engine sees to that. The callback gets
the identity as a C string: one with a NUL inside arrives cut, matches nothing that was prepared, and fails as a wrong
key does.

What can race: nothing; OpenSSL calls back on the thread, and inside the call, that feeds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from cryptography.hazmat.bindings.openssl.binding import Binding
from OpenSSL import SSL

_SERVER_CALLBACK: Final = "unsigned int(SSL *, char *, unsigned char *, unsigned int)"
_CLIENT_CALLBACK: Final = "unsigned int(SSL *, char *, char *, unsigned int, unsigned char *, unsigned int)"
_NEEDED: Final = ("SSL_CTX_set_psk_server_callback", "SSL_CTX_set_psk_client_callback", "ERR_clear_error")


class PskUnsupported(RuntimeError):
    """The installed `cryptography` does not expose what pre-shared keys need: an upgrade has moved it."""


def serve_psk(context: SSL.Context, key_of: Callable[[bytes], bytes]) -> object:
    """Let server handshakes of `context` use pre-shared keys: `key_of(identity)` is called in the middle of one.

    It must answer at once and for every identity; an empty key ends the handshake with OpenSSL's own alert, which
    tells a stranger that the identity is unknown. The returned object has to live as long as the context.
    Raises PskUnsupported.
    """
    binding = Binding()
    check(binding.lib)
    ffi = binding.ffi

    def callback(_connection: Any, identity: Any, room: Any, size: int) -> int:
        key = key_of(b"" if identity == ffi.NULL else ffi.string(identity))
        if len(key) > size:
            return 0
        ffi.memmove(room, key, len(key))
        return len(key)

    handle: object = ffi.callback(_SERVER_CALLBACK, callback, error=0)
    binding.lib.SSL_CTX_set_psk_server_callback(_raw_context(context), handle)
    return handle


def present_psk(context: SSL.Context, identity: bytes, key: bytes) -> object:
    """Let client handshakes of `context` use this key: for clients of our own, as the demo's. As `serve_psk`."""
    binding = Binding()
    check(binding.lib)
    ffi = binding.ffi

    def callback(_connection: Any, _hint: Any, name: Any, name_size: int, room: Any, size: int) -> int:
        if len(identity) >= name_size or len(key) > size:
            return 0
        ffi.memmove(name, identity + b"\0", len(identity) + 1)
        ffi.memmove(room, key, len(key))
        return len(key)

    handle: object = ffi.callback(_CLIENT_CALLBACK, callback, error=0)
    binding.lib.SSL_CTX_set_psk_client_callback(_raw_context(context), handle)
    return handle


def check(library: Any) -> None:
    """Raises PskUnsupported, naming what is missing, unless `library` has all that this file uses."""
    missing = [name for name in _NEEDED if not hasattr(library, name)]
    if missing or not getattr(library, "Cryptography_HAS_PSK", 0):
        raise PskUnsupported(f"cryptography's OpenSSL binding lacks {', '.join(missing) or 'pre-shared keys'}")


def forget_errors() -> None:
    """Empty OpenSSL's queue of errors of this thread.

    A record that DTLS discards in silence can leave its error behind, and the next call on any connection would take
    it for its own: one bad peer would end another one's handshake.
    """
    _clear_errors()


_clear_errors: Final = Binding().lib.ERR_clear_error


def _raw_context(context: SSL.Context) -> Any:
    return context._context
