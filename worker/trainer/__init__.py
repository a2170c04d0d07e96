"""The trainer process: loads torch, trains and evaluates what its agent asks for, and never imports grpc."""
