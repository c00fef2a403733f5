"""What a run costs, part by part: ``python benchmarks/bench.py``; docs/performance.md says how to read it."""
