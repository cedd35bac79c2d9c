"""The results that a job prints at the end of a run: perplexities, the report's location, and sample completions."""

import json
from collections.abc import Iterator

import httpx
from rich.console import Console
from rich.text import Text
from transformers import AutoTokenizer

from bam_ray.blobs.patience import retry_on
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.control.status_table import render_domains
from bam_ray.data import Corpus
from bam_ray.errors import ServingError, StoreUnavailable
from bam_ray.evaluation.adapter_results import RESULTS, AdapterResults, print_adapter_results
from bam_ray.evaluation.results import Results
from bam_ray.evaluation.table import print_results
from bam_ray.pipeline.run import PipelineRun
from bam_ray.terminal import warn

PROMPT_TOKENS = 24
COMPLETION_TOKENS = 48


def show_results(run: PipelineRun, console: Console) -> None:
    """Print the table of the run's report, its findings, the report's location, and files of text that were skipped."""
    report = run.artifact(ArtifactKind.REPORTS, "report")
    patiently = retry_on(StoreUnavailable, warn)
    results = Results.model_validate_json((patiently(report.fetch) / "results.json").read_bytes())
    print_results(results, console)
    location = f"report: {report.uri}/report.html (`bam report {run.store.uri}` downloads it)"
    console.print(location, soft_wrap=True)
    corpus = patiently(run.artifact(ArtifactKind.CORPORA, "corpus").manifest)
    facts = corpus.facts if corpus else {}
    console.print(render_domains(facts), end="", soft_wrap=True)
    for line in facts.get("skipped", ()):
        console.print(Text(line, "yellow"), soft_wrap=True)


def show_adapters(run: PipelineRun, console: Console) -> None:
    """Print the evaluation of the adapters of a run and where it is stored."""
    evaluation = run.artifact(ArtifactKind.EVALUATIONS, "adapters")
    folder = retry_on(StoreUnavailable, warn)(evaluation.fetch)
    print_adapter_results(AdapterResults.model_validate_json((folder / RESULTS).read_bytes()), console)
    console.print(f"evaluation: {evaluation.uri}", soft_wrap=True)


def stream_completions(run: PipelineRun, url: str, model: str, console: Console) -> None:
    """Ask the endpoint at `url` to continue one held-out text per domain, and print the words as they arrive."""
    corpus = Corpus(retry_on(StoreUnavailable, warn)(run.artifact(ArtifactKind.CORPORA, "corpus").fetch))
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_folder)
    for domain in run.recipe.data.names:
        prompt = tokenizer.decode(corpus.held_out(domain)[0, :PROMPT_TOKENS].astype(int), skip_special_tokens=True)
        console.print(Text.assemble((domain, "bold"), " ", (" ".join(prompt.split()), "dim")), end="")
        for text in complete(url, model, prompt, COMPLETION_TOKENS):
            console.print(Text(text.replace("\n", " ")), end="")
        console.print("\n")


def complete(url: str, model: str, prompt: str, max_tokens: int) -> Iterator[str]:
    """Yield the pieces of one streamed completion.

    Raises `ServingError` if the endpoint refuses the request or does not answer.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True, "temperature": 0.7, "seed": 0}
    try:
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=60) as response:
            if response.status_code != httpx.codes.OK:
                raise ServingError(f"{url} answered {response.status_code}: {response.read().decode()}")
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if line.startswith("data: ") and data != "[DONE]":
                    for choice in json.loads(data)["choices"]:
                        yield choice["text"]
    except httpx.HTTPError as error:
        raise ServingError(f"{url} does not answer ({error}): see `serve status`") from None
