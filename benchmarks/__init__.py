"""Speed and memory, compared with peers: `python -m benchmarks.NAME`."""
