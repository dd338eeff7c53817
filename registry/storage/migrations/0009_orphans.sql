-- A session may end for its owner because that was taken for dead, and nobody has it yet; the client is told to come back,
-- not that somebody else has its place.
ALTER TABLE messaging_eviction ADD COLUMN orphaned boolean NOT NULL DEFAULT false;
