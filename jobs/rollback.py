"""Serve again the model that the endpoint of a recipe has served before."""

from bam_ray.on_ray.job import rollback_job

if __name__ == "__main__":
    rollback_job()
