"""`bam`: the command line, a module a subject; importing one adds its commands."""

from bam_ray.cli import models, recipes, runs, steps  # noqa: F401
from bam_ray.cli.app import main

__all__ = ["main"]
