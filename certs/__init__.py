"""X.509 only: keys, CSR policy, issuing, chains, revocation lists. Knows no database and no network."""
