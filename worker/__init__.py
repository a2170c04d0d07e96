"""The worker: an agent that speaks gRPC and never imports torch, and beside it its trainer (worker/trainer)."""
