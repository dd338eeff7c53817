-- The identity core. Every table of a tenant's objects names tenant_id, and every query does too.
-- Text that a device or an operator chose is compared byte by byte (COLLATE "C"): no locale may make two ids equal.

CREATE TABLE tenant (
    tenant_id   uuid PRIMARY KEY,
    slug        text COLLATE "C" NOT NULL UNIQUE,
    name        text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);

-- A value sealed under the key ring and known beforehand: a node that cannot open it has another ring and must not start.
CREATE TABLE key_ring_canary (
    only_row  boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    sealed    bytea NOT NULL
);

-- Keys that sign operators' tokens, shared by the nodes of one database.
CREATE TABLE issuer_key (
    kid         text COLLATE "C" PRIMARY KEY,
    public_key  bytea NOT NULL,
    sealed_key  bytea NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    retired_at  timestamptz
);

-- The built-in certificate authority: a root, and issuing authorities of which one is active.
CREATE TABLE authority (
    authority_id  uuid PRIMARY KEY,
    kind          text NOT NULL CHECK (kind IN ('root', 'issuing')),
    issuer_id     uuid REFERENCES authority,
    certificate   bytea NOT NULL,               -- DER
    sealed_key    bytea NOT NULL,
    active        boolean NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX authority_one_active ON authority (kind) WHERE active;

CREATE TABLE device_profile (
    tenant_id         uuid NOT NULL REFERENCES tenant,
    profile_id        text COLLATE "C" NOT NULL,
    name              text NOT NULL,
    description       text NOT NULL DEFAULT '',
    tags              jsonb NOT NULL DEFAULT '{}',
    config            jsonb NOT NULL DEFAULT '{}',
    anchor_mode       text,
    components        jsonb NOT NULL DEFAULT '[]',
    telemetry_schema  jsonb NOT NULL DEFAULT '{}',
    writable_fields   text[] NOT NULL DEFAULT '{}',
    topic_grants      jsonb NOT NULL DEFAULT '[]',
    allow_short_psk   boolean NOT NULL DEFAULT false,  -- 16-byte keys for old stacks (CONTRACT §2)
    created_at        timestamptz NOT NULL DEFAULT now(),
    updated_at        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, profile_id)
);

CREATE TABLE provisioning_template (
    tenant_id            uuid NOT NULL REFERENCES tenant,
    template_id          text COLLATE "C" PRIMARY KEY,   -- 26 characters, so that "claim-<template id>" fits a PSK identity
    name                 text NOT NULL,
    profile_id           text COLLATE "C",
    hardware_id_pattern  text,
    expires_at           timestamptz,
    one_time             boolean NOT NULL,
    max_claims           integer CHECK (max_claims > 0),
    counted_claims       integer NOT NULL DEFAULT 0,     -- kept only where one_time or max_claims needs it
    credential_type      text NOT NULL CHECK (credential_type IN ('api_key', 'psk', 'x509')),
    default_groups       text[] NOT NULL,
    status               text NOT NULL CHECK (status IN ('active', 'disabled', 'used')),
    key_hash             bytea NOT NULL UNIQUE,
    sealed_claim_psk     bytea NOT NULL,
    created_by           text NOT NULL,
    created_at           timestamptz NOT NULL DEFAULT now(),
    updated_at           timestamptz NOT NULL DEFAULT now(),
    FOREIGN KEY (tenant_id, profile_id) REFERENCES device_profile (tenant_id, profile_id)
);
CREATE INDEX provisioning_template_by_tenant ON provisioning_template (tenant_id, created_at, template_id);

