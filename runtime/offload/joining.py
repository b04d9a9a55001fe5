"""Join the processes that a launcher has started, and agree on what only one of them knows."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from modules.devices import select_device
from modules.errors import OptionError

T = TypeVar("T")
U = TypeVar("U")

PATIENCE = timedelta(days=1)  # timeout for processes that wait for another process's prompt or files


def take_turns(work: Callable[[U], T], item: U) -> T:
    """Return `work(item)`, run by one process after another; all processes must call this."""
    items: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(items, item)
    return [work(element) for element in items][distributed.get_rank()]


def have_joined() -> bool:
    """Return whether this process is one of several that communicate."""
    has_joined = distributed.is_available() and distributed.is_initialized()
    return has_joined and distributed.get_world_size() > 1


def launched_processes(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes that the launcher started, from WORLD_SIZE; 1 without a launcher."""
    return int(environment.get("WORLD_SIZE", "1"))


def join_processes(
    device: str | None, option: str, environment: Mapping[str, str] = os.environ
) -> torch.device:
    """Join the launcher's processes, and return the device of this one.

    Args:
        device: Value of --device.
        option: Option that needs the processes, for messages.
        environment: Environment variables.

    Raises:
        OptionError: If the machine has fewer GPUs than processes.
    """
    kind = select_device(device).type
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    if device is not None and ":" in device:
        raise OptionError(
            f"--device {device} with {option}: each process has its own GPU. Pass cuda, or omit it"
        )
    if kind not in {"cpu", "cuda"}:
        raise OptionError(f"{option}: processes do not share a model on {kind}. Use CUDA GPUs")
    process_device = select_device(f"cuda:{local_rank}" if kind == "cuda" else "cpu")
    # objects are sent between hosts by gloo: waiting for a prompt with NCCL would keep a GPU busy
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    return process_device


def agree(value: T, group: "distributed.ProcessGroup | None" = None) -> T:
    """Broadcast the value of the first process of a group, by default of all processes, and return it.

    All of them must call this, after `join_processes`.
    """
    first = 0 if group is None else distributed.get_global_rank(group, 0)
    values = [value]
    distributed.broadcast_object_list(values, first, group, device=torch.device("cpu"))
    agreed: T = values[0]
    return agreed
