"""Demo data, benchmarks and checks that run from a checkout; never installed."""
