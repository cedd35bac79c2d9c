"""The controller: which artifacts a recipe asks for, and how they get made by nodes that come and go.

    tasks = task_graph(recipe)                                # graph.py: what, under which identity
    controller = Controller(tasks, store, launcher)           # controller.py: poll, decide, act
    controller.run()                                          # policies.py decides; states.py says what can be

Neither torch nor Ray is imported here: a `Launcher` runs the tasks.
"""
