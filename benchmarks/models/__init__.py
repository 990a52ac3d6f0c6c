"""Models that benchmarks train for themselves."""
