"""One folder per protocol, and the TLS shell they stand on. Adapters make evidence of bytes; they never decide."""
