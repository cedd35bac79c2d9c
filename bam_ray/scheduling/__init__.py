"""Placement of tasks on nodes: pure functions over the living nodes, the tasks and the measured throughput.

nodes           the resources of nodes, and whether they can satisfy a request
cluster_view    the free resources of all nodes during one controller step
throughput      measured tokens per second and measured costs of starts and checkpoints
matching        which task runs on which node, by remaining work and speed
placement       `matching` applied to one view of the cluster
feasibility     whether a cluster can run all tasks at all
elastic         groups that continue with fewer workers

Neither torch nor Ray is imported here.
"""