CREATE TABLE device (
    device_id        uuid PRIMARY KEY,
    tenant_id        uuid NOT NULL REFERENCES tenant,
    hardware_id      text COLLATE "C",
    name             text NOT NULL,
    status           text NOT NULL CHECK (status IN ('pending', 'registered', 'active', 'inactive', 'maintenance', 'offline')),
    groups           text[] NOT NULL DEFAULT '{}',
    tags             jsonb NOT NULL DEFAULT '{}',
    anchor_mode      text NOT NULL,
    profile_id       text COLLATE "C",
    site_id          text COLLATE "C",
    gateway_id       uuid,
    firmware         text,
    meta             jsonb NOT NULL DEFAULT '{}',
    config           jsonb NOT NULL DEFAULT '{}',
    credential_type  text NOT NULL CHECK (credential_type IN ('api_key', 'psk', 'x509')),
    template_id      text COLLATE "C" REFERENCES provisioning_template ON DELETE SET NULL,
    created_at       timestamptz NOT NULL DEFAULT now(),
    updated_at       timestamptz NOT NULL DEFAULT now(),
    activated_at     timestamptz,
    last_seen_at     timestamptz,
    UNIQUE (tenant_id, hardware_id),
    UNIQUE (tenant_id, device_id),
    FOREIGN KEY (tenant_id, profile_id) REFERENCES device_profile (tenant_id, profile_id),
    FOREIGN KEY (tenant_id, gateway_id) REFERENCES device (tenant_id, device_id)
);
CREATE INDEX device_by_tenant ON device (tenant_id, created_at, device_id);
CREATE INDEX device_by_status ON device (tenant_id, status);
CREATE INDEX device_by_profile ON device (tenant_id, profile_id);
CREATE INDEX device_by_gateway ON device (tenant_id, gateway_id) WHERE gateway_id IS NOT NULL;
CREATE INDEX device_by_template ON device (template_id) WHERE template_id IS NOT NULL;
CREATE INDEX device_groups ON device USING gin (groups);
CREATE INDEX device_tags ON device USING gin (tags jsonb_path_ops);

-- Every credential of every kind: the resolver knows one table. `lookup` is what a peer's evidence is found by:
-- SHA-256 of an API key, SHA-256 of a certificate's DER, or the bytes of a PSK identity.
CREATE TABLE credential (
    credential_id   uuid PRIMARY KEY,
    tenant_id       uuid NOT NULL,
    device_id       uuid NOT NULL,
    kind            text NOT NULL CHECK (kind IN ('api_key', 'psk', 'x509')),
    lookup          bytea NOT NULL,
    sealed_key      bytea,                          -- PSK only
    version         integer NOT NULL DEFAULT 1,     -- bound into the seal
    label           text NOT NULL DEFAULT '',
    detail          jsonb NOT NULL DEFAULT '{}',    -- x509: subject, issuer, serial; no secrets
    not_before      timestamptz,
    expires_at      timestamptz,
    superseded_by   uuid,
    retire_on_use   boolean NOT NULL DEFAULT false, -- ends when superseded_by is first used
    revoked_at      timestamptz,
    revoked_reason  text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    first_used_at   timestamptz,
    CHECK ((kind = 'psk') = (sealed_key IS NOT NULL)),
    FOREIGN KEY (tenant_id, device_id) REFERENCES device (tenant_id, device_id) ON DELETE CASCADE
);
-- Revoked rows stay for the operator's question "why"; only one living row may own a lookup.
CREATE UNIQUE INDEX credential_living_lookup ON credential (kind, lookup) WHERE revoked_at IS NULL;
CREATE INDEX credential_lookup ON credential (kind, lookup);
CREATE INDEX credential_by_device ON credential (tenant_id, device_id, created_at, credential_id);
CREATE INDEX credential_by_successor ON credential (superseded_by) WHERE superseded_by IS NOT NULL;

