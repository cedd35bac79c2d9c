"""`bam`, the command line. Importing a module of commands adds them to the application."""

# Imported for the commands that they add
from bam_ray.cli import adapters, bench, experts, models, recipes, runs, topics  # noqa: F401
from bam_ray.cli.app import main

__all__ = ["main"]
