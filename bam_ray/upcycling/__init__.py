"""Upcycling: seed and branches in, a mixture at step 0 out. Weights only, no training."""

from bam_ray.upcycling.methods import METHODS, Method, Operation, method_of
from bam_ray.upcycling.preflight import check_sources
from bam_ray.upcycling.upcycle import upcycle

__all__ = ["METHODS", "Method", "Operation", "check_sources", "method_of", "upcycle"]