-- What happened, in the transaction that made it happen. Readers follow (xid, seq) below the oldest running
-- transaction, so that a row that commits late is never skipped (registry/feed.py).
CREATE TABLE event (
    seq             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    xid             xid8 NOT NULL DEFAULT pg_current_xact_id(),
    event_id        uuid NOT NULL,
    tenant_id       uuid NOT NULL,
    kind            text NOT NULL,
    at              timestamptz NOT NULL DEFAULT clock_timestamp(),
    device_id       uuid,
    credential_id   uuid,
    session_id      uuid,
    actor           text NOT NULL,
    correlation_id  text NOT NULL,
    data            jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX event_in_order ON event (xid, seq);
-- What ends sessions is looked for before it settles, past any number of other events (storage/events.read_early).
CREATE INDEX event_teardown ON event (xid, seq)
    WHERE kind IN ('credential.revoked', 'device.deactivated', 'device.deleted', 'session.kicked');
CREATE INDEX event_of_tenant ON event (tenant_id, xid, seq);
CREATE INDEX event_of_device ON event (tenant_id, device_id, xid, seq) WHERE device_id IS NOT NULL;

CREATE TABLE audit (
    seq             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id       uuid,
    at              timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor           text NOT NULL,
    action          text NOT NULL,
    object_type     text NOT NULL,
    object_id       text NOT NULL,
    correlation_id  text NOT NULL,
    detail          jsonb NOT NULL DEFAULT '{}'
);
CREATE INDEX audit_of_tenant ON audit (tenant_id, seq);

-- Nodes of this database, and a mirror of their live sessions for GET /sessions and for receipts. The truth about a
-- session is in its node's memory; the mirror is written behind and may be lost in a crash, as the sessions are.
CREATE TABLE node (
    node_id       text COLLATE "C" PRIMARY KEY,
    incarnation   uuid NOT NULL,
    started_at    timestamptz NOT NULL,
    heartbeat_at  timestamptz NOT NULL
);
CREATE UNLOGGED TABLE session (
    session_id     uuid PRIMARY KEY,
    node_id        text COLLATE "C" NOT NULL,
    tenant_id      uuid NOT NULL,
    device_id      uuid NOT NULL,
    credential_id  uuid NOT NULL,
    transport      text NOT NULL,
    peer           text NOT NULL,
    opened_at      timestamptz NOT NULL
);
CREATE INDEX session_by_tenant ON session (tenant_id, opened_at, session_id);
CREATE INDEX session_by_node ON session (node_id);
CREATE INDEX session_by_device ON session (tenant_id, device_id);

-- What a node closed because of a teardown event, reported to the node that answers the operator.
CREATE TABLE teardown_report (
    event_seq    bigint NOT NULL,
    node_id      text COLLATE "C" NOT NULL,
    reported_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    sessions     jsonb NOT NULL,
    remaining    integer NOT NULL,
    PRIMARY KEY (event_seq, node_id)
);
CREATE INDEX teardown_report_age ON teardown_report (reported_at);

-- Uplinks and readings: partitioned by the day they were received (database clock), kept by dropping partitions.
CREATE TABLE uplink (
    uplink_id    uuid NOT NULL,                    -- version 7: in the order of arrival within a batch
    tenant_id    uuid NOT NULL,
    device_id    uuid NOT NULL,
    kind         text COLLATE "C" NOT NULL,
    payload      json NOT NULL,                    -- json keeps the sender's text as it was; jsonb would rewrite it
    message_id   text COLLATE "C",
    observed_at  timestamptz,
    received_at  timestamptz NOT NULL,
    transport    text NOT NULL,
    via          uuid                              -- the gateway that sent it, if not the device itself
) PARTITION BY RANGE (received_at);
CREATE INDEX uplink_by_device ON uplink (device_id, received_at, uplink_id);

-- Idempotence over all days: a partitioned table cannot hold this constraint.
CREATE TABLE uplink_message (
    device_id    uuid NOT NULL,
    message_id   text COLLATE "C" NOT NULL,
    uplink_id    uuid NOT NULL,
    received_at  timestamptz NOT NULL,
    PRIMARY KEY (device_id, message_id)
);
-- Always appended to at its end; lets old rows be deleted in order, in chunks.
CREATE INDEX uplink_message_age ON uplink_message (received_at);

CREATE TABLE reading (
    tenant_id    uuid NOT NULL,
    device_id    uuid NOT NULL,
    component    text COLLATE "C" NOT NULL,
    sensor       text COLLATE "C" NOT NULL,
    observed_at  timestamptz NOT NULL,             -- when the device says, else when it was received
    received_at  timestamptz NOT NULL,
    uplink_id    uuid NOT NULL,
    ordinal      smallint NOT NULL,                -- its place in the uplink
    number       double precision,                 -- DOUBLE
    "integer"    bigint,                           -- BIGINT
    "boolean"    boolean,                          -- BOOLEAN
    "text"       text,                             -- TEXT
    CHECK (num_nonnulls(number, "integer", "boolean", "text") = 1)
) PARTITION BY RANGE (received_at);
CREATE INDEX reading_by_sensor ON reading (device_id, component, sensor, observed_at);
CREATE INDEX reading_by_device ON reading (device_id, observed_at);
