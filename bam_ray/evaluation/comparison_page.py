"""The comparison as files: one self-contained `index.html`, and `comparison.json` with the same numbers as data."""

from collections.abc import Mapping
from pathlib import Path

from bam_ray.checkpoint.manifest import code_version
from bam_ray.evaluation.comparison import CLOSE_PERCENT, COMPARISON, PAGE, Comparison
from bam_ray.evaluation.page import HEAD
from bam_ray.evaluation.plots import cost_scatter
from bam_ray.evaluation.report import page_template
from bam_ray.evaluation.statements import format_equivalent, format_percent

TEMPLATE = (
    HEAD
    + """
<header>
<h1>{{ comparison.run }}: comparison</h1>
<p>{{ comparison.models | length }} models, trained with {{ comparison.training_seeds | length }} training
{{ "seed" if comparison.training_seeds | length == 1 else "seeds" }} ({{ comparison.training_seeds | join(", ") }}), on
{{ comparison.domains | length }} domains. Held-out sequences:
{% for domain, count in comparison.sequences.items() %}{{ domain }} {{ count }}{{ ", " if not loop.last }}{% endfor %}.
bam-ray version: {{ version }}.</p>
{% for line in comparison.limits %}<p><b>{{ line }}</b></p>{% endfor %}
</header>

<section id="statements">
<h2>Results</h2>
<ul class="findings">
{% for line in comparison.statements %}<li>{{ line }}</li>
{% else %}<li>This recipe has no mixture and no ensemble to compare.</li>
{% endfor %}
</ul>
<p class="note">Differences are those of mean NLL over the domains, as a change of perplexity. Models are paired: each
resample uses the same training seeds and the same held-out sequences for both. A model is ahead or behind only if the
95 % interval excludes zero and the difference has the same sign in all training seeds.</p>
</section>

<section id="perplexity">
<h2>Held-out perplexity</h2>
<div class="wide"><table>
<thead><tr><th class="text">model</th>{% for column in comparison.columns %}<th>{{ column }}</th>{% endfor
%}<th>tokens</th><th>FLOPs</th></tr></thead>
<tbody>
{% for model in comparison.models %}
<tr{{ ' class="group"' | safe if loop.changed(model.kind) and not loop.first }}><td class="text">{{ model.label }}</td>
{% for column in comparison.columns %}{% set estimate = model.perplexity[column] %}
<td{{ ' class="best"' | safe if best[column] == model.label }}>{{ estimate.value | perplexity }}
<span class="interval">{{ estimate.interval[0] | perplexity }} – {{ estimate.interval[1] | perplexity }}</span></td>
{% endfor %}
<td>{{ model.trained[0].lineage_tokens | number }}</td><td>{{ model.trained[0].lineage_flops | flops }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">Each number is the mean over the training seeds. Each interval is a 95 % interval of a hierarchical
bootstrap over training seeds and held-out sequences ({{ "{:,}".format(comparison.resamples) }} resamples). The mean is
the arithmetic mean of the perplexities. Tokens and FLOPs include the training of all models that a model was made from,
for one training seed.</p>
{{ figure(scatter, "100%") }}
</section>

{% if comparison.differences %}
<section id="differences">
<h2>Paired differences</h2>
<div class="wide"><table>
<thead><tr><th class="text">model</th><th class="text">other model</th><th>perplexity, 95 %</th>
<th>NLL of each training seed</th><th class="text">verdict</th></tr></thead>
<tbody>
{% for each in comparison.differences %}
<tr{{ ' class="group"' | safe if loop.changed(each.model) and not loop.first }}><td class="text">{{ each.model }}</td>
<td class="text">{{ each.other }}</td><td>{{ each.percent | percent }}</td>
<td>{% for nll in each.by_seed %}{{ "%+.4f" | format(nll) }}{{ ", " if not loop.last }}{% endfor %}</td>
<td class="text">{{ each.verdict }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">Negative numbers mean that the model is better than the other one.</p>
</section>
{% endif %}

{% if comparison.gaps %}
<section id="specialists">
<h2>Gap to the specialists</h2>
<div class="wide"><table>
<thead><tr><th class="text">model</th><th class="text">domain</th><th>perplexity, 95 %</th>
<th class="text">within {{ close }} %</th></tr></thead>
<tbody>
{% for gap in comparison.gaps %}
<tr{{ ' class="group"' | safe if loop.changed(gap.model) and not loop.first }}><td class="text">{{ gap.model }}</td>
<td class="text">{{ gap.domain }}</td><td>{{ gap.percent | percent }}</td>
<td class="text">{{ "yes" if gap.close else "not shown" }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">The specialist of a domain is its branch. A model is within {{ close }} % if the whole interval is.</p>
</section>
{% endif %}

{% if comparison.equivalents %}
<section id="dense-equivalent">
<h2>Dense-equivalent tokens</h2>
<div class="wide"><table>
<thead><tr><th class="text">model</th><th>tokens used after the seed</th><th class="text">worth</th></tr></thead>
<tbody>
{% for each in comparison.equivalents %}
<tr><td class="text">{{ each.model }}</td><td>{{ "{:,}".format(each.used) }}</td>
<td class="text">{{ each | equivalent }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">The tokens after the seed with which the dense controls reach the same mean NLL, interpolated between
neighboring controls and never extrapolated.</p>
</section>
{% endif %}

<section id="reports">
<h2>Reports</h2>
{% for seed in comparison.training_seeds %}
<p class="note">training seed {{ seed }}: <code>reports/{{ comparison.reports[loop.index0] }}</code></p>
{% endfor %}
</section>
</body>
</html>
"""
)


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write `index.html` and `comparison.json` to `folder`."""
    (folder / COMPARISON).write_text(comparison.model_dump_json(indent=1), encoding="utf-8")
    (folder / PAGE).write_text(render_comparison(comparison), encoding="utf-8")


def render_comparison(comparison: Comparison) -> str:
    """Return the HTML page. Equal comparisons give equal bytes."""
    template = page_template(TEMPLATE, {"percent": format_percent, "equivalent": format_equivalent})
    return template.render(
        title=f"{comparison.run}: comparison",
        comparison=comparison,
        best=best_models(comparison),
        close=f"{CLOSE_PERCENT:g}",
        scatter=cost_scatter(comparison),
        version=code_version(),
    )


def best_models(comparison: Comparison) -> Mapping[str, str]:
    """Return the label of the model with the lowest perplexity of each column."""
    return {
        column: min(comparison.models, key=lambda model: model.perplexity[column].value).label
        for column in comparison.columns
    }
