"""The number of parameters of a model, and the number that one token uses."""

from transformers import PreTrainedModel

from bam_ray.model.configuration_bam import is_mixture


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Return the number of all parameters and the number that one token uses; tied parameters count once.

    A token uses k of the N FFN experts of each layer, and everything else. All attention experts count, even if only
    the top k of them have a gate above 0: each token provides keys and values to all of them. All embedding experts
    count too, because their gates are soft. The counts of a router prior are no parameters.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    if not is_mixture(model.config):
        return total, total
    experts, top_k = model.config.num_experts, model.config.num_experts_per_tok
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp.experts." in name)
    return total, total - routed // experts * (experts - top_k)
