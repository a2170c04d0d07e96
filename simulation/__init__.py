"""Many clients in one process, and the built-in example; over the same aggregation and trainer as the service."""
