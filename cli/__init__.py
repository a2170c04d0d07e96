"""The `raflora` command: one file a verb."""
