"""The comparison as files: one self-contained `index.html`, and `comparison.json` with the same numbers as data."""

from collections.abc import Mapping
from pathlib import Path

from bam_ray.checkpoint.manifest import code_version
from bam_ray.evaluation.comparison import CLOSE_PERCENT, COMPARISON, PAGE, Comparison
from bam_ray.evaluation.comparison_plots import cost_scatter, gap_bars, time_scatter
from bam_ray.evaluation.page import HEAD
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
{% if comparison.losses %}
<h3>Methods that lost</h3>
<ul>
{% for label, others in comparison.losses.items() %}<li>{{ label }} is behind {{ others | join("; ") }}</li>
{% endfor %}
</ul>
{% endif %}
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

{% if comparison.models | selectattr("lm_eval") | list %}
<section id="lm-eval">
<h2>Tasks of lm-eval</h2>
<div class="wide"><table>
<thead><tr><th class="text">model</th><th class="text">task</th><th class="text">metric</th><th>mean</th>
<th>each training seed</th></tr></thead>
<tbody>
{% for model in comparison.models %}{% for each in model.lm_eval %}
<tr{{ ' class="group"' | safe if loop.first }}><td class="text">{{ model.label }}</td>
<td class="text">{{ each.task }}</td>
<td class="text">{{ each.metric }}</td><td>{{ "%.4g" | format(each.mean) }}</td>
<td>{% for value in each.by_seed %}{{ "%.4g" | format(value) }}{{ ", " if not loop.last }}{% endfor %}</td></tr>
{% endfor %}{% endfor %}
</tbody></table></div>
</section>
{% endif %}

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

{% if comparison.gap_parts or comparison.undecomposed %}
<section id="gap">
<h2>Parts of the gap to the specialists</h2>
{% if comparison.gap_parts %}
<div class="wide"><table>
<thead><tr><th class="text">mixture</th><th class="text">domain</th><th>averaging</th><th>drift</th><th>routing</th>
<th>gap</th></tr></thead>
<tbody>
{% for each in comparison.gap_parts %}
<tr{{ ' class="group"' | safe if loop.changed(each.model) and not loop.first }}><td class="text">{{ each.model }}</td>
<td class="text">{{ each.domain }}</td>
{% for part in (each.averaging, each.drift, each.routing, each.total) %}
<td>{{ part.value | nats }}<span class="interval">{{ part.interval[0] | nats }} to {{ part.interval[1] | nats }}</span>
</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{{ gap_note() }}
{{ figure(gap_bars, "100%") }}
{% endif %}
{% for label in comparison.undecomposed %}
<p class="note">{{ label }} has no such parts: it has no expert for each domain.</p>
{% endfor %}
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
neighboring controls and never extrapolated. The interval is limited to the measured range.</p>
</section>
{% endif %}

