"""The core: identities, credentials, sessions, revocation, provisioning, uplinks, events. It knows no protocol."""
