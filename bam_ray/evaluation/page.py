"""The HTML page of the report: a jinja2 template without external resources, for light and dark screens.

`HEAD` is the part that all pages share: the style, and the macros `figure` and `gap_note`. It needs the variable
`title`.

The template is a Python string instead of a data file, so it is also available on nodes that received the package as
plain modules.
"""

HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --page: #f6f8fa; --card: #ffffff; --ink: #1f2328; --muted: #59636e; --line: #d8dee4;
  --accent: #0969da; --yes: #1a7f37; --no: #b35900; --best: #ddf4e4; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --ink: #e6edf3; --muted: #9aa4af;
  --line: #343b45; --accent: #79bbff; --yes: #56d37a; --no: #f0a35b; --best: #16351f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 0 0 .7rem; font-size: 1.15rem; }
h3 { margin: 1.4rem 0 .5rem; font-size: 1rem; }
header p, .note { margin: .3rem 0; color: var(--muted); }
section { margin-top: 1.25rem; padding: 1.1rem 1.3rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
th { color: var(--muted); font-weight: 600; } tbody tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { padding-left: 0; }
.text { text-align: left; } .best { background: var(--best); font-weight: 700; border-radius: 4px; }
.interval { display: block; color: var(--muted); font-size: .78rem; font-weight: 400; line-height: 1.2; }
tr.group td { border-top: 2px solid var(--line); }
ul.findings { margin: 0; padding: 0; list-style: none; }
.findings li { display: flex; gap: .8rem; padding: .35rem 0; border-bottom: 1px solid var(--line); }
.findings li:last-child { border-bottom: 0; }
.verdict { flex: none; width: 2.3rem; font-weight: 700; } .yes { color: var(--yes); } .no { color: var(--no); }
.findings small { color: var(--muted); font-size: .85rem; }
img { display: block; max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { img { filter: invert(1) hue-rotate(180deg); } } figure { margin: .9rem 0 0; }
code, pre { font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: .6rem 0 0; overflow-x: auto; } a { color: var(--accent); text-decoration: none; }
summary { cursor: pointer; font-weight: 600; }
:target { background: var(--best); }
</style>
</head>
<body>
{% macro figure(picture, scale) %}
<figure><img src="data:image/png;base64,{{ picture.png }}" alt="{{ picture.alt }}" style="width: {{ scale }}"></figure>
{% endmacro %}
{% macro gap_note() %}
<p class="note">Differences in NLL on the domain, in nats per token. The gap between a mixture and the model that the
domain's expert was made from is the sum of three parts. With oracle routing, all tokens go to the domain's expert.
Averaging: oracle routing before mixing, minus the specialist. Drift: oracle routing after mixing, minus that before.
Routing: the mixture with its own routers, minus oracle routing. A negative part is a gain.</p>
{% endmacro %}
"""

PAGE = (
    HEAD
    + """
<header>
<h1>{{ results.run }}</h1>
<p>{{ results.models | length }} models on {{ results.domains | length }} domains
({{ results.domains | join(", ") }}), with {{ token_counts }} held-out tokens per domain. Last model created:
{{ last_created | timestamp }}. bam-ray version: {{ version }}.</p>
</header>

<section id="findings">
<h2>Findings</h2>
<ul class="findings">
{% for finding in results.findings %}
<li><span class="verdict {{ finding.verdict }}">{{ finding.verdict }}</span>
<span>{{ finding.claim }}<br>
<small>{% for label, value in finding.values.items() %}{{ label }} <b>{{ value | perplexity }}</b>{{
", " if not loop.last }}{% endfor %}; in {{ "%.0f" | format(100 * finding.support) }} % of resamples</small></span></li>
{% else %}
<li>This run has no two models to compare.</li>
{% endfor %}
</ul>
</section>

<section id="perplexity">
<h2>Held-out perplexity</h2>
<div class="wide"><table>
<thead><tr><th class="text">model</th>{% for column in results.columns %}<th>{{ column }}</th>{% endfor
%}<th>parameters</th><th>tokens</th><th>FLOPs</th></tr></thead>
<tbody>
{% for model in results.models %}
<tr{{ ' class="group"' | safe if loop.changed(model.kind) and not loop.first }}><td class="text">{{ model.label }}</td>
{% for column in results.columns %}
<td{{ ' class="best"' | safe if results.best[column] == model.id }}>{{ model.perplexity(column) | perplexity }}
<span class="interval">{{ model.interval(column)[0] | perplexity }} – {{
model.interval(column)[1] | perplexity }}</span></td>
{% endfor %}
<td>{{ model.parameters | number }}<span class="interval">{{ model.active_parameters | number }} active</span></td>
<td>{{ model.lineage_tokens | number }}<span class="interval">{{ model.tokens | number }} own</span></td>
<td>{{ model.lineage_flops | flops }}<span class="interval">{{ model.flops | flops }} own</span></td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">Lower is better. The best model of each column is highlighted. The mean is the arithmetic mean of the
perplexities. Each interval is a 95 % bootstrap interval over the held-out sequences of this run; the variation between
training seeds may be larger. Tokens and FLOPs include the training of all models that a model was made from; its own
training is shown below.</p>
{% if results.models | selectattr("kind", "equalto", "ensembles") | list %}
<p class="note">The ensembles average the probabilities of the seed and all branches, without upcycling and mixing. All
these models compute every token. In the posterior ensemble, the weights follow from how well each model predicted the
earlier tokens of the document; in the uniform ensemble, they are equal. If a mixture does not beat the posterior
ensemble, mixing has gained nothing over it.</p>
{% endif %}
{{ figure(bars, "100%") }}
</section>

{% if results.models | selectattr("lm_eval") | list %}
<section id="lm-eval">
<h2>Tasks of lm-eval</h2>
<div class="wide"><table>
<thead><tr><th class="text">model</th><th class="text">task</th><th class="text">metric</th><th>value</th></tr></thead>
<tbody>
{% for model in results.models %}{% for score in model.lm_eval %}
<tr{{ ' class="group"' | safe if loop.first }}><td class="text">{{ model.label }}</td>
<td class="text">{{ score.task }}</td><td class="text">{{ score.metric }}</td><td>{{ "%.4g" | format(score.value) }}{%
if score.stderr is not none %}<span class="interval">± {{ "%.2g" | format(score.stderr) }}</span>{% endif %}</td></tr>
{% endfor %}{% endfor %}
</tbody></table></div>
<p class="note">The number after ± is the standard error over the documents of the task.</p>
</section>
{% endif %}

{% if results.gap_parts or undecomposed %}
<section id="gap">
<h2>Gap to the specialists</h2>
{% if results.gap_parts %}
<div class="wide"><table>
<thead><tr><th class="text">mixture</th><th class="text">domain</th><th class="text">specialist</th><th>averaging</th>
<th>drift</th><th>routing</th><th>gap</th></tr></thead>
<tbody>
{% for each in results.gap_parts %}
<tr{{ ' class="group"' | safe if loop.changed(each.model) and not loop.first }}><td class="text">{{ each.model }}</td>
<td class="text">{{ each.domain }}</td><td class="text">{{ each.specialist }}</td>
{% for part in (each.averaging, each.drift, each.routing, each.total) %}<td>{{ "%+.4f" | format(part) }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{{ gap_note() }}
{% endif %}
{% for label in undecomposed %}
<p class="note">{{ label }} has no such parts: it has no expert for each domain.</p>
{% endfor %}
</section>
{% endif %}

{% if curves %}
<section id="curves">
<h2>Training</h2>
{{ figure(curves, "100%") }}
<p class="note">The curves show the NLL without the routing losses. The bold line is the mean over 5 % of the
steps.</p>
</section>
{% endif %}

{% for model, ffn, attention in routed %}
<section>
<h2>Routing of {{ model.label }}</h2>
<p class="note">{{ model.experts }} experts, {{ model.experts_per_token }} FFN
{{ "expert" if model.experts_per_token == 1 else "experts" }} per token, attention experts:
{{ model.attention_experts }}.</p>
<h3>Share of choices of each FFN expert (%)</h3>
{{ figure(ffn, "auto") }}
{% if attention %}
<h3>Mean gate of each attention expert (%)</h3>
{{ figure(attention, "auto") }}
{% endif %}
<h3>Statistics over all domains</h3>
<div class="wide"><table>
<thead><tr><th class="text">layer</th><th>load imbalance</th><th>FFN entropy</th><th>attention entropy</th>
<th class="text">dead experts</th></tr></thead>
<tbody>
{% for layer in model.routing.overall.layers %}
<tr><td class="text">{{ loop.index0 }}</td><td>{{ "%.2f" | format(layer.load_imbalance) }}</td>
<td>{{ "%.3f" | format(layer.ffn_entropy) }}</td>
<td>{{ "–" if layer.attention_entropy is none else "%.3f" | format(layer.attention_entropy) }}</td>
<td class="text">{% for expert in layer.dead_experts %}{{ model.routing.expert_names[expert] }}{{
", " if not loop.last }}{% else %}none{% endfor %}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">Load imbalance is the largest share divided by the mean share: 1 if the load is balanced, and at most
{{ "%.3g" | format(model.experts / model.experts_per_token) }}. Entropy is in nats: 0 if the router is certain, and
{{ "%.3f" | format(uniform_entropy[model.experts]) }} if it is uniform. A dead expert is one that no token chose.</p>
</section>
{% endfor %}

<section id="lineage">
<h2>Lineage</h2>
<div class="wide"><table>
<thead><tr><th class="text">kind</th><th class="text">id</th><th class="text">parents</th><th>steps</th>
<th>tokens</th><th>FLOPs</th><th>device time</th><th>attempt</th><th class="text">created</th></tr></thead>
<tbody>
{% for manifest in lineage %}
<tr id="{{ manifest.id }}"><td class="text">{{ manifest.kind }}</td><td class="text"><code>{{ manifest.id }}</code></td>
<td class="text">{% for parent in manifest.parents %}<a href="#{{ parent }}"><code>{{ parent }}</code></a>{{
"<br>" | safe if not loop.last }}{% else %}–{% endfor %}</td>
<td>{{ "{:,}".format(manifest.step) if manifest.step else "–" }}</td><td>{{ manifest.tokens | number }}</td>
<td>{{ manifest.compute.flops | flops }}</td><td>{{ manifest.compute.device_seconds | duration }}</td>
<td>{{ manifest.attempt or "–" }}</td><td class="text">{{ manifest.created | timestamp }}</td></tr>
{% endfor %}
</tbody></table></div>
</section>

<section id="corpus">
<h2>Corpus</h2>
{% if corpus.by_domain %}
<div class="wide"><table>
<thead><tr><th class="text"></th>{% for domain in corpus.domains %}<th>{{ domain }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, values in corpus.by_domain.items() %}
<tr><td class="text">{{ name | words }}</td>{% for value in values %}<td>{{ value | value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% for name, value in corpus.overall.items() %}
<p class="note">{{ name | words }}: {{ value | value }}</p>
{% endfor %}
</section>

<section id="settings">
<details><summary>Settings</summary>
<pre>{{ settings }}</pre>
</details>
</section>
</body>
</html>
"""
)
