"""vLLM's own server, in a process with a Python environment of its own: vLLM needs other versions of torch.

It listens on a Unix socket in a folder that no other user can open, so that it needs no port and no key.
"""

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from transformers import AutoConfig, PreTrainedConfig

from bam_ray.errors import ServingError
from bam_ray.model import BamConfig
from bam_ray.serving.vllm_rules import check_vllm
from bam_ray.settings import ServeSettings

_logger = logging.getLogger(__name__)

BASE_URL = "http://vllm"  # of requests through the socket
START_SECONDS = 900.0  # the time that vLLM has to start; it may compile its kernels first
STOP_SECONDS = 15.0
LOGGED_LINES = 200  # of vLLM's log, if it fails
BLOCK_TOKENS = 128  # of vLLM's largest blocks of keys and values; a request may leave one partly unused
_ERROR = re.compile(r"\w(Error|Exception): ")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "auto": "auto"}  # vLLM's name of each `serve.dtype`
# The process ends with this one, whatever ends this one: the shell reads until its standard input is closed
SUPERVISE = 'exec 3<&0; "$@" 3<&- & child=$!; (cat <&3 >/dev/null; kill -TERM $child 2>/dev/null) & wait $child'
OWN_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
OTHER_ENVIRONMENT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # variables for another Python environment


@dataclass(frozen=True)
class VllmOptions:
    """The arguments of vLLM's server.

    Attributes:
        python: The path of a Python interpreter that has vLLM.
        folder: The folder of the model.
        model_name: The name of the model in requests.
        max_length: The maximum length of prompt and completion together, in tokens.
        slots: The number of requests that are decoded at the same time.
        tokens_per_step: The number of tokens that a step computes; None: vLLM's default.
        dtype: The precision of weights and computation, as vLLM names it.
        kv_bytes: The memory of keys and values, in bytes; None: vLLM's default, a share of all memory.
        has_own_code: The folder has code of its own for the model. It is then not compiled.
    """

    python: str
    folder: Path
    model_name: str
    max_length: int
    slots: int
    tokens_per_step: int | None = None
    dtype: str = "auto"
    kv_bytes: int | None = None
    has_own_code: bool = False

    def command(self, socket: Path) -> list[str]:
        """Return the command that serves the model at a Unix socket."""
        arguments = {
            "model": self.folder,
            "served-model-name": self.model_name,
            "uds": socket,
            "max-model-len": self.max_length,
            "max-num-seqs": self.slots,
            "dtype": self.dtype,
        }
        if self.tokens_per_step is not None:
            arguments["max-num-batched-tokens"] = self.tokens_per_step
        if self.kv_bytes is not None:
            arguments["kv-cache-memory-bytes"] = self.kv_bytes
        own = ["--trust-remote-code", "--enforce-eager"] if self.has_own_code else []
        flags = ["--disable-uvicorn-access-log", *own]
        options = [f"--{name}={value}" for name, value in arguments.items()]
        return [self.python, "-m", "vllm.entrypoints.openai.api_server", *options, *flags]


class VllmServer:
    """A running server of vLLM."""

    def __init__(self, options: VllmOptions) -> None:
        """Start vLLM, and wait until it answers.

        Raises:
            ServingError: vLLM does not start.
        """
        if shutil.which(options.python) is None:
            raise ServingError(f"serve.vllm_python is {options.python}, which cannot be run: name a Python with vLLM")
        self._folder = Path(tempfile.mkdtemp(prefix="bam-vllm-"))
        self.socket, self._log = self._folder / "socket", self._folder / "log"
        environment = {name: value for name, value in os.environ.items() if name not in OTHER_ENVIRONMENT}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", SUPERVISE, "sh", *options.command(self.socket)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment | OWN_ENVIRONMENT,
                cwd=self._folder,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.close()
            raise

    @property
    def failure(self) -> ServingError | None:
        """The error that has ended vLLM; None if it runs."""
        if self._process.poll() is None:
            return None
        return ServingError(f"vLLM has ended with status {self._process.returncode}: see the log of the replica")

    def close(self) -> None:
        """Stop vLLM and all its processes."""
        assert self._process.stdin is not None
        self._process.stdin.close()  # the shell then ends vLLM, which ends its own processes
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        with httpx.Client(base_url=BASE_URL, transport=httpx.HTTPTransport(uds=str(self.socket))) as client:
            while time.monotonic() < deadline:
                if self.failure is not None:
                    raise ServingError(f"vLLM does not start: {self._last_error()}")
                try:
                    if client.get("/health").status_code == httpx.codes.OK:
                        return
                except httpx.TransportError:
                    pass  # it does not listen yet
                time.sleep(0.2)
        raise ServingError(f"vLLM did not answer within {START_SECONDS:.0f} s: {self._last_error()}")

    def _last_error(self) -> str:
        """Return the first line of the log that names an error, or else its last line, and log the end of the log."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        _logger.error("the end of vLLM's log:\n%s", "\n".join(lines[-LOGGED_LINES:]))
        errors = [line for line in lines if _ERROR.search(line) and "WARNING" not in line]
        return errors[0] if errors else lines[-1] if lines else "its log is empty"


def start_vllm(folder: Path, model_name: str, settings: ServeSettings) -> VllmServer:
    """Serve the model in `folder` by vLLM, and return when it answers.

    Raises:
        ServingError: vLLM cannot compute the model, or does not start.
    """
    config = AutoConfig.from_pretrained(folder)
    check_vllm(config)
    assert settings.vllm_python is not None, "the settings have been checked"
    return VllmServer(
        VllmOptions(
            settings.vllm_python,
            folder,
            model_name,
            settings.max_length,
            settings.slots,
            settings.tokens_per_step,
            DTYPES[settings.dtype],
            _kv_bytes(config, settings),
            has_own_code=config.model_type == BamConfig.model_type,
        )
    )


def _kv_bytes(config: PreTrainedConfig, settings: ServeSettings) -> int:
    """Return the memory of the keys and values of `serve.kv_tokens`, in bytes."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    is_fp32 = settings.dtype == "fp32" or (settings.dtype == "auto" and config.dtype in (None, torch.float32))
    tokens = (settings.kv_tokens or settings.slots * settings.max_length) + (settings.slots + 1) * BLOCK_TOKENS
    return int(2 * config.num_hidden_layers * heads * head_dim * (4 if is_fp32 else 2) * tokens)
