"""One folder per protocol, and the TLS stream shell they stand on. Adapters turn bytes into evidence; they never decide."""
