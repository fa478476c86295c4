"""Models of time held against measurements: reading benchmarks, fitting them, and saying what they do not tell."""
