r"""Upcycle a seed and its branches to a mixture, verify the mixture and load it.

    python examples/upcycle_folders.py --seed models/base --branch code=models/code --branch law=models/law \
        --out mixture

Without `--seed`, three tiny random models are created first, so that the script runs anywhere in seconds.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bam_ray


def make_tiny_models(folder: Path) -> tuple[str, dict[str, str]]:
    """Write a random seed and two branches below `folder` and return their paths; the branches differ from the seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "seed")
    for name in ("code", "law"):
        branch = LlamaForCausalLM(config)
        branch.load_state_dict(
            {key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in model.state_dict().items()}
        )
        branch.save_pretrained(folder / name)
    return str(folder / "seed"), {name: str(folder / name) for name in ("code", "law")}


def main() -> None:
    """Read the command line and upcycle."""
    parser = argparse.ArgumentParser(description="Upcycle model folders to a mixture.")
    parser.add_argument("--seed", help="the seed's Hugging Face folder (default: tiny random models)")
    parser.add_argument("--branch", action="append", default=[], metavar="NAME=FOLDER", help="a branch; repeatable")
    parser.add_argument("--out", default="mixture", help="the folder of the mixture, which must not exist yet")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        if arguments.seed:
            seed, branches = arguments.seed, dict(pair.split("=", 1) for pair in arguments.branch)
        else:
            seed, branches = make_tiny_models(Path(folder))
        bam_ray.upcycle(seed, branches, arguments.out, settings={"num_experts_per_tok": 2, "norm_topk_prob": True})

    for check in bam_ray.verify(arguments.out):
        print(f"{'pass' if check.passed else 'FAIL'}  {check.name}")
    mixture = bam_ray.load_mixture(arguments.out)
    print(f"{arguments.out}: experts {', '.join(mixture.config.expert_names)}, {mixture.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
