"""Which device to run on, names of dtypes, and giving memory back."""

import gc
import logging
import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from modules.errors import OptionError

logger = logging.getLogger(__name__)

Usual = TypeVar("Usual", torch.dtype, None)

# every spelling that the known command lines accept
DTYPES: dict[str, torch.dtype] = {
    "float": torch.float32,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp16": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "float8": torch.float8_e4m3fn,
    **{
        prefix + name: getattr(torch, f"float8_{name}")
        for prefix in ("", "fp8_", "float8_")
        for name in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")
    },
}


def choose_device(name: str | None) -> torch.device:
    """The device of that name; without one CUDA, else MPS, else the CPU. Has CUDA compute float32 exactly
    from now on.

    A GPU with a number becomes the current one: pinning and waiting act on that, and would else take memory
    of the first GPU too. Raises OptionError where it is not there.
    """
    keep_float32_exact()
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name}: not a device name. Use cuda, cuda:1, mps or cpu.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f"--device {name}: torch sees no CUDA device. Use --device cpu, or install a CUDA build of torch."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices, counted from cuda:0."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError(f"--device {name}: torch sees no Apple GPU. Use --device cpu.")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def sent(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
    """A tensor of a batch or of conditions where a network on `device` takes it; whole numbers and truth
    values on the host.

    These say where tokens stand and which are real. Code reads them, and reading from a device stops the host
    until all that was asked of the device before is done.
    """
    is_content = tensor.is_floating_point()
    return tensor.to(device if is_content else "cpu", non_blocking=non_blocking and is_content)


def sent_ahead(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what that was asked to do before.

    Where that is safe: MPS alone might read the host's memory when it is given free already.
    """
    return tensor.to(device, non_blocking=device.type != "mps")


def numbers_on(device: torch.device, numbers: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers of the host, or rows of them, as a tensor on a device.

    `torch.tensor` with a device would wait for it.
    """
    return sent_ahead(torch.tensor(numbers, dtype=dtype), device)


def make_deterministic() -> None:
    """Have torch use deterministic algorithms from now on; what has none is warned about.

    For before the first CUDA call.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def keep_float32_exact() -> None:
    """Have CUDA's convolutions compute float32 in float32: torch lets them round to TF32, though not its
    matrix products.
    """
    torch.backends.cudnn.allow_tf32 = False


def dtype_named(name: str, option: str) -> torch.dtype:
    """The torch dtype for an option's value. Raises OptionError listing the names."""
    try:
        return DTYPES[name.lower()]
    except KeyError:
        raise OptionError(f"{option} {name}: unknown dtype. Use one of {', '.join(DTYPES)}.") from None


def computing_dtype(name: str | None, option: str, usual: Usual) -> torch.dtype | Usual:
    """The dtype that a network is to compute in; `usual` where the option is not given.

    Raises OptionError for fp8 too.
    """
    if name is None:
        return usual
    dtype = dtype_named(name, option)
    if dtype.itemsize == 1:
        raise OptionError(f"{option} {name}: nothing is computed in fp8. Use bfloat16, float16 or float32.")
    return dtype


def half_where_fast(device: torch.device, dtype: torch.dtype, what: str) -> torch.dtype:
    """float32 in place of float16 on a CPU, which has no fast float16; else `dtype`.

    what: the network, for the log.
    """
    if device.type != "cpu" or dtype != torch.float16:
        return dtype
    logger.info("%s computes in float32: the CPU has no fast float16", what)
    return torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`, the spelling in cache tensor names and metadata."""
    return str(dtype).removeprefix("torch.")


def free_memory(device: torch.device) -> None:
    """Give memory that nothing refers to any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def allow_fp16_accumulation(device: torch.device) -> bool:
    """Let fp16 matrix products on a CUDA device add up in fp16.

    Returns whether they do, and warns if they cannot.
    """
    matmul = torch.backends.cuda.matmul
    reason = ""
    if device.type != "cuda":
        reason = f"it is for matrix products on a CUDA GPU, and this run computes on {device.type}"
    elif not hasattr(matmul, "allow_fp16_accumulation"):
        reason = f"it needs torch 2.7 or later, and this is {torch.__version__}"
    if reason:
        logger.warning("--fp16_accumulation is ignored because %s.", reason)
        return False
    matmul.allow_fp16_accumulation = True
    return True
