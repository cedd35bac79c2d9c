"""Export of a mixture as a `MixtralForCausalLM` folder, which every runtime that supports Mixtral can load.

Mixtral is a Llama block with routed FFN experts and normalized top-k gates. Mixtures that have only FFN experts and
come from a family with Llama's layout can be exported: BTX, sparse upcycling, and splits without a shared expert. The
output scale is multiplied into the down projections of the experts. Other mixtures are refused and never approximated.
The tensors in the files have Mixtral's original names, which transformers and other runtimes read.
"""

from typing import Any

from transformers import MixtralConfig

from bam_ray.checkpoint.manifest import Manifest
from bam_ray.checkpoint.tensors import TensorReader, TensorSpec
from bam_ray.checkpoint.writing import ModelWriter
from bam_ray.errors import UpcycleError
from bam_ray.families import SHARED_SETTINGS
from bam_ray.model import BamConfig
from bam_ray.upcycling.dense import check_mixture, seed_config
from bam_ray.upcycling.expressions import Expression, Scaled, Slice, Take
from bam_ray.upcycling.plan import PlannedTensor
from bam_ray.upcycling.tokenizers import carried_files
from bam_ray.upcycling.write import ProgressCallback, with_progress

MIXTURE = "mixture"
"""The name of the exported mixture among the sources."""


def export_mixtral(
    mixture: TensorReader, writer: ModelWriter, manifest: Manifest, progress: ProgressCallback | None = None
) -> MixtralConfig:
    """Write a mixture as Mixtral and commit it.

    Args:
        mixture: The mixture to export.
        writer: The writer of the exported folder.
        manifest: The manifest to commit. The digests of the files are added.
        progress: Called after each chunk.

    Raises:
        UpcycleError: Mixtral cannot compute the function of this mixture.
    """
    config = check_mixture(mixture)
    check_fits(config)
    sources = {MIXTURE: mixture}
    outputs = [output for spec in mixture.specs.values() for output in _outputs(spec, config, sources)]
    expressions = {output.spec.name: output.expression for output in outputs}
    writer.write_tensors(
        [output.spec for output in outputs],
        with_progress(lambda spec: expressions[spec.name].pieces(sources), outputs, progress),
    )
    for name, data in carried_files(mixture).items():
        writer.write_file(name, data)
    mixtral = mixtral_config(config)
    writer.commit(mixtral.to_json_string(), manifest)
    return mixtral


def check_fits(config: BamConfig) -> None:
    """Raise `UpcycleError`, which names the setting, if Mixtral cannot compute the function of this mixture."""
    whole = (
        config.num_experts_per_tok == config.num_experts
    )  # then the softmax over all experts sums to 1 without normalization
    for unsupported, what in (
        (config.attention_experts != "averaged", f"attention experts ({config.attention_experts})"),
        (config.embeddings == "experts", "embedding experts"),
        (config.router_input == "prefix", "routers that read the prefix"),
        (config.router_prior != "none", f"a router prior ({config.router_prior})"),
        (bool(config.shared_expert_intermediate_size), "a shared expert"),
        (config.selection_bias, "selection biases"),
        (bool(config.dense_layers), f"dense layers {config.dense_layers}"),
        (not config.norm_topk_prob and not whole, "gates that are not normalized (norm_topk_prob is false)"),
        (seed_config(config)["model_type"] not in ("llama", "mistral"), f"a {seed_config(config)['model_type']} block"),
        (config.attention_bias or config.attention_output_bias or config.mlp_bias, "biases"),
    ):
        if unsupported:
            raise UpcycleError(f"this mixture has {what}, which Mixtral does not support: keep it in its own format")


def mixtral_config(config: BamConfig) -> MixtralConfig:
    """Return the configuration of the exported model."""
    same = (
        *SHARED_SETTINGS,
        "sliding_window",
        "attention_dropout",
        "num_experts_per_tok",
        "router_aux_loss_coef",
        "dtype",
    )
    settings: dict[str, Any] = {key: getattr(config, key) for key in same}
    mixtral = MixtralConfig(**settings, rms_norm_eps=config.norm_eps, num_local_experts=config.num_experts)
    mixtral.architectures = ["MixtralForCausalLM"]
    return mixtral


def _outputs(spec: TensorSpec, config: BamConfig, sources: dict[str, TensorReader]) -> list[PlannedTensor]:
    """Return the tensors of Mixtral that one tensor of the mixture becomes."""
    layer, _, kind = spec.name.partition(".mlp.")
    if not kind:
        return [PlannedTensor(spec, Take(MIXTURE, spec.name))]
    moe = f"{layer}.block_sparse_moe"
    if kind == "gate.weight":
        return [PlannedTensor(TensorSpec(f"{moe}.gate.weight", spec.dtype, spec.shape), Take(MIXTURE, spec.name))]
    if kind == "gate.noise_weight":  # used only in training
        return []
    rows = spec.shape[1]
    parts: dict[str, tuple[int, int]]
    parts = {"w1": (0, rows // 2), "w3": (rows // 2, rows)} if kind == "experts.gate_up_proj" else {"w2": (0, rows)}
    outputs = []
    for expert in range(config.num_experts):
        for name, (first, last) in parts.items():
            part: Expression = Slice(MIXTURE, spec.name, expert, first, last)
            if name == "w2" and config.ffn_output_scale != 1.0:
                part = Scaled(part, config.ffn_output_scale)
            shape = part.shape(sources)
            outputs.append(PlannedTensor(TensorSpec(f"{moe}.experts.{expert}.{name}.weight", spec.dtype, shape), part))
    return outputs
