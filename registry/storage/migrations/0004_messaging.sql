-- Brokered messaging: what must outlive a connection and a process (registry/messaging.py has the theory).
-- Times are seconds since 1970, as the sessions' machines count them. Deleting a device takes its rows with it.
-- Locks are taken in one order: sessions by number, then tenants by id, then everything else.

-- One row for each tenant that uses the broker: the version of its routes, and what it retains.
CREATE TABLE messaging_tenant (
    tenant_id          uuid PRIMARY KEY REFERENCES tenant,
    version            bigint NOT NULL DEFAULT 0,
    retained_messages  integer NOT NULL DEFAULT 0,
    retained_bytes     bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

-- A node that serves messaging. Who finds its row gone was taken for dead, and has lost what it held.
CREATE TABLE messaging_node (
    node_id      text COLLATE "C" PRIMARY KEY,
    incarnation  uuid NOT NULL,
    seen_at      timestamptz NOT NULL
);

CREATE TABLE messaging_session (
    session_id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id        uuid NOT NULL,
    device_id        uuid NOT NULL,
    client_id        text COLLATE "C" NOT NULL,
    credential_id    uuid NOT NULL,                -- with whose revocation it is dropped
    epoch            bigint NOT NULL,              -- rises with every taking; older owners are fenced off by it
    node_id          text COLLATE "C",             -- the owner's node; null while nobody serves it
    expiry           double precision NOT NULL,    -- seconds that it outlives its connection; may be infinity
    expires_at       double precision,             -- null while it is served
    last_ordinal     bigint NOT NULL DEFAULT 0,
    queued_messages  integer NOT NULL DEFAULT 0,
    queued_bytes     bigint NOT NULL DEFAULT 0,
    UNIQUE (tenant_id, device_id, client_id),
    FOREIGN KEY (tenant_id, device_id) REFERENCES device (tenant_id, device_id) ON DELETE CASCADE
) WITH (fillfactor = 70);
CREATE INDEX messaging_session_of_node ON messaging_session (node_id) WHERE node_id IS NOT NULL;
CREATE INDEX messaging_session_expiry ON messaging_session (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX messaging_session_of_credential ON messaging_session (credential_id);

-- Wills stand beside the sessions: one may be due after its session has ended.
CREATE TABLE messaging_will (
    will_id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session_id  bigint UNIQUE,                     -- null when the session has ended, or has gone on without it
    tenant_id   uuid NOT NULL,
    device_id   uuid NOT NULL,
    delay       double precision NOT NULL,
    due_at      double precision,                  -- null while its connection lives
    expires_after double precision,
    topic       text COLLATE "C" NOT NULL,
    payload     bytea NOT NULL,
    qos         smallint NOT NULL,
    retain      boolean NOT NULL,
    properties  bytea NOT NULL,
    FOREIGN KEY (tenant_id, device_id) REFERENCES device (tenant_id, device_id) ON DELETE CASCADE
);
CREATE INDEX messaging_will_due ON messaging_will (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX messaging_will_of_device ON messaging_will (tenant_id, device_id);

-- Who wants messages: stored sessions (session_id) and nodes with live ones (node_id). A removed route stays a while, so
-- that whoever follows the versions learns of it.
CREATE TABLE messaging_route (
    tenant_id            uuid NOT NULL,
    version              bigint NOT NULL,
    session_id           bigint,
    device_id            uuid,
    client_id            text COLLATE "C",
    node_id              text COLLATE "C",
    filter               text COLLATE "C" NOT NULL,
    stored               boolean NOT NULL,
    qos                  smallint NOT NULL,
    no_local             boolean NOT NULL DEFAULT false,
    retain_as_published  boolean NOT NULL DEFAULT false,
    retain_handling      smallint NOT NULL DEFAULT 0,
    identifier           bigint,
    removed_at           timestamptz,
    CHECK ((session_id IS NULL) <> (node_id IS NULL))
);
CREATE UNIQUE INDEX messaging_route_of_session ON messaging_route (session_id, filter) WHERE session_id IS NOT NULL;
CREATE UNIQUE INDEX messaging_route_of_node ON messaging_route (node_id, tenant_id, filter, stored, qos)
    WHERE node_id IS NOT NULL;
CREATE INDEX messaging_route_version ON messaging_route (tenant_id, version);
CREATE INDEX messaging_route_removed ON messaging_route (removed_at) WHERE removed_at IS NOT NULL;

-- A message is stored once, whoever gets it. It goes with the last row that names it; what a race or a cascade leaves
-- behind is swept. Ids are version 7: in the order of their time.
CREATE TABLE messaging_message (
    message_id  uuid PRIMARY KEY,
    tenant_id   uuid NOT NULL,
    device_id   uuid NOT NULL,
    topic       text COLLATE "C" NOT NULL,
    payload     bytea NOT NULL,
    qos         smallint NOT NULL,
    retain      boolean NOT NULL,
    properties  bytea NOT NULL,
    expires_at  double precision
);
CREATE INDEX messaging_message_expiry ON messaging_message (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE messaging_queue (
    session_id   bigint NOT NULL REFERENCES messaging_session ON DELETE CASCADE,
    ordinal      bigint NOT NULL,                  -- rises in the order of commits
    message_id   uuid NOT NULL,
    qos          smallint NOT NULL,
    retain       boolean NOT NULL,
    identifiers  bigint[],
    size         integer NOT NULL,
    packet_id    integer,                          -- null until an owner has taken charge
    released     bigint,                           -- its place among the releases; then only PUBREL is sent
    waiting_for  text COLLATE "C",                 -- the node whose session is to take it now
    PRIMARY KEY (session_id, ordinal)
);
CREATE INDEX messaging_queue_message ON messaging_queue (message_id);
CREATE INDEX messaging_queue_waiting ON messaging_queue (waiting_for, session_id, ordinal)
    WHERE waiting_for IS NOT NULL;

CREATE TABLE messaging_incoming (
    session_id  bigint NOT NULL REFERENCES messaging_session ON DELETE CASCADE,
    packet_id   integer NOT NULL,
    PRIMARY KEY (session_id, packet_id)
);

CREATE TABLE messaging_retained (
    tenant_id   uuid NOT NULL,
    topic       text COLLATE "C" NOT NULL,
    device_id   uuid NOT NULL,
    payload     bytea NOT NULL,
    qos         smallint NOT NULL,
    properties  bytea NOT NULL,
    expires_at  double precision,
    size        integer NOT NULL,
    PRIMARY KEY (tenant_id, topic)
);
CREATE INDEX messaging_retained_expiry ON messaging_retained (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX messaging_retained_of_device ON messaging_retained (tenant_id, device_id);

-- Messages on their way to sessions of another node that are not stored.
CREATE TABLE messaging_relay (
    node_id     text COLLATE "C" NOT NULL,
    relay_id    bigint GENERATED ALWAYS AS IDENTITY,
    message_id  uuid NOT NULL,
    direct      boolean NOT NULL,
    shared      text NOT NULL,                     -- a JSON array of filters
    PRIMARY KEY (node_id, relay_id)
);
CREATE INDEX messaging_relay_message ON messaging_relay (message_id);

-- Owners that are to hear that they own no more.
CREATE TABLE messaging_eviction (
    node_id     text COLLATE "C" NOT NULL,
    session_id  bigint NOT NULL,
    epoch       bigint NOT NULL,
    written_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (node_id, session_id, epoch)
);
