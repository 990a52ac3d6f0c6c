"""Every backend of the networks, beside eager and stock: ``python -m benchmarks.engine.backends``."""
