-- Certificates of the built-in authority, registration tokens, and revocation lists.

-- Every certificate that this database's authorities were ever asked to make. The row is committed as `intended` before
-- anything is signed; it outlives its device, because a revocation list must name the certificates of deleted devices.
CREATE TABLE certificate (
    authority_id       uuid NOT NULL REFERENCES authority,
    serial             text COLLATE "C" NOT NULL,     -- lower-case hex, two digits an octet
    purpose            text NOT NULL CHECK (purpose IN ('device', 'server')),
    tenant_id          uuid,                          -- of a device; a server's certificate has none
    device_id          uuid,
    subject            text NOT NULL,
    spki_sha256        bytea NOT NULL,
    status             text NOT NULL CHECK (status IN ('intended', 'issued', 'abandoned')),
    not_before         timestamptz NOT NULL,
    not_after          timestamptz NOT NULL,
    renew_after        timestamptz NOT NULL,
    intended_at        timestamptz NOT NULL,
    issued_at          timestamptz,
    fingerprint        bytea,                         -- SHA-256 of the DER
    der                bytea,
    credential_id      uuid,
    ends_at            timestamptz,                   -- superseded: no longer accepted from then, before not_after
    revoked_at         timestamptz,
    revocation_reason  text,
    listed_in          bigint,                        -- the number of the first revocation list that names it
    PRIMARY KEY (authority_id, serial),
    CHECK ((purpose = 'device') = (tenant_id IS NOT NULL AND device_id IS NOT NULL)),
    CHECK ((status = 'issued') = (fingerprint IS NOT NULL AND der IS NOT NULL AND issued_at IS NOT NULL))
);
CREATE UNIQUE INDEX certificate_of_credential ON certificate (credential_id) WHERE credential_id IS NOT NULL;
CREATE INDEX certificate_of_device ON certificate (tenant_id, device_id, issued_at);
CREATE INDEX certificate_of_key ON certificate (spki_sha256);
CREATE INDEX certificate_unfinished ON certificate (intended_at) WHERE status = 'intended';
CREATE INDEX certificate_age ON certificate (not_after);
CREATE INDEX certificate_to_list ON certificate (authority_id, not_after)
    WHERE status = 'issued' AND listed_in IS NULL AND (revoked_at IS NOT NULL OR ends_at IS NOT NULL);
CREATE INDEX certificate_listed ON certificate (authority_id, not_after) WHERE listed_in IS NOT NULL;

-- The latest revocation list of each authority. Its row is the lock under which the next number is taken.
CREATE TABLE revocation_list (
    authority_id  uuid PRIMARY KEY REFERENCES authority,
    number        bigint NOT NULL,
    der           bytea NOT NULL,
    this_update   timestamptz NOT NULL,
    next_update   timestamptz NOT NULL
);

-- One-time tokens (seed 004). A device that is deleted takes its tokens with it.
CREATE TABLE registration_token (
    token_id       uuid PRIMARY KEY,
    tenant_id      uuid NOT NULL,
    device_id      uuid NOT NULL,
    name           text NOT NULL,
    token_hash     bytea NOT NULL UNIQUE,
    created_by     text NOT NULL,
    created_at     timestamptz NOT NULL,
    expires_at     timestamptz NOT NULL,
    used_at        timestamptz,
    credential_id  uuid,                              -- what it was used for: the certificate's credential
    revoked_at     timestamptz,
    CHECK ((used_at IS NULL) = (credential_id IS NULL)),
    FOREIGN KEY (tenant_id, device_id) REFERENCES device (tenant_id, device_id) ON DELETE CASCADE
);
CREATE INDEX registration_token_by_tenant ON registration_token (tenant_id, created_at, token_id);
CREATE INDEX registration_token_by_device ON registration_token (tenant_id, device_id);
