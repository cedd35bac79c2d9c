"""`bam`, the command line. Importing a module of commands adds them to the application."""

from bam_ray.cli import bench, experts, models, recipes, runs  # noqa: F401  imported for the commands that they add
from bam_ray.cli.app import main

__all__ = ["main"]
