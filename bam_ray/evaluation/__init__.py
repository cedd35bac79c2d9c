"""Held-out perplexity and routing of every model on every domain, and what follows from the numbers.

    perplexity.py   one model on one domain: NLL, interval; and routing from the same forward passes
    routing.py      which experts a mixture's tokens meet, by layer
    results.py      the results as data: scores, means, best of each column, findings with their support
    table.py        for the terminal
    plots.py, page.py, report.py   the self-contained report.html

`results.py` and `table.py` need no torch, so that results can be shown at once.
"""
