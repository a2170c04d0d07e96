"""What many and large clients cost a real coordinator process: memory, handles, CPU and patience. See docs/load.md."""
