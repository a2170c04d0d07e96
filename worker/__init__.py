"""The worker: an agent that speaks gRPC and never imports torch, and a trainer that never imports grpc."""
