"""The coordinator: rank profiles, rounds, aggregation; no torch."""
