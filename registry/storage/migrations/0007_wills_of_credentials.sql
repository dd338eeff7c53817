-- Whether a will is still its device's to speak is asked when it is due, and its session may be gone by then. So it says
-- itself with whose revocation it is dropped.
ALTER TABLE messaging_will ADD COLUMN credential_id uuid;
UPDATE messaging_will w SET credential_id = s.credential_id FROM messaging_session s WHERE s.session_id = w.session_id;
