"""The scripts in examples/ run as a reader would run them."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bam_ray.serving import DecodeEngine, Scheduler, create_app

ROOT = Path(__file__).resolve().parents[2]


def run_example(name: str, *arguments: str) -> str:
    """Run a script of examples/ from the repository's root and return what it prints."""
    command = [sys.executable, f"examples/{name}", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def branch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the branch that `train_branch.py` trains by its recipe, with fewer tokens."""
    tokens = [f"{section}.training.tokens=8192" for section in ("seed", "branch")]
    printed = run_example("train_branch.py", f"store.uri={tmp_path_factory.mktemp('example')}", *tokens)
    assert "step 4/4 loss" in printed
    return Path(printed.splitlines()[-1].removeprefix("branch code: "))


@pytest.fixture
def url(branch: Path) -> Iterator[str]:
    """Yield the base URL of an endpoint that serves the branch."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(branch), AutoTokenizer.from_pretrained(branch)
    engine = DecodeEngine(model.eval(), tokenizer, slots=1, max_length=64)
    started = threading.Event()

    class Server(uvicorn.Server):
        """A server that reports when it accepts connections."""

        async def startup(self, sockets: list[object] | None = None) -> None:
            await super().startup()
            started.set()

    server = Server(uvicorn.Config(create_app(Scheduler(engine), "bam"), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    assert started.wait(30)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()


def test_upcycle_folders_verifies_the_mixture_it_writes(tmp_path: Path) -> None:
    printed = run_example("upcycle_folders.py", "--out", str(tmp_path / "mixture"))
    assert "FAIL" not in printed
    assert "experts seed, code, law" in printed
    assert (tmp_path / "mixture" / "manifest.json").exists()


def test_train_branch_writes_a_hugging_face_folder(branch: Path) -> None:
    assert (branch / "config.json").exists()
    assert list(branch.glob("*.safetensors"))


def test_query_mixture_prints_the_completion(url: str) -> None:
    printed = run_example("query_mixture.py", "--url", url, "--prompt", "def main", "--max-tokens", "8")
    assert printed.startswith("bam: def main")
    assert len(printed) > len("bam: def main\n")
