"""The parts of benchmarks/speed.py: each builds what it times and returns rows."""
