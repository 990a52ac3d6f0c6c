"""What the benchmarks share, one noun a module; none of it measures anything by itself."""
