"""Evaluation: held-out perplexity and routing of every model on every domain, and the findings that follow.

    perplexity.py      score one model on one domain: NLL, confidence interval, and routing from the same forward passes
    routing.py         which experts process a mixture's tokens, by layer
    ensemble.py        output ensembles of the seed and the branches, from the NLL that each gives to each token
    results.py         the results as data: scores, means, the best model of each column, findings with their support
    findings.py        comparisons of models, and how firmly the held-out text supports them
    comparison.py      the models of several training seeds: paired differences, intervals, and what they show
    bootstrap.py       bootstrap resamples and 95 % intervals
    table.py           the results for a terminal
    plots.py, page.py, report.py   the self-contained report.html
    comparison_page.py the self-contained page of a comparison, in the same style

`results.py`, `comparison.py` and `table.py` do not import torch, so the command line shows results without delay.
"""
