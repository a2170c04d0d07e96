"""What coordinator and worker share: adapters, their bytes, transfer, channel, settings, errors, logs."""
