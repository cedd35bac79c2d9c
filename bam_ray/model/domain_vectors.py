"""A dense model with vectors for each domain: a control that has the prior of a mixture, but none of its experts.

    h  = model(E[x] + p · input) + p · output         input, output [N, d]
    logits = scale · head(h) + p · bias                bias [N, V]

Here p are the probabilities of the domains after the document so far: the exponential of the prior (`BigramPrior`). All
vectors begin as zeros, so the model begins as the dense model that it was made from.

Shapes: B batch, L length, N domains, d hidden size, V vocabulary size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from bam_ray.model.configuration_bam import BamConfig
from bam_ray.model.prefix_bam import BigramPrior, Documents, RoutingContext


class DomainVectorsConfig(PreTrainedConfig):
    """The configuration of a dense model with vectors for each domain.

    Args:
        text_config: The configuration of the dense model.
        num_experts: N, the number of domains, under the name that it has in the configuration of a mixture.
        router_prior_scale, router_prior_buckets, router_prior_vocab_size: Those of `BamConfig`.
    """

    model_type = "domain_vectors"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (transformers declares it without ClassVar)

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        num_experts: int = 2,
        router_prior_scale: float = BamConfig.router_prior_scale,
        router_prior_buckets: int = BamConfig.router_prior_buckets,
        router_prior_vocab_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(text_config, PreTrainedConfig):
            plain = dict(text_config or {"model_type": "cohere"})
            text_config = AutoConfig.for_model(plain.pop("model_type"), **plain)
        self.text_config: Any = text_config
        self.num_experts = num_experts
        self.router_prior_scale = router_prior_scale
        self.router_prior_buckets = router_prior_buckets
        self.router_prior_vocab_size = router_prior_vocab_size
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """The vocabulary size of the dense model."""
        size: int = self.text_config.vocab_size
        return size


class DomainVectorsForCausalLM(PreTrainedModel):
    """A dense model with vectors for each domain. It keeps no cache, so it scores text and does not generate it."""

    config_class = DomainVectorsConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: DomainVectorsConfig) -> None:
        super().__init__(config)
        dense = config.text_config
        self.dense: PreTrainedModel = AutoModelForCausalLM.from_config(dense)
        self.prior = BigramPrior(config)
        self.input = nn.Parameter(torch.zeros(config.num_experts, dense.hidden_size))
        self.output = nn.Parameter(torch.zeros(config.num_experts, dense.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_experts, dense.vocab_size))
        self.post_init()

    def forward(
        self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = False, **kwargs: Any
    ) -> CausalLMOutput:
        """Compute the logits [B, L, V] of `input_ids` [B, L]. Positions [B, L] that restart begin a document."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        domains = self.domains(input_ids, position_ids)
        embedding, head = self.dense.get_input_embeddings(), self.dense.get_output_embeddings()
        x = embedding(input_ids) + domains @ self.input
        out = self.dense.base_model(inputs_embeds=x, position_ids=position_ids, use_cache=False, **kwargs)
        scale = getattr(self.config.text_config, "logit_scale", 1.0)
        logits = head(out.last_hidden_state + domains @ self.output) * scale + domains @ self.bias
        return CausalLMOutput(logits=logits)

    def domains(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return the probability of each domain after each token and those before it in its document, [B, L, N]."""
        documents = Documents(position_ids, None, continues=False)
        context = RoutingContext(documents, None, input_ids.shape, input_ids.device, routers=0)
        context.add_prior(self.prior, input_ids)
        assert context.prior is not None
        return context.prior.exp().to(self.input.dtype)


AutoConfig.register(DomainVectorsConfig.model_type, DomainVectorsConfig, exist_ok=True)
AutoModelForCausalLM.register(DomainVectorsConfig, DomainVectorsForCausalLM, exist_ok=True)
