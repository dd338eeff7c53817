"""The process: command line, configuration, wiring, supervision, embedded PostgreSQL, logs, metrics, health."""
