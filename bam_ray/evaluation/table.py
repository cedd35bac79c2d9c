"""Results for the terminal: a table of perplexities, and the findings in plain words."""

from rich.console import Console
from rich.table import Table

from bam_ray.evaluation.results import Finding, Results


def number(perplexity: float) -> str:
    """Two decimals, fewer for large perplexities."""
    return f"{perplexity:,.{2 if perplexity < 100 else 1 if perplexity < 1000 else 0}f}"


def perplexity_table(results: Results) -> Table:
    """Models × domains → mean; the best of each column is bold."""
    table = Table(title=f"Held-out perplexity of {results.run}", caption="lower is better; best of a column bold")
    table.add_column("model", no_wrap=True)
    for column in results.columns:
        table.add_column(column, justify="right")
    for index, model in enumerate(results.models):
        cells = []
        for column in results.columns:
            text = number(model.perplexity(column))
            cells.append(f"[bold]{text}[/bold]" if results.best[column] == model.id else text)
        following = results.models[index + 1 : index + 2]
        table.add_row(model.label, *cells, end_section=any(other.kind != model.kind for other in following))
    return table


def print_results(results: Results, console: Console) -> None:
    """The table, and the findings below it."""
    console.print(perplexity_table(results))
    console.print(f"\n{findings_text(results)}\n", highlight=False, soft_wrap=True)


def findings_text(results: Results) -> str:
    """One line a finding: yes or no, the claim, the numbers, the support."""
    return "\n".join(finding_line(finding) for finding in results.findings)


def finding_line(finding: Finding) -> str:
    """`yes  branch code beats the seed on code: 3.71 against 8.62 (in 100 % of resamples)`."""
    numbers = " against ".join(number(value) for value in finding.values.values())
    if len(finding.values) > 2:
        numbers = ", ".join(f"{label} {number(value)}" for label, value in finding.values.items())
    return f"{'yes' if finding.holds else 'no ':<4} {finding.claim}: {numbers} (in {finding.support:.0%} of resamples)"
