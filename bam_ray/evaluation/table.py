"""The results for a terminal: a table of perplexities, and one line per finding or per compared model."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bam_ray.evaluation.comparison import Comparison
from bam_ray.evaluation.results import Finding, Results


def format_perplexity(perplexity: float) -> str:
    """Format a perplexity with two decimals, or fewer from 100 upwards: `3.46`, `123.5`, `54,321`."""
    return f"{perplexity:,.{2 if perplexity < 100 else 1 if perplexity < 1000 else 0}f}"


def perplexity_table(results: Results) -> Table:
    """Return the table of models × domains, with a last column for the mean. The best of each column is bold."""
    table = Table(title=f"Held-out perplexity of {results.run}", caption="lower is better; best of each column in bold")
    table.add_column("model", no_wrap=True)
    for column in results.columns:
        table.add_column(column, justify="right")
    for index, model in enumerate(results.models):
        cells = []
        for column in results.columns:
            text = format_perplexity(model.perplexity(column))
            cells.append(Text(text, "bold" if results.best[column] == model.id else ""))
        next_models = results.models[index + 1 : index + 2]
        table.add_row(model.label, *cells, end_section=any(other.kind != model.kind for other in next_models))
    return table


def print_results(results: Results, console: Console) -> None:
    """Print the table of perplexities and the findings."""
    console.print(perplexity_table(results))
    console.print(Text(f"\n{format_findings(results)}\n"), soft_wrap=True)


def comparison_table(comparison: Comparison) -> Table:
    """Return the table of models × columns: the mean over training seeds above its 95 % interval."""
    seeds = ", ".join(map(str, comparison.training_seeds))
    table = Table(title=f"Held-out perplexity of {comparison.run}, training seeds {seeds}", caption="lower is better")
    table.add_column("model", no_wrap=True)
    for column in comparison.columns:
        table.add_column(column, justify="right", no_wrap=True)
    for model in comparison.models:
        cells = []
        for column in comparison.columns:
            estimate = model.perplexity[column]
            low, high = map(format_perplexity, estimate.interval)
            cells.append(Text.assemble(format_perplexity(estimate.value), "\n", (f"{low} – {high}", "dim")))
        table.add_row(model.label, *cells)
    return table


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the table of a comparison, and what it shows about each model."""
    console.print(comparison_table(comparison))
    for line in (*comparison.statements, *comparison.limits):
        console.print(Text(f"\n{line}"), soft_wrap=True)
    console.print()


def format_findings(results: Results) -> str:
    """Format all findings, one per line."""
    return "\n".join(format_finding(finding) for finding in results.findings)


def format_finding(finding: Finding) -> str:
    """Format a finding: `yes  branch code beats the seed on code: 3.71 against 8.62 (in 100% of resamples)`."""
    numbers = " against ".join(format_perplexity(value) for value in finding.values.values())
    if len(finding.values) > 2:
        numbers = ", ".join(f"{label} {format_perplexity(value)}" for label, value in finding.values.items())
    return f"{finding.verdict:<4} {finding.claim}: {numbers} (in {finding.support:.0%} of resamples)"
