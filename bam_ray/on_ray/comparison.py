"""The comparison of a recipe: its run for each training seed in turn, and then the comparison of their reports."""

from collections.abc import Callable

from rich.console import Console

from bam_ray.blobs import open_store
from bam_ray.blobs.patience import retry_on
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.controller import RunOutcome
from bam_ray.errors import StoreUnavailable, TrainingError
from bam_ray.on_ray.submit import END_OF_RUN
from bam_ray.pipeline.run import PipelineRun
from bam_ray.settings import CompareSettings, Recipe, with_training_seed
from bam_ray.terminal import warn


def compare_seeds(recipe: Recipe, make_report: Callable[[Recipe], RunOutcome], console: Console) -> RunOutcome:
    """Make the report of each training seed, compare them, and print the comparison; return the outcome.

    What is committed already is used again. A recipe without `compare` is compared with the default of `compare`.

    Args:
        recipe: The recipe. `compare.seeds` are the training seeds.
        make_report: Makes all artifacts of a recipe up to its report, and returns the outcome.
        console: The console for the output.

    Raises:
        TrainingError: The run of a training seed has failed. Those that were finished stay committed.
        CheckpointError: The training seeds differ in their models or in their held-out text.
    """
    settings = recipe.compare or CompareSettings()
    store = open_store(recipe.store.uri, recipe.store.endpoint)
    reports = {}
    for number, seed in enumerate(settings.seeds):
        console.print(f"training seed {seed} ({number + 1} of {len(settings.seeds)})", soft_wrap=True)
        seeded = with_training_seed(recipe.model_copy(update={"compare": settings}), seed)
        outcome = make_report(seeded)
        if outcome == "failed":
            console.print(END_OF_RUN)  # what follows is shown by `bam compare` too
            raise TrainingError(
                f"the run with training seed {seed} has failed: see the table above, correct the cause, and submit the "
                f"comparison again ({number} of {len(settings.seeds)} training seeds are finished and are used again)"
            )
        if outcome != "finished":
            return outcome
        reports[seed] = PipelineRun.of(seeded, store).artifact(ArtifactKind.REPORTS, "report")
    console.print(END_OF_RUN)
    from bam_ray.evaluation.table import print_comparison  # numpy: not imported before it is needed
    from bam_ray.evaluation.wall_clock import Cluster
    from bam_ray.stages.compare import compare_reports

    cluster = Cluster(nodes=settings.nodes, network_gbit_per_s=settings.network_gbit_per_s)
    artifact, comparison = retry_on(StoreUnavailable, warn)(compare_reports, store, reports, cluster)
    print_comparison(comparison, console)
    location = f"comparison: {artifact.uri}/index.html (`bam report {store.uri}` downloads it)"
    console.print(location, soft_wrap=True)
    return "finished"
