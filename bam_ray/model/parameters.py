"""How many parameters a model has, and how many of them a token meets."""

from transformers import PreTrainedModel


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """All parameters (tied ones once), and those that one token meets: its k of N FFN experts, everything else whole.

    Attention experts all count, also with top-k gates: each token gives keys and values to all of them.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    if model.config.model_type != "bam":
        return total, total
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp.experts." in name)
    return total, total - routed // experts * (experts - top_k)
