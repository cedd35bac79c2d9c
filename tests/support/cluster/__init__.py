"""Helpers for tests of cluster files and of runs on real Ray clusters."""
