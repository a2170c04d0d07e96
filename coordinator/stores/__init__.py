"""What survives the coordinator's process: the journal of events, blobs by content, uploads in progress."""

from coordinator.stores.lock import StateLock, lock_state_folder

__all__ = ["StateLock", "lock_state_folder"]
