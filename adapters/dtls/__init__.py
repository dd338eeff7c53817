"""DTLS 1.2 for the protocols that speak in datagrams: one UDP socket, many associations."""
