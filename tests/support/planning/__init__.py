"""Simulated runs for the tests of planning."""
