"""Model cards of mixtures and averaged models: architecture, lineage and use."""

from collections.abc import Mapping
from typing import Any

import jinja2
import torch

from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.model.parameters import count_parameters

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [moe, merge, bam_ray]
---

# A mixture of {{ config.num_experts }} experts: {{ config.expert_names | join(", ") }}

| | |
| --- | --- |
| dense architecture | {{ config.seed_config.model_type }} |
| layers | {{ config.num_hidden_layers }} |
| dense layers | {{ config.dense_layers | join(", ") if config.dense_layers else "none" }} |
| FFN experts | {{ config.num_experts }}, top-{{ config.num_experts_per_tok }} \
({{ "normalized" if config.norm_topk_prob else "softmax over all" }}, scale {{ config.ffn_output_scale }})\
{% if config.shared_expert_intermediate_size %}, and one always on{% endif %} |
| attention | {{ attention }} |
| embeddings | {{ "embedding experts, each with its own embedding and head" if config.embeddings == "experts" \
else "one embedding and one head, shared by all experts" }} |
| routers | {{ "read the running mean of the document so far" if config.router_input == "prefix" \
else "read single tokens" }}\
{% if config.router_prior != "none" %}, with a {{ config.router_prior }} prior (scale {{ config.router_prior_scale }})\
{% endif %}{% if config.router_forgetting < 1 %}; a token's weight is multiplied by {{ config.router_forgetting }} \
with each later token{% endif %} |
| parameters | {{ "{:,}".format(total) }}, of which {{ "{:,}".format(active) }} process each token |

"""

DENSE_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [merge, bam_ray]
---

# A weight average of {{ (lineage.sources | list)[first:] | join(", ") }}

One dense {{ config.model_type }} model.
"""

LINEAGE_CARD = """
## Lineage

{% for step in lineage.history %}
{% for verb, settings in step.items() %}- {{ verb }}: `{{ settings | tojson }}`
{% endfor %}{% endfor %}

`lineage.json` records for every tensor which operation made it from which inputs. `manifest.json` contains the SHA-256
of every file.{% if config.expert_names %} `bam verify` checks the files and the arithmetic of this folder.{% endif %}


## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder{{ remote }})
tokenizer = AutoTokenizer.from_pretrained(folder)
```
"""

ATTENTION = {
    "kv_experts": "attention experts (BAM), each with its own keys and values",
    "kv_shared": "attention experts (BAM) that share keys and values",
    "averaged": "one dense attention, shared by all FFN experts",
}


def model_card(config: BamConfig, lineage: Mapping[str, Any]) -> str:
    """Return the README.md of a mixture's folder."""
    with torch.device("meta"):
        total, active = count_parameters(BamForCausalLM(config))
    attention = ATTENTION[config.attention_experts]
    remote = ", trust_remote_code=True"
    return _render(CARD, config=config, lineage=lineage, attention=attention, total=total, active=active, remote=remote)


def dense_card(config: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    """Return the README.md of the folder of a dense model that was averaged."""
    # Only the settings that differ from their defaults are in the lineage. The seed is the first source.
    first = 0 if lineage["history"][-1]["upcycle"].get("seed_expert", True) else 1
    return _render(DENSE_CARD, config=config, lineage=lineage, remote="", first=first)


def _render(card: str, **values: Any) -> str:
    environment = jinja2.Environment(undefined=jinja2.ChainableUndefined, trim_blocks=True, autoescape=False)
    return environment.from_string(card + LINEAGE_CARD).render(values)
