"""Serving: a decode engine with continuous batching, and an OpenAI-compatible HTTP app on top of it.

This package does not depend on Ray. `bam_ray.on_ray.serve_app` deploys the app on Ray Serve.

    engine = DecodeEngine(model, tokenizer, slots=8, max_length=512)
    app = create_app(Scheduler(engine), "demo")      # a FastAPI app, which uvicorn or Ray Serve can run
"""

from bam_ray.serving.app import create_app
from bam_ray.serving.app_parts import AppOptions
from bam_ray.serving.engine import DecodeEngine
from bam_ray.serving.ensemble import PosteriorEnsemble
from bam_ray.serving.sampling import SamplingParams
from bam_ray.serving.scheduler import Scheduler

__all__ = ["AppOptions", "DecodeEngine", "PosteriorEnsemble", "SamplingParams", "Scheduler", "create_app"]
