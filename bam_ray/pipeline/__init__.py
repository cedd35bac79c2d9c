"""The tasks of a run: the artifacts that a recipe makes, their ids, and the states that a task can have.

graph           the tasks of a recipe, parents first
tasks           one task, its progress, and the interface between a stage and the process that runs it
states          the states of a task, and the history of its attempts
readiness       whether a task can start, given the states of the tasks that it is made from
drain_policies  rules that end a running attempt early, so that the next attempt continues with more

Neither torch nor Ray is imported here.
"""
