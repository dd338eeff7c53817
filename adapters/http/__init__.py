"""HTTPS: the operators' API, the devices' API, and the events stream."""
