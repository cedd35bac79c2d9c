"""Plans: the tokens, memory, bytes and time that a run takes, computed before anything starts.

Neither torch nor Ray is imported here.
"""
