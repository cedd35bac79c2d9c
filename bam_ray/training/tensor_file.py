"""Tensors on their way from a device to a file or to host memory, one at a time.

A training state is several times as large as its model. Whatever handles it whole should hold it once.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from bam_ray.checkpoint.tensors import TensorSpec, encode_header


def write_tensors(path: Path, specs: Iterable[TensorSpec], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file from `tensors`, in the order of `specs`; only one of them is in host memory at a time.

    Raises `OSError` if the file cannot be written.
    """
    specs = list(specs)
    with path.open("wb") as file:
        file.write(encode_header(specs))
        for spec, tensor in zip(specs, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), f"{spec.name} is not as announced"
            write_data(file, tensor)


def write_data(file: BinaryIO, tensor: Tensor) -> None:
    """Write the elements of `tensor`, which is copied to the host only for that."""
    host = tensor.detach().cpu().contiguous()
    file.write(host.flatten().view(torch.uint8).numpy().data)


def specs_of(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    """Return the names, dtypes and shapes of `tensors`."""
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def distinct_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the state dict of `model`, each by its first name: tied weights have several."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


class HostCopier:
    """A copier of tensors to host memory. A GPU's tensors pass through one page-locked buffer.

    Page-locked memory is fast to copy to, but torch rounds each block up to a power of two and never returns it.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy of `tensor` in host memory."""
        tensor = tensor.detach()
        if not tensor.is_cuda:
            return tensor.clone(memory_format=torch.contiguous_format)
        if self._buffer is None or self._buffer.numel() < tensor.nbytes:
            self._buffer = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        staged = self._buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        staged.copy_(tensor)
        return staged.clone()
