"""16 streams through HTTP: the app on uvicorn against the bare engine and `transformers serve`.

    OMP_NUM_THREADS=1 python -m benchmarks.serving_http [--rounds 3] [--width 512] [--layers 2]

`bam bench` sends 16 requests at once to each server, a process with one thread for the model. The value is the number
of generated tokens over the CPU time of that process. The bare engine computes requests of the same lengths, also in a
process of its own. Both servers serve the same Llama in fp32, and decode with their defaults.
"""

import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import torch
import typer
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from bam_ray.serving import DecodeEngine, Scheduler, create_app
from bam_ray.serving.load import WORDS as WORDS_OF_LOAD
from bam_ray.serving.load import LoadOptions, run_load
from bam_ray.serving.packed import pack_weights
from benchmarks.measure import report
from benchmarks.serving import Work, dense, engine_tokens

STREAMS, WORDS, TOKENS, MAX_LENGTH = 16, 16, 64, 256


def write_model(folder: Path, width: int, layers: int) -> None:
    """Write a Llama with a tokenizer of bytes."""
    dense(width, layers).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({character: token for token, character in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(folder)


def engine_of(folder: Path) -> DecodeEngine:
    """Return the engine as `bam serve` makes it."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    pack_weights(model)
    return DecodeEngine(model, AutoTokenizer.from_pretrained(folder), STREAMS, MAX_LENGTH)


@contextlib.contextmanager
def server(command: list[str], port: int) -> Iterator[psutil.Process]:
    """Run a server until the block ends, and yield its process when it answers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 300
            while True:
                assert process.poll() is None and time.monotonic() < deadline, f"{command} does not answer"
                with contextlib.suppress(httpx.HTTPError):
                    httpx.get(f"http://127.0.0.1:{port}/health")
                    break
                time.sleep(0.2)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def http_speed(process: psutil.Process, port: int, model: str) -> float:
    """Return the tokens per CPU-second of a server with 16 streams."""
    start = cpu_seconds(process)
    options = LoadOptions(
        f"http://127.0.0.1:{port}/v1",
        STREAMS,
        prompt_words=WORDS,
        max_tokens=TOKENS,
        model=model,
        extra={"temperature": 0},
    )
    load = asyncio.run(run_load(options))
    assert not load.errors, load.errors[0]
    return sum(each.tokens for each in load.times) / (cpu_seconds(process) - start)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 3,
    width: Annotated[int, typer.Option(help="Hidden size.")] = 512,
    layers: Annotated[int, typer.Option(help="Layers.")] = 2,
    serve: Annotated[str, typer.Option(help="Only serve this folder.", hidden=True)] = "",
    port: Annotated[int, typer.Option(help="The port for it.", hidden=True)] = 0,
) -> None:
    """Measure, print a table and write `benchmarks/results/serving_http.json`."""
    if serve:
        uvicorn.run(create_app(Scheduler(engine_of(Path(serve))), "bench"), port=port, log_level="warning")
        return
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_model(folder, width, layers)
        own, peer = free_port(), free_port()
        ours = stack.enter_context(
            server([sys.executable, "-m", "benchmarks.serving_http", "--serve", name, "--port", str(own)], own)
        )
        transformers = str(Path(sys.executable).with_name("transformers"))
        theirs = stack.enter_context(
            server([transformers, "serve", name, "--continuous-batching", "--device", "cpu", "--port", str(peer)], peer)
        )
        engine = engine_of(folder)
        length = len(engine.tokenizer(" ".join(WORDS_OF_LOAD)).input_ids) * WORDS // len(WORDS_OF_LOAD)
        work = [Work([index + 1] * length, TOKENS) for index in range(STREAMS)]

        def bare() -> float:
            start = time.process_time()
            engine_tokens(engine, work)
            return STREAMS * TOKENS / (time.process_time() - start)

        cases: dict[str, Callable[[], float]] = {
            "bare engine": bare,
            "bam_ray, uvicorn": lambda: http_speed(ours, own, "bench"),
            "transformers serve": lambda: http_speed(theirs, peer, name),
        }
        speeds = [{case: run() for case, run in cases.items()} for _ in range(rounds + 1)][1:]  # the first warms up
    medians = {case: statistics.median(each[case] for each in speeds) for case in cases}
    report(
        "serving_http",
        ("program", "tokens per CPU-second", "÷ bare engine"),
        [[case, value, value / medians["bare engine"]] for case, value in medians.items()],
    )


if __name__ == "__main__":
    typer.run(main)
