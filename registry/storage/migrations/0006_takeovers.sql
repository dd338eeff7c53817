-- A client that connects ends its older connection wherever that is (MQTT 5.0 §3.1.4), stored session or not. Of one that
-- is not stored nobody knows where it lives, so every other node is told; the higher number is the later connection.
CREATE SEQUENCE messaging_taking;

CREATE TABLE messaging_takeover (
    node_id     text COLLATE "C" NOT NULL,         -- who is to look for an older one
    number      bigint NOT NULL,
    tenant_id   uuid NOT NULL,
    device_id   uuid NOT NULL,
    client_id   text COLLATE "C" NOT NULL,
    written_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (node_id, number)
);
