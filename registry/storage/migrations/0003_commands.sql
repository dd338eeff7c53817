-- What goes down to devices: commands and configuration; and where devices are connected.

-- `seq` is taken while the device's row is locked, so that for one device it counts in the order of the commits: a
-- reader that has seen one number misses nothing below it.
CREATE TABLE command (
    seq           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    command_id    uuid NOT NULL UNIQUE,
    tenant_id     uuid NOT NULL,
    device_id     uuid NOT NULL,
    method        text COLLATE "C" NOT NULL,
    params        json NOT NULL,                  -- json keeps the operator's text as it was; jsonb would rewrite it
    status        text NOT NULL CHECK (status IN ('queued', 'delivered', 'succeeded', 'failed', 'expired', 'cancelled')),
    created_by    text NOT NULL,
    created_at    timestamptz NOT NULL,
    expires_at    timestamptz NOT NULL,
    delivered_at  timestamptz,                    -- the first time
    deliveries    integer NOT NULL DEFAULT 0,
    finished_at   timestamptz,
    result        json,                           -- of a success; JSON null is a result, too
    error_code    text,
    error_message text,
    answered_by   uuid,                           -- the device itself, or its gateway
    CHECK ((status IN ('queued', 'delivered')) = (finished_at IS NULL)),
    CHECK ((status = 'succeeded') = (result IS NOT NULL)),
    CHECK ((status = 'failed') = (error_code IS NOT NULL AND error_message IS NOT NULL)),
    FOREIGN KEY (tenant_id, device_id) REFERENCES device (tenant_id, device_id) ON DELETE CASCADE
);
CREATE INDEX command_of_device ON command (tenant_id, device_id, seq);
CREATE INDEX command_unfinished ON command (device_id, seq) WHERE status IN ('queued', 'delivered');
CREATE INDEX command_due ON command (expires_at) WHERE status IN ('queued', 'delivered');
CREATE INDEX command_age ON command (finished_at) WHERE finished_at IS NOT NULL;

-- The version counts the changes of device.config, which is what the device should run with.
ALTER TABLE device ADD COLUMN config_version integer NOT NULL DEFAULT 1 CHECK (config_version > 0);

-- What the device says it runs with.
CREATE TABLE reported_config (
    device_id    uuid PRIMARY KEY,
    tenant_id    uuid NOT NULL,
    version      integer NOT NULL,
    config       jsonb,                           -- null: it told the version only
    reported_at  timestamptz NOT NULL,
    FOREIGN KEY (tenant_id, device_id) REFERENCES device (tenant_id, device_id) ON DELETE CASCADE
);

-- Which node holds a connection of which device, for transports that have connections. Written behind, under the lock
-- of the device's row. It outlives its node, so that the devices of a node that died can be called offline.
CREATE TABLE presence (
    device_id     uuid NOT NULL,
    node_id       text COLLATE "C" NOT NULL,
    tenant_id     uuid NOT NULL,
    connected_at  timestamptz NOT NULL,
    PRIMARY KEY (device_id, node_id),
    FOREIGN KEY (tenant_id, device_id) REFERENCES device (tenant_id, device_id) ON DELETE CASCADE
);
CREATE INDEX presence_by_node ON presence (node_id, device_id);
