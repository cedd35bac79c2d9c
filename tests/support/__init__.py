"""Helpers that tests and benchmarks share; no module in this package contains tests."""
