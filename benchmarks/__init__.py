"""Speed and memory, ours beside the peers: `python -m benchmarks.NAME`."""
