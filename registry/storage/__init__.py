"""PostgreSQL: the pool, the migrations, and every SQL statement of the registry. It knows values, never services."""
