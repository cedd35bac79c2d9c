"""Benchmarks: ratios to peers and lower bounds. Each is one command, prints a table and writes JSON."""
