"""Mistral: Llama's layout; its sliding window is not supported (models since v0.2 have none)."""

from bam_ray.families.family import Family
from bam_ray.families.llama import LLAMA

MISTRAL = Family("mistral", LLAMA.weights, LLAMA.configure, refused={"sliding_window": None})
