"""The TLS stream shell: pyOpenSSL over memory BIOs, shared by every protocol that runs over TCP."""