{% if comparison.matches %}
<section id="equal-cost">
<h2>Dense controls at equal cost</h2>
<div class="wide"><table>
<thead><tr><th class="text">model</th><th class="text">condition</th><th>dense tokens</th><th>perplexity, 95 %</th>
<th>NLL of each training seed</th><th class="text">verdict</th></tr></thead>
<tbody>
{% for each in comparison.matches %}
<tr{{ ' class="group"' | safe if loop.changed(each.model) and not loop.first }}><td class="text">{{ each.model }}</td>
<td class="text">{{ each.condition }}</td><td>{{ "{:,.0f}".format(each.tokens) }}</td>
{% if each.percent is none %}
<td></td><td></td>
<td class="text">{{ each.place }} the measured range: add {{ "%g" | format(each.add_multiple) }} to compare.dense</td>
{% else %}
<td>{{ each.percent | percent }}</td>
<td>{% for nll in each.by_seed %}{{ nll | nats }}{{ ", " if not loop.last }}{% endfor %}</td>
<td class="text">{{ each.verdict }}</td>
{% endif %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="note">The mean NLL of a dense control with these tokens is interpolated between neighboring controls, linearly
in the logarithm of the tokens, and never extrapolated. Negative numbers mean that the model is better. Costs are those
after the seed.</p>
</section>
{% endif %}

{% if comparison.clock %}{% set clock = comparison.clock %}
<section id="time">
<h2>Time on {{ clock.cluster.nodes }} {{ "node" if clock.cluster.nodes == 1 else "nodes" }} with {{
"%g" | format(clock.cluster.network_gbit_per_s) }} Gbit/s</h2>
<p class="note">These times were not measured. They are computed from the measured speed of training: of each branch, of
the mixing phase with its workers, and of the dense controls ({{ "{:,.0f}".format(clock.dense.tokens_per_second) }}
tokens per second of a worker). A node is one worker.</p>
<div class="wide"><table>
<thead><tr><th class="text">model</th><th>branches</th><th>mixing</th><th>together</th>
<th>dense tokens without communication</th><th>break-even efficiency</th></tr></thead>
<tbody>
{% for each in clock.models %}
<tr><td class="text">{{ each.model }}</td><td>{{ each.branch_seconds | duration }}</td>
<td>{{ each.mixing_seconds | duration }}</td><td>{{ each.seconds | duration }}</td>
<td>{{ "{:,.0f}".format(each.dense_tokens) }}</td>
<td>{{ "–" if each.break_even is none else "%.2f" | format(each.break_even) }}{% if each.break_even_interval %}
<span class="interval">{{ "%.2f" | format(each.break_even_interval[0]) }} – {{
"%.2f" | format(each.break_even_interval[1]) }}</span>{% endif %}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">Branches are trained side by side, one on each node. If the efficiency of dense training on all nodes is
below the break-even efficiency, the model is better than a dense control in the same time. It is the dense-equivalent
tokens, divided by the tokens that all nodes would process in this time without communication.</p>
<div class="wide"><table>
<thead><tr><th class="text">dense training</th><th>step</th><th>efficiency</th></tr></thead>
<tbody>
{% for way, seconds in clock.dense.step_seconds.items() %}
<tr><td class="text">{{ way }}</td><td>{{ "%.4g s" | format(seconds) }}</td>
<td>{{ "%.2f" | format(clock.dense.efficiency[way]) }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">A step has {{ "{:,.0f}".format(clock.dense.batch_tokens) }} tokens, and a ring all-reduce of the
gradients takes {{ "%.4g" | format(clock.dense.all_reduce_seconds) }} s. DiLoCo is taken to reach the quality of the
dense control.</p>
{{ figure(times, "80%") }}
</section>
{% endif %}

{% if comparison.models | selectattr("serving") | list %}
<section id="serving">
<h2>Cost of serving a token</h2>
<div class="wide"><table>
<thead><tr><th class="text">model</th><th>parameters read</th><th>FLOPs</th><th>cache</th></tr></thead>
<tbody>
{% for model in comparison.models if model.serving %}
<tr{{ ' class="group"' | safe if loop.changed(model.kind) and not loop.first }}><td class="text">{{ model.label }}</td>
<td>{{ model.serving.parameters | number }}</td><td>{{ model.serving.flops | flops }}</td>
<td>{{ "{:,}".format(model.serving.cache_bytes) }} B</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">For one token that is generated alone, computed from the configurations: the parameters that process it,
the FLOPs with the context of a training sequence, and the bytes of keys and values that the cache gains.</p>
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
    template = page_template(
        TEMPLATE, {"percent": format_percent, "equivalent": format_equivalent, "nats": "{:+.4f}".format}
    )
    return template.render(
        title=f"{comparison.run}: comparison",
        comparison=comparison,
        best=best_models(comparison),
        close=f"{CLOSE_PERCENT:g}",
        scatter=cost_scatter(comparison),
        gap_bars=gap_bars(comparison.gap_parts) if comparison.gap_parts else None,
        times=time_scatter(comparison, comparison.clock) if comparison.clock else None,
        version=code_version(),
    )


def best_models(comparison: Comparison) -> Mapping[str, str]:
    """Return the label of the model with the lowest perplexity of each column."""
    return {
        column: min(comparison.models, key=lambda model: model.perplexity[column].value).label
        for column in comparison.columns
    }
