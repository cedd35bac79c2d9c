"""Upcycling in separate processes: memory is bounded, a killed process leaves nothing, and S3 is read and written."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bam_ray.blobs.s3 import S3Store
from bam_ray.checkpoint.tensors import TensorReader
from bam_ray.upcycling import verify
from cluster.s3_server import BUCKET, S3Settings
from tests.support.mixture_folders import reader

pytestmark = pytest.mark.slow
MIB = 1 << 20

# The script of the child process: upcycle argv[3:] to argv[2], and print the increase of anonymous memory at its peak,
# or kill the process half-way. A tiny mixture of the model at argv[1] is made first, because the first mixture of a
# process loads code.
CHILD = """
import json, os, signal, sys, tempfile, threading
from bam_ray.toolbox.folders import make_mixture, open_model
from bam_ray.settings import BamSettings, StoreSettings

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

tiny, out, *uris = sys.argv[1:]
def progress(done, total, phase):
    if "DIE" in os.environ and done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
sources = {f"m{number}": open_model(uri) for number, uri in enumerate(uris)}
with tempfile.TemporaryDirectory() as folder:
    tiny_sources = {name: open_model(tiny) for name in ("one", "other")}
    make_mixture(tiny_sources, BamSettings(method="bam"), StoreSettings(uri=folder + "/out"))
start = peak = anonymous()
stop = threading.Event()
def watch():
    global peak
    while not stop.wait(0.001):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
make_mixture(sources, BamSettings(method="bam"), StoreSettings(uri=out), progress=progress)
stop.set()
watcher.join()
print(json.dumps(peak - start))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a bf16 model of 69 MB, whose largest tensor has 8 MB, next to a tiny one."""
    folder = tmp_path_factory.mktemp("models")
    for name, width in (("tiny", 64), ("model", 1024)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=4096,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=2,
            num_attention_heads=8,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder / name)
    return folder / "model"


def run_child(model: Path, out: str, *uris: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(model.with_name("tiny")), out, *uris]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_memory_does_not_grow_with_the_number_of_models(model: Path, tmp_path: Path) -> None:
    for count in (2, 8):
        completed = run_child(model, str(tmp_path / str(count)), *[str(model)] * count)
        assert completed.returncode == 0, completed.stderr
        assert json.loads(completed.stdout) < 64 * MIB
        assert len(reader(tmp_path / str(count)).specs) > 0


def test_a_killed_process_leaves_no_visible_files(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixture"
    assert run_child(model, str(out), *[str(model)] * 2, DIE="1").returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    assert run_child(model, str(out), *[str(model)] * 2).returncode == 0
    assert all(result.passed for result in verify(reader(out)))


@pytest.fixture
def bucket(s3_server: S3Settings, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], S3Store]:
    """Return a function that returns a store with a prefix on a real S3 server, whose credentials are set."""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return lambda prefix: S3Store(BUCKET, prefix)


def test_sources_and_target_on_s3(model: Path, bucket: Callable[[str], S3Store]) -> None:
    for path in model.iterdir():
        bucket("upcycling/source").put_file(path.name, path)
    source = f"s3://{BUCKET}/upcycling/source"
    out = f"s3://{BUCKET}/upcycling/mixture"
    assert run_child(model, out, *[source] * 3, DIE="1").returncode == -signal.SIGKILL
    store = bucket("upcycling/mixture")
    assert not store.exists("config.json") and not store.exists("manifest.json")  # readers see no model
    for key in list(store.list()):
        store.delete(key)
    completed = run_child(model, out, *[source] * 3)
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout) < (3 * 8 + 64) * MIB  # N times the largest tensor plus a constant
    assert all(result.passed for result in verify(TensorReader(store)))
