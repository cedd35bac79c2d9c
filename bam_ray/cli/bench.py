"""The command that measures an endpoint under load."""

import asyncio
import os
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from bam_ray.cli.app import app
from bam_ray.cli.console import console
from bam_ray.errors import SettingsError

if TYPE_CHECKING:
    from bam_ray.serving.load import LoadReport


@app.command()
def bench(
    url: Annotated[str, typer.Argument(help="The endpoint, such as http://127.0.0.1:8000/v1. Any with OpenAI's API.")],
    requests: Annotated[int, typer.Option(help="Number of requests.", min=1)] = 64,
    rate: Annotated[
        float, typer.Option(help="Mean number of requests that arrive per second, at random. 0: all at once.", min=0.0)
    ] = 0.0,
    prompt_words: Annotated[int, typer.Option(help="Words of each prompt.", min=1)] = 64,
    max_tokens: Annotated[int, typer.Option(help="Maximum tokens of each completion.", min=1)] = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Send vLLM's field ignore_eos, so that all completions are as long.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Name of the model. Default: the first of the endpoint.")] = None,
) -> None:
    """Send streamed completions to an endpoint, and show throughput and latencies.

    The API key is read from the environment variable OPENAI_API_KEY.
    """
    from bam_ray.serving.load import LoadOptions, run_load

    options = LoadOptions(
        url,
        requests,
        rate or None,
        prompt_words=prompt_words,
        max_tokens=max_tokens,
        model=model,
        api_key=os.environ.get("OPENAI_API_KEY"),
        extra={"ignore_eos": True} if ignore_eos else {},
    )
    report = asyncio.run(run_load(options))
    if not report.finished:
        raise SettingsError(f"all requests failed, the first with {report.errors[0]!r}: check the URL and the options")
    _print(report)


def _print(report: "LoadReport") -> None:
    from bam_ray.serving.load import PERCENTILES, percentile

    table = Table(title="Latency in milliseconds", title_justify="left")
    for column in ("", *(f"p{percent}" for percent in PERCENTILES)):
        table.add_column(column, justify="right")
    for name, values in (
        ("time to first token", [each.first for each in report.finished]),
        ("inter-token latency", [gap for each in report.finished for gap in each.gaps]),
        ("whole request", [each.total for each in report.finished]),
    ):
        table.add_row(name, *(f"{1000 * percentile(values, percent):.1f}" for percent in PERCENTILES))
    console.print(table)
    tokens = sum(each.tokens for each in report.finished)
    console.print(
        f"{len(report.finished)} requests and {tokens} tokens in {report.seconds:.1f} s: "
        f"{report.tokens_per_second:.1f} tokens per second",
        soft_wrap=True,
    )
    for error, count in Counter(report.errors).items():
        console.print(f"{count} failed: {error}", markup=False, soft_wrap=True)
