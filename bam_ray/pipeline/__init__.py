"""The tasks of a run: which artifacts a recipe makes, under which identities, and the states that a task can be in.

    tasks = task_graph(recipe)        # graph.py

Neither torch nor Ray is imported here.
"""
