"""The page of topics: a map of the text, and a table of the topics; one self-contained HTML file."""

from pathlib import Path

import numpy as np

from bam_ray.adapters.find_topics import FoundTopics
from bam_ray.checkpoint.manifest import code_version
from bam_ray.evaluation.page import HEAD
from bam_ray.evaluation.plots import CURVE_COLORS, TEXT, Picture, panels, picture
from bam_ray.evaluation.report import page_template

TOPICS_PAGE = "topics.html"
LABELED_TOPICS = 12  # topics that are named in the map, the largest
LEGEND_DOMAINS = 12

TEMPLATE = (
    HEAD
    + """
<header>
<h1>{{ title }}</h1>
<p>{{ found.topics | length }} topics of {{ found.topics.topics | sum(attribute="documents") | number }} training
documents, found by the embedder <code>{{ found.topics.embedder.name }}</code> in the first
{{ found.topics.embedder.prefix_tokens }} tokens of each. bam-ray version: {{ version }}.</p>
{% if quality.metrics %}
<p>Purity: {{ "%.1f" | format(100 * quality.purity) }} % of the training documents are of the main domain of their
topic. Held-out accuracy: the nearest topic of {{ "%.1f" | format(100 * quality.held_out_accuracy) }} % of the held-out
documents has their domain as its main domain. The search for topics did not use the domains.</p>
{% endif %}
</header>

<section id="map">
<h2>Map</h2>
{{ figure(map, "100%") }}
<p class="note">The first two principal components of the vectors of {{ found.sample_topics | length }} held-out
documents. Numbers are the largest topics.</p>
</section>

<section id="topics">
<h2>Topics</h2>
<div class="wide"><table>
<thead><tr><th class="text">topic</th><th>documents</th><th>tokens</th>{% if quality.metrics
%}<th class="text">main domain</th>{% endif %}<th>threshold</th><th class="text">terms</th></tr></thead>
<tbody>
{% for topic in found.topics.topics %}
<tr><td class="text">{{ topic.name }}</td><td>{{ topic.documents | number }}</td><td>{{ topic.tokens | number }}</td>
{% if quality.metrics %}{% set main = quality.main_domain(loop.index0)
%}<td class="text">{{ main[0] }} ({{ "%.0f" | format(100 * main[1]) }} %)</td>{% endif %}
<td>{{ "%.2f" | format(topic.threshold) }}</td><td class="text">{{ topic.terms | join(", ") }}</td></tr>
{% endfor %}
</tbody></table></div>
<p class="note">A text whose cosine similarity to its nearest topic is below the threshold has no topic. Terms are
frequent in the topic and rare in others.</p>
</section>
</body></html>
"""
)


def write_topics_page(found: FoundTopics, name: str, path: Path) -> None:
    """Write the page of topics to a new file; `name` is that of the run or of the text."""
    html = page_template(TEMPLATE).render(
        title=f"{name}: topics", found=found, quality=found.quality, map=topic_map(found), version=code_version()
    )
    path.write_text(html, encoding="utf-8")


def topic_map(found: FoundTopics) -> Picture:
    """Draw some held-out documents in two dimensions: once colored by domain, and once by topic."""
    vectors = found.sample_vectors.numpy()
    centered = vectors - vectors.mean(0)
    _, axes = np.linalg.eigh(centered.T @ centered)  # ascending
    points = centered @ axes[:, :-3:-1]
    domains, topics = np.array(found.sample_domains), found.sample_topics.numpy()
    figure, (left, right) = panels(2, 2, width=11.0, height=4.6)
    for index, domain in enumerate(dict.fromkeys(found.sample_domains)):
        x, y = points[domains == domain].T
        left.scatter(x, y, s=8, linewidth=0, alpha=0.7, color=CURVE_COLORS[index % len(CURVE_COLORS)], label=domain)
    if len(set(found.sample_domains)) <= LEGEND_DOMAINS:
        left.legend(fontsize=8, frameon=False, labelcolor=TEXT)
    right.scatter(
        *points.T, s=8, linewidth=0, alpha=0.7, color=[CURVE_COLORS[topic % len(CURVE_COLORS)] for topic in topics]
    )
    for topic in range(min(LABELED_TOPICS, len(found.topics))):
        if (topics == topic).any():
            x, y = np.median(points[topics == topic], axis=0)
            right.text(x, y, str(topic), fontsize=9, fontweight="bold", color=TEXT, ha="center", va="center")
    for ax, title in ((left, "domains"), (right, "topics")):
        ax.set_title(title, fontsize=10, color=TEXT, loc="left")
        ax.set_xticks([])
        ax.set_yticks([])
    return picture(figure, "Two maps of held-out documents, colored by domain and by topic")
