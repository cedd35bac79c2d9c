"""Clients of other projects at the endpoint: the evaluation harness of EleutherAI, and LangChain."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bam_ray.evaluation.perplexity import perplexity
from bam_ray.serving import DecodeEngine, Scheduler, create_app
from tests.support.http_server import running_server

LENGTH = 64  # of the sequences that are scored
WORDS = ("the", "cat", "sat", "naïve", "café", "☕", "what", "mixture?", "experts\n")

pytestmark = pytest.mark.slow  # imports take seconds


@pytest.fixture
def url(models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    """Yield the base URL of an endpoint for a mixture whose routers read the prefix."""
    engine = DecodeEngine(models_by_family["bam-prefix"], tokenizer, slots=4, max_length=LENGTH + 16)
    with running_server(create_app(Scheduler(engine), "tiny")) as url:
        yield f"{url}/v1"


@pytest.fixture
def harness(url: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    """Return the harness's client of completions endpoints."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    tokenizer.save_pretrained(tmp_path)
    return LocalCompletionsAPI(
        model="tiny",
        base_url=f"{url}/completions",
        tokenizer=str(tmp_path),
        tokenizer_backend="huggingface",
        max_length=LENGTH + 1,  # it keeps one token for the completion
        batch_size=3,
    )


def test_lm_eval_finds_the_perplexity_of_our_evaluation(
    harness: Any, models_by_family: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    from lm_eval.api.instance import Instance

    words = np.random.default_rng(0).choice(WORDS, 200)
    text = tokenizer.decode(tokenizer(" ".join(words)).input_ids[: 4 * (LENGTH - 1)])
    tokens = tokenizer(text).input_ids
    assert len(tokens) == 4 * (LENGTH - 1), "the text must be whole sequences, each of which predicts all but one token"
    (log_p,) = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    # Each sequence begins with the last token of the one before
    starts = range(0, len(tokens), LENGTH - 1)
    rows = np.array([[harness.prefix_token_id, *tokens][start : start + LENGTH] for start in starts])
    expected = perplexity(models_by_family["bam-prefix"], rows, batch_sequences=2)
    assert np.exp(-log_p / len(tokens)) == pytest.approx(expected.perplexity, rel=1e-4)


def test_lm_eval_chooses_and_generates(harness: Any) -> None:
    from lm_eval.api.instance import Instance

    pairs = [("the cat", " sat on the mat"), ("the cat", " what"), ("naïve", " café ☕")]
    scores = harness.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    assert all(log_p < 0 for log_p, _ in scores)
    arguments = {"until": ["\n"], "max_gen_toks": 8}
    (text,) = harness.generate_until([Instance("generate_until", {}, ("the cat", arguments), 0)])
    assert text


def test_lm_eval_needs_no_tokenizer(harness: Any, url: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    remote = LocalCompletionsAPI(
        model="tiny", base_url=f"{url}/completions", tokenizer_backend="remote", max_length=LENGTH + 1
    )
    pairs = [("the cat", " sat on the mat"), ("naïve", " café ☕")]
    found, expected = (
        client.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
        for client in (remote, harness)
    )
    assert found == [(pytest.approx(log_p), is_greedy) for log_p, is_greedy in expected]


def test_langchain_streams_a_chat(url: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="tiny", base_url=url, api_key="none", max_tokens=8, temperature=0)  # type: ignore[arg-type]
    parts = [part.content for part in chat.stream("hello")]
    assert len(parts) > 1
    assert "".join(map(str, parts)) == chat.invoke("hello").content
