"""X.509 only: keys, CSR policy, issuing, chains, revocation lists. Knows no database and no network.

request    bytes of a device → CheckedRequest        issuing    CheckedRequest → PreparedCertificate → certificate
authority  root and issuing CAs, roll-over           crl        revocation lists
chains     bundles, PKCS#7, foreign certificates     renewal    when a certificate is due, and its grace
keys       private keys that do not show             der, pem, names, weak_keys: what the above read with
"""
