"""Everything that imports Ray: the launcher behind the controller, its actors, jobs and the endpoint.

run.py          the driver: controller, launcher, status and table      (runs inside a job, on the cluster)
launcher.py     one actor per task
work.py         what an actor is sent
task_actor.py   the actor: runs a stage on a thread and answers calls at once
group.py        the processes of one task that train together, under Ray Train
worker_env.py   node, output, threads and log of a worker process
gauges.py       the progress of a task in Ray's Prometheus endpoint
cluster.py      the living nodes and their free resources
spot.py         reports the interruption notice of a spot node to Ray
job.py          what the scripts in `jobs/` share
submit.py       submits a job from a user's machine, and shows its progress there
serve_app.py    the OpenAI-compatible endpoint on Ray Serve
replica.py      one replica of it
replica_metrics.py  the metrics of a replica in Ray's Prometheus endpoint
scaling.py      the number of replicas for the load
proxy.py        errors for the responses of replicas that die
follow.py       its models over time: rollback, and new models that the run commits
run_summary.py  the results that a job prints at the end of a run
"""
