"""Serving: a decode engine with continuous batching, and an OpenAI-compatible HTTP app over it. No Ray here.

engine = DecodeEngine(model, tokenizer, slots=8, max_length=512)
app = create_app(Scheduler(engine), "demo")      # FastAPI: uvicorn or Ray Serve can run it
"""

from bam_ray.serving.app import create_app
from bam_ray.serving.engine import DecodeEngine
from bam_ray.serving.sampling import Sampling
from bam_ray.serving.scheduler import Scheduler

__all__ = ["DecodeEngine", "Sampling", "Scheduler", "create_app"]
