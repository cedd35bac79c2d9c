"""Text to packed tokens, and packed tokens to batches: `build_corpus`, `Corpus`, `BlendedSampler`."""

from bam_ray.data.build import build_corpus
from bam_ray.data.corpus import Corpus
from bam_ray.data.sampling import BlendedSampler

__all__ = ["BlendedSampler", "Corpus", "build_corpus"]
