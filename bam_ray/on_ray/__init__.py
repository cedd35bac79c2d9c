"""Everything that imports Ray: the launcher behind the controller, its actors, and jobs.

run.py          the driver: controller + launcher, a status and a table      (runs inside a job, on the cluster)
launcher.py     one actor per task, whatever happens to nodes
task_actor.py   the actor: runs a stage on a thread, answers at once
group.py        the processes of one task that train together, under Ray Train
cluster.py      what nodes there are, and whether a demand can ever be met
submit.py       a job from one's own machine, followed as one live table
"""
