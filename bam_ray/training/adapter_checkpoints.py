"""The trained adapters of a task that is not finished: each is saved as soon as it is trained.

    adapters/<id>/steps/<attempt>-<topic>/   adapter.safetensors, entry.json, manifest.json last

They are the checkpoints of the task. After a lost worker, the next attempt trains only the topics that are missing.
"""

from safetensors.torch import load_file, save_file

from bam_ray.adapters.bundles import AdapterEntry, pairs_of, tensors_of
from bam_ray.adapters.weights import AdapterWeights
from bam_ray.checkpoint.artifacts import Artifact, delete_keys
from bam_ray.checkpoint.leases import Lease
from bam_ray.checkpoint.manifest import ComputeCost, Manifest
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.errors import BlobNotFound, CheckpointError
from bam_ray.training.checkpoints import committed_checkpoints, retry_while_unavailable

WEIGHTS, ENTRY = "adapter.safetensors", "entry.json"


class AdapterCheckpoints:
    """The adapters that the attempts at one task have trained, by the number of the topic.

    Args:
        artifact: The artifact of the task.
        lease: The lease of this attempt.
    """

    def __init__(self, artifact: Artifact, lease: Lease) -> None:
        self._artifact, self._lease, self._retrying = artifact, lease, retry_while_unavailable()
        self._saved = {int(name.rpartition("-")[2]): name for name in committed_checkpoints(artifact)}

    @property
    def topics(self) -> set[int]:
        """The numbers of the topics whose adapters are saved."""
        return set(self._saved)

    def drop_damaged(self) -> dict[str, str]:
        """Read all saved adapters and forget those that are damaged; return the errors of these by their names."""
        errors = {}
        for topic, name in list(self._saved.items()):
            try:
                self._retrying(self._checkpoint(name).fetch)
            except (CheckpointError, BlobNotFound) as error:
                errors[name] = str(error)
                del self._saved[topic]
                store = self._artifact.store
                delete_keys(store, store.list(f"{self._checkpoint(name).prefix}/"))
        return errors

    def save(self, topic: int, weights: AdapterWeights, entry: AdapterEntry, cost: ComputeCost) -> None:
        """Commit a trained adapter; raises `StaleLease` if a newer attempt has taken over."""
        name = f"{self._lease.number}-{topic:08d}"
        checkpoint = self._checkpoint(name)
        manifest = Manifest(
            id=checkpoint.id,
            kind=checkpoint.kind,
            name=name,
            step=topic,
            tokens=entry.tokens,
            compute=cost,
            attempt=str(self._lease.number),
        )
        with scratch_folder("adapter") as folder:
            save_file(tensors_of(weights), folder / WEIGHTS, {"format": "pt"})
            (folder / ENTRY).write_text(entry.model_dump_json())
            self._retrying(checkpoint.publish, folder, manifest, self._lease)
        self._saved[topic] = name

    def entry(self, topic: int) -> AdapterEntry:
        """Return the record of a saved adapter."""
        folder = self._retrying(self._checkpoint(self._saved[topic]).fetch)
        return AdapterEntry.model_validate_json((folder / ENTRY).read_bytes())

    def weights(self, topic: int, name: str, scale: float) -> AdapterWeights:
        """Return a saved adapter with the given name and scale."""
        folder = self._retrying(self._checkpoint(self._saved[topic]).fetch)
        return AdapterWeights(name, scale, pairs_of(load_file(folder / WEIGHTS)))

    def cost(self) -> ComputeCost:
        """Return the compute of all saved adapters."""
        manifests = [self._checkpoint(name).manifest() for name in self._saved.values()]
        costs = [manifest.compute for manifest in manifests if manifest is not None]
        return ComputeCost(
            flops=sum(cost.flops for cost in costs),
            device_seconds=round(sum(cost.device_seconds for cost in costs), 3),
            wall_seconds=round(sum(cost.wall_seconds for cost in costs), 3),
        )

    def clear(self) -> None:
        """Delete all saved adapters, because the artifact itself is committed."""
        store = self._artifact.store
        delete_keys(store, store.list(f"{self._artifact.prefix}/steps/"))

    def _checkpoint(self, name: str) -> Artifact:
        return Artifact(self._artifact.store, self._artifact.kind, self._artifact.id, "steps", name)
