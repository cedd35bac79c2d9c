"""The adapters of a run: those that it has trained, and those that were imported for its seed.

An imported adapter is an artifact of its own, so its manifest says where it is from. An adapter is removed by a mark
beside the manifest, because the files of an artifact are never changed. The artifact of an imported adapter is deleted.

    adapters/part-00-<hash>/                     adapters of a task
    adapters/part-00-<hash>/removed/topic-0003   this adapter is not used any more
    adapters/<name>-<hash>/                      an imported adapter
"""

import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from bam_ray.adapters.bundles import (
    INDEX,
    AdapterEntry,
    AdapterIndex,
    AdapterIndexFile,
    BaseIdentity,
    write_bundles,
)
from bam_ray.adapters.peft_folder import read_peft_folder, write_peft_folder
from bam_ray.adapters.weights import AdapterWeights
from bam_ray.checkpoint.artifacts import Artifact, delete_keys
from bam_ray.checkpoint.manifest import ArtifactKind, Manifest, ManifestGeneration, identity
from bam_ray.checkpoint.scratch import scratch_folder
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.errors import CheckpointError
from bam_ray.pipeline.run import PipelineRun

_logger = logging.getLogger(__name__)

REMOVED = "removed/"  # below the prefix of an artifact: the names of its adapters that are not used any more
IMPORTED = "imported_from"  # in the facts of the manifest of an imported adapter


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter of a run, and the index that it is read from."""

    entry: AdapterEntry
    index: AdapterIndex

    @property
    def origin(self) -> str:
        """The folder that the adapter was imported from; empty if the run has trained it."""
        return str(self.index.manifest.facts.get(IMPORTED, ""))

    def read(self) -> AdapterWeights:
        """Read the adapter; raises as `AdapterIndex.read` does."""
        return self.index.read(self.entry.name)


@dataclass(frozen=True)
class DamagedAdapter:
    """An imported adapter whose index cannot be read.

    Attributes:
        name: Its name.
        artifact: Its artifact.
        reason: One line that says what is wrong.
    """

    name: str
    artifact: Artifact
    reason: str


class RunAdapters:
    """The committed adapters of a run by name, in the order of their names.

    Args:
        run: The run.

    Raises:
        CheckpointError: The seed is not committed, or the index of adapters that the run has trained is damaged or
            belongs to another model.

    Attributes:
        found: The adapters at the time of the last `refresh`.
        damaged: The imported adapters that cannot be read, by name.
    """

    def __init__(self, run: PipelineRun) -> None:
        self._run = run
        self._seed = run.artifact(ArtifactKind.SEEDS, "seed")
        self.base = base_identity(self._seed)
        topics = run.recipe.adapters.task_names if run.recipe.adapters else []  # without controls
        self._trained = {run.task(ArtifactKind.ADAPTERS, name).id for name in topics}
        self._indexes: dict[tuple[str, ...], AdapterIndex | DamagedAdapter | None] = {}  # None: of other runs
        self.found: dict[str, FoundAdapter] = {}
        self.damaged: dict[str, DamagedAdapter] = {}
        self.refresh()

    def refresh(self) -> None:
        """Look for adapters that were added or removed. Indexes that are known are not read again."""
        kind, names = ArtifactKind.ADAPTERS, defaultdict[str, list[str]](list)
        for key in self._run.store.list(f"{kind}/"):
            _, id, name = key.split("/", 2)
            names[id].append(name)
        found: dict[str, FoundAdapter] = {}
        damaged: dict[str, DamagedAdapter] = {}
        for id, parts in names.items():
            generation = ManifestGeneration(parts)
            if not generation.committed:
                continue
            # The folder changes if an adapter is removed and imported again
            version = (id, generation.manifest_name, *(part for part in parts if part.endswith(f"/{INDEX}")))
            if version not in self._indexes:
                self._indexes[version] = self._open(Artifact(self._run.store, kind, id))
            index = self._indexes[version]
            if isinstance(index, DamagedAdapter):
                damaged[index.name] = index
            elif index is not None:
                removed = {name.removeprefix(REMOVED) for name in parts if name.startswith(REMOVED)}
                found |= {name: FoundAdapter(index.entry(name), index) for name in index.names if name not in removed}
        self.found, self.damaged = dict(sorted(found.items())), damaged

    def get(self, name: str) -> FoundAdapter:
        """Return an adapter; raises `CheckpointError` if there is none with this name, or if it is damaged."""
        if name in self.damaged:
            raise CheckpointError(self.damaged[name].reason)
        if name not in self.found:
            raise CheckpointError(f"the run has no adapter {name!r}: `bam adapters list` shows all")
        return self.found[name]

    def export(self, name: str, folder: Path) -> None:
        """Write an adapter to `folder` in the format of peft.

        Raises:
            CheckpointError: There is no such adapter, it is damaged, or the folder is not empty.
        """
        adapter = self.get(name)
        refuse_content(folder)
        weights = adapter.read()
        folder.mkdir(parents=True, exist_ok=True)
        write_peft_folder(folder, weights, adapter.index.file, self._run.recipe.seed.folder or self._seed.uri)

    def export_all(self, folder: Path) -> None:
        """Write every adapter to a folder of its name below `folder`; raises as `export` does."""
        refuse_content(folder)
        for name in self.found:
            self.export(name, folder / name)

    def add(self, name: str, folder: Path) -> Manifest:
        """Import the adapter in a folder of peft.

        Raises:
            CheckpointError: The name is taken, or the adapter cannot be served (see `peft_folder.read_peft_folder`).
        """
        if name in self.found or name in self.damaged:
            raise CheckpointError(f"the run has an adapter {name!r} already: choose another name or remove it first")
        adapter = read_peft_folder(folder, name, self._layers(), self.base)
        index = AdapterIndexFile(
            base=self.base,
            rank=adapter.rank,
            alpha=adapter.alpha,
            rank_stabilized=adapter.rank_stabilized,
            targets=adapter.targets,
        )
        with scratch_folder("adapter") as files:
            index = write_bundles(files, index, [AdapterEntry(name=name)], lambda _: adapter.weights)
            parents = (self._seed.id,)
            id = identity(name, index.model_dump(mode="json"), parents)
            kind = ArtifactKind.ADAPTERS
            facts = {IMPORTED: str(folder.absolute())}
            manifest = Manifest(id=id, kind=kind, name=name, parents=parents, facts=facts)
            return Artifact(self._run.store, kind, id).publish(files, manifest)

    def remove(self, name: str) -> None:
        """Delete an imported adapter, or mark a trained one as removed; raises `CheckpointError` if there is none."""
        is_damaged = name in self.damaged
        artifact = self.damaged[name].artifact if is_damaged else self.get(name).index.artifact
        if is_damaged or self.found[name].origin:
            delete_keys(artifact.store, artifact.store.list(f"{artifact.prefix}/"))
        else:
            artifact.store.put(f"{artifact.prefix}/{REMOVED}{name}", b"")

    def _open(self, artifact: Artifact) -> AdapterIndex | DamagedAdapter | None:
        """Return the index of an artifact; None if the run has neither trained nor imported its adapters."""
        if artifact.id in self._trained:
            return AdapterIndex(artifact, self.base)
        manifest = artifact.manifest()
        if manifest is None or IMPORTED not in manifest.facts or manifest.parents != (self._seed.id,):
            return None
        try:
            return AdapterIndex(artifact, self.base)
        except CheckpointError as error:
            _logger.warning("adapter %s is not available: %s", manifest.name, error)
            return DamagedAdapter(manifest.name, artifact, str(error))

    def _layers(self) -> dict[str, tuple[int, int]]:
        """Return the shape of each linear layer of the seed, without the output head."""
        specs = TensorReader(self._run.store, self._seed.prefix).specs.values()
        return {
            spec.name.removesuffix(".weight"): (spec.shape[0], spec.shape[1])
            for spec in specs
            if len(spec.shape) == 2 and ".layers." in spec.name and spec.name.endswith(".weight")
        }


def refuse_content(folder: Path) -> None:
    """Raise `CheckpointError` if `folder` exists and is not an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} exists and is not an empty folder: choose another one")


def base_identity(seed: Artifact) -> BaseIdentity:
    """Return the identity of a seed; raises `CheckpointError` if it is not committed."""
    manifest = seed.manifest()
    if manifest is None:
        raise CheckpointError(f"{seed.uri} is not committed: run the stage that makes it")
    return BaseIdentity.of(manifest)
