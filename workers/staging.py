"""Copies between a device's memory and the host's, through page-locked memory where that is a GPU.

A copy to or from pageable memory makes the driver stage it piece by piece and the thread wait for all that the GPU has
to do. From page-locked memory it is one transfer by the GPU itself; torch keeps such memory, once got, for the next.
"""

from __future__ import annotations

import torch


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers on the CPU, contiguous: the tensor itself if it is that already.

    Waits, asleep, for the copy and what the stream had to do before it, and for no other stream.
    """
    if tensor.device.type != "cuda":
        return tensor.to("cpu").contiguous()
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    staged.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(tensor.device))
    done.synchronize()
    return staged


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the CPU's, there: the tensor itself if that is the CPU.

    On a GPU it may be changed or freed at once: what is under way has a copy, which torch keeps until it has arrived.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
