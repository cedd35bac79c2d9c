"""A recipe whose tasks train for hours on GPUs."""

from bam_ray.settings import Recipe, parse_recipe

RECIPE = """
name: night
store: {uri: 's3://bam/night'}
data:
  domains: {general: {source: x}, code: {source: x}, law: {source: x}, math: {source: x}}
  sequence_length: 1024
  tokenizer: {vocab_size: 32000}
seed:
  scratch: {hidden_size: 512, intermediate_size: 1536, layers: 8, heads: 8, kv_heads: 4}
  training: {tokens: 100000000, batch_tokens: 131072, peak_lr: 0.001}
  needs: {gpus: 1}
branch:
  domains: [code, law, math]
  training: {tokens: 1000000000, batch_tokens: 131072, peak_lr: 0.001, checkpoint_every: 100}
  needs: {gpus: 1}
upcycle: {mixtures: {bam: {method: bam}, btx: {method: btx, num_experts_per_tok: 2}}}
mix: {workers: 2, training: {tokens: 100000000, batch_tokens: 131072, peak_lr: 0.001}, needs: {gpus: 1}}
"""


def recipe(*overrides: str) -> Recipe:
    """Return the recipe with overrides."""
    return parse_recipe(RECIPE, "test", list(overrides))
