"""The controller: it gets every task of a run committed, on nodes that join and leave.

    controller = Controller(tasks, store, launcher)    # controller.py: poll, decide, act
    controller.run()                                   # policies.py decides

Neither torch nor Ray is imported here: a `Launcher` runs the tasks.
"""
