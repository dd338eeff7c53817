-- Lists are read page by page: each filter has an index in the order of its pages, so that a page costs what it shows.
DROP INDEX device_by_status;
CREATE INDEX device_by_status ON device (tenant_id, status, created_at, device_id);
DROP INDEX device_by_profile;
CREATE INDEX device_by_profile ON device (tenant_id, profile_id, created_at, device_id);
DROP INDEX device_by_gateway;
CREATE INDEX device_by_gateway ON device (tenant_id, gateway_id, created_at, device_id) WHERE gateway_id IS NOT NULL;
DROP INDEX device_by_template;
CREATE INDEX device_by_template ON device (template_id, tenant_id, created_at, device_id)
    WHERE template_id IS NOT NULL;
CREATE INDEX device_by_site ON device (tenant_id, site_id, created_at, device_id) WHERE site_id IS NOT NULL;
CREATE INDEX credential_by_kind ON credential (tenant_id, kind, created_at, credential_id);
DROP INDEX registration_token_by_tenant;
CREATE INDEX registration_token_open ON registration_token (tenant_id, created_at, token_id)
    WHERE used_at IS NULL AND revoked_at IS NULL;

-- Which nodes have interests is asked every two seconds.
CREATE INDEX messaging_route_of_living_node ON messaging_route (node_id)
    WHERE node_id IS NOT NULL AND removed_at IS NULL;
