"""Demo data, benchmarks and checks. The tools run from a checkout, and are not part of the wheel."""
