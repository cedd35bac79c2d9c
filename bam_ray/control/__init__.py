"""The controller: it gets every task of a run committed, on nodes that join and leave the cluster.

    controller = Controller(tasks, store, launcher)
    controller.run()

controller       poll the launcher, decide, apply: the only code that changes the state of a task
transitions      a change of a task's state, and what the launcher must do for it
decisions        which tasks to stop, move, withdraw, block or launch
tracking         what follows from the launcher's report of an attempt
policies         retry or give up after a failure
drivers          the drivers that share a store, and which of them makes a task
store_watch      the store as the controller sees it, while it may fail
quorum_deadline  the deadlines for late branches, stored so that they outlive the controller
launcher         the interface to whatever runs attempts, and an implementation on threads
observations     the statuses of attempts that a launcher reports
attempt          one attempt as a thread
status           `status.json`, which shows a run to anyone who can read its blob store
status_table     a status as a table
storage          the size of a run's artifacts

Neither torch nor Ray is imported here.
"""
