-- A session may end because its queue stayed full (registry/full_queues.py); its owner is told so, not that it was
-- taken over.
ALTER TABLE messaging_eviction ADD COLUMN full_queue boolean NOT NULL DEFAULT false;
