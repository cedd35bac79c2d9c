"""Turn one pretrained language model into a mixture of experts: branch, upcycle, mix, evaluate and serve.

The names below are the public API. Each is imported when it is first used, so `import bam_ray` loads neither torch nor
Ray. Everything else in the package is internal and may change between releases.

    import bam_ray

    bam_ray.upcycle("models/base", {"code": "models/code", "law": "models/law"}, "mixtures/bam")
    model = bam_ray.load_mixture("mixtures/bam")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bam_ray.api import load_mixture, run, train_branch, upcycle, verify
    from bam_ray.blobs import open_store
    from bam_ray.errors import BamError
    from bam_ray.model import BamConfig, BamForCausalLM
    from bam_ray.settings import Recipe, load_recipe

__all__ = [
    "BamConfig",
    "BamError",
    "BamForCausalLM",
    "Recipe",
    "load_mixture",
    "load_recipe",
    "open_store",
    "run",
    "train_branch",
    "upcycle",
    "verify",
]

_MODULES = {
    "BamConfig": "bam_ray.model",
    "BamError": "bam_ray.errors",
    "BamForCausalLM": "bam_ray.model",
    "Recipe": "bam_ray.settings",
    "load_mixture": "bam_ray.api",
    "load_recipe": "bam_ray.settings",
    "open_store": "bam_ray.blobs",
    "run": "bam_ray.api",
    "train_branch": "bam_ray.api",
    "upcycle": "bam_ray.api",
    "verify": "bam_ray.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Return the names of the module, including those that are not imported yet."""
    return sorted({*globals(), *__all__})
