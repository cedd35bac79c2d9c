"""A local cluster whose parts can be made to fail, and checks that a run survived the failures."""
