"""What a finished run shows a person: the perplexity table, where the report lies, and the mixture's own words."""

import json
from collections.abc import Iterator

import httpx
from rich.console import Console
from transformers import AutoTokenizer

from bam_ray.blobs import BlobStore
from bam_ray.checkpoint.manifest import ArtifactKind
from bam_ray.data import Corpus
from bam_ray.errors import ServingError
from bam_ray.evaluation.results import Results
from bam_ray.evaluation.table import print_results
from bam_ray.settings import Recipe
from bam_ray.stages.lineage import Place

PROMPT_TOKENS = 24
COMPLETION_TOKENS = 48


def show_results(recipe: Recipe, store: BlobStore, console: Console) -> None:
    """Print the table of the run's report, its findings, and where the report lies."""
    report = Place(recipe, store, ArtifactKind.REPORTS, "report").artifact
    results = Results.model_validate_json((report.fetch() / "results.json").read_bytes())
    print_results(results, console)
    where = f"report: {report.uri}/report.html (`bam report {store.uri}` brings it here)"
    console.print(where, highlight=False, soft_wrap=True)


def stream_completions(recipe: Recipe, store: BlobStore, url: str, model: str, console: Console) -> None:
    """Ask the endpoint at `url` to continue one held-out text a domain, and print the words as they come."""
    corpus = Corpus(Place(recipe, store, ArtifactKind.CORPORA, "corpus").artifact.fetch())
    tokenizer = AutoTokenizer.from_pretrained(corpus.tokenizer_folder)
    for domain in recipe.data.domains:
        prompt = tokenizer.decode(corpus.held_out(domain)[0, :PROMPT_TOKENS].astype(int), skip_special_tokens=True)
        console.print(f"[bold]{domain}[/bold] [dim]{' '.join(prompt.split())}[/dim]", end="", highlight=False)
        for text in complete(url, model, prompt, COMPLETION_TOKENS):
            console.print(text.replace("\n", " "), end="", highlight=False, markup=False)
        console.print("\n")


def complete(url: str, model: str, prompt: str, max_tokens: int) -> Iterator[str]:
    """The pieces of one streamed completion; raises `ServingError` where the endpoint refuses or is gone."""
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
