"""Helpers for tests of the task graph, the controller and the simulator."""
