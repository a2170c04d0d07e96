"""The gRPC face of the coordinator: messages in, domain values in; errors become statuses in one interceptor."""
