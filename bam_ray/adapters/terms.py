"""Characteristic terms of topics: words that distinguish the text of a topic from that of all topics."""

import re
from collections import Counter
from collections.abc import Iterable
from math import log

TERMS = 8
_word = re.compile(r"[^\W\d_]{3,}")


def characteristic_terms(texts: Iterable[str], topics: Iterable[int], count: int) -> list[tuple[str, ...]]:
    """Return up to `TERMS` words of each topic, the best first.

    The text of a topic counts as one document, as in c-TF-IDF (arXiv 2203.05794). With the frequency p of a word in the
    topic and its mean frequency q, the score is `p · log(p / q)`, which is the part of the word in the divergence
    between the two. Words that are frequent everywhere have a score near 0, so no list of stop words is needed.

    Args:
        texts: Texts of all topics.
        topics: The topic of each text.
        count: The number of topics.
    """
    counts: list[Counter[str]] = [Counter() for _ in range(count)]
    for text, topic in zip(texts, topics, strict=True):
        counts[topic].update(match.group().casefold() for match in _word.finditer(text))
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    words = total.total()
    terms = []
    for each in counts:
        own = each.total()
        scores = {word: seen / own * log(seen * words / (own * total[word])) for word, seen in each.items()}
        ranked = sorted(scores, key=lambda word: (-scores[word], -each[word], word))
        terms.append(tuple(ranked[:TERMS]))
    return terms
