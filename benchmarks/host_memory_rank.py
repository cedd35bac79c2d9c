"""One process of a case of `benchmarks.host_memory` or `checkpoint_memory`, with the imports of a worker."""

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets  # noqa: F401  (a worker has imported it, as the next ones)
import numpy as np
import ray.train.torch  # noqa: F401
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from bam_ray.blobs.folder import FolderStore
from bam_ray.checkpoint.artifacts import Artifact
from bam_ray.checkpoint.leases import AttemptNumber, Lease
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.model import BamConfig, BamForCausalLM
from bam_ray.settings import Mixing
from bam_ray.stages import run as stages  # noqa: F401
from bam_ray.stages.publish import write_model
from bam_ray.training.checkpoints import Checkpoints, Retention
from bam_ray.training.engine import Engine, EngineSpec
from bam_ray.training.listener import TrainingListener
from bam_ray.training.loop import Training
from bam_ray.training.memory import HostMemory, return_freed_memory
from bam_ray.training.state import SavableState
from bam_ray.training.torch_engine import TorchEngine

if TYPE_CHECKING:
    from benchmarks.host_memory import Case

VOCABULARY, LENGTH = 8192, 256
WRITE_SECONDS = 15.0  # longer than a step, as for a large model: the copy of the state stays while training continues


class RandomTokens:
    """A sampler of random tokens, which has no state."""

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `count` sequences [count, LENGTH] of one domain."""
        return np.random.default_rng(0).integers(0, VOCABULARY, (count, LENGTH)), np.ones((count, 1), dtype=np.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


def model(case: "Case") -> PreTrainedModel:
    """Return the model of a case."""
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": case.width,
        "intermediate_size": 3 * case.width,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.width // 32,
        "num_key_value_heads": case.width // 32,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    if case.experts == 1:
        built: PreTrainedModel = AutoModelForCausalLM.from_config(LlamaConfig(**shape))
        return built
    if case.tables:
        shape |= {"embeddings": "experts", "router_input": "prefix", "router_prior": "bigram"}
    return BamForCausalLM(BamConfig(**shape, num_experts=case.experts, attention_experts="kv_experts"))


def engine(case: "Case", memory_limit: int | None = None) -> Engine:
    """Return the engine that the stages would use; None: the process may use as much memory as the planner states."""
    limit = case.estimate if memory_limit is None else memory_limit
    spec = EngineSpec(model(case), case.training, Mixing(), case.share.expert_parallel, memory_limit=limit)
    if not case.share.is_group:
        return TorchEngine(spec)
    from bam_ray.on_deepspeed import deepspeed_engine

    return deepspeed_engine(spec)


class SlowlyWrittenState:
    """A state whose disk is slow."""

    def __init__(self, state: SavableState) -> None:
        self._state = state
        self.live, self.part, self.parts = state.live, state.part, state.parts

    def write(self, folder: Path) -> None:
        """Wait before the state is written."""
        time.sleep(WRITE_SECONDS)
        self._state.write(folder)


class SlowCheckpoints(Checkpoints):
    """Checkpoints on a slow disk."""

    def save(self, state: SavableState, trainer: dict[str, Any]) -> None:
        """Save the state, slowly if that is beside training."""
        super().save(state if state.live else SlowlyWrittenState(state), trainer)


def join_group(rank: int, case: "Case", port: int) -> None:
    """Prepare this process to be a rank of the case's group."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(case.share.workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)


def train(rank: int, case: "Case", port: int, folder: Path) -> None:
    """Train with checkpoints, gather the weights, and write the peak of this process's memory to `folder`."""
    join_group(rank, case, port)
    started = engine(case)
    HostMemory().reset_peak()  # a stage reads the weights of a mixture part by part
    artifact = Artifact(FolderStore(str(folder / "store")), ArtifactKind.MIXTURES, "case")
    lease = Lease.take(artifact.store, artifact.prefix, AttemptNumber(1, 1)) if rank == 0 else None
    checkpoints = SlowCheckpoints(artifact, lease, Retention(2, None))
    training = Training(started, RandomTokens(), LENGTH, case.training, checkpoints, TrainingListener())
    training.run()
    specs, weights = started.whole_weights()
    if rank == 0:
        write_model(started.model, specs, weights, folder / "model", torch.float32)
    for _ in weights:  # every rank takes part in gathering them
        pass
    (folder / f"peak-{rank}").write_text(str(HostMemory().peak_bytes()))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def save(rank: int, case: "Case", has_room: bool, port: int, folder: Path) -> None:
    """Write a checkpoint; write the peak above the memory before it, and the size of this part, to `folder`."""
    join_group(rank, case, port)
    started = engine(case, None if has_room else 1)
    assert isinstance(case.training.micro_batch_sequences, int)
    tokens, _ = RandomTokens().take(case.training.micro_batch_sequences)
    started.step(torch.from_numpy(tokens), 1e-4)
    artifact = Artifact(FolderStore(str(folder / "store")), ArtifactKind.MIXTURES, "case")
    lease = Lease.take(artifact.store, artifact.prefix, AttemptNumber(1, 1)) if rank == 0 else None
    checkpoints = Checkpoints(artifact, lease, Retention(2, None))
    checkpoints.share_lease(started.gather)
    memory = HostMemory()
    return_freed_memory()
    before = memory.used_bytes()
    memory.reset_peak()
    state = started.state()
    assert state is not None and state.live != has_room
    checkpoints.save(state, {"step": 1})
    del state
    checkpoints.wait()
    peak = memory.peak_bytes() - before
    parts = artifact.store.list(f"{artifact.prefix}/steps/")
    size = sum(artifact.store.size(key) for key in parts if f".part-{rank + 1:04d}-of-" in key)
    (folder / f"taken-{rank}").write_text(json.dumps([peak, size]))
    dist.barrier()
    dist.destroy_process_group()
