"""Choose a device, name dtypes, send tensors, free memory."""

import ctypes
import functools
import gc
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from modules.errors import OptionError, UserError, is_compiler_error
from modules.nvidia_driver import explain_unseen_card
from modules.private_torch import release_host_cache

logger = logging.getLogger(__name__)
GIB = 1 << 30

Default = TypeVar("Default", torch.dtype, None)

DEVICES = ("cuda", "mps", "cpu", "xpu")
# all spellings that sd-scripts and similar programs accept
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

# parts of out-of-memory messages of torch's allocators and libraries that are not torch.OutOfMemoryError
NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    # a CUDA convolution whose cuDNN workspace does not fit into memory (pytorch/pytorch#108645)
    "unable to find an engine to execute this computation",
)


def select_device(name: str | None) -> torch.device:
    """Return the named device; without a name, CUDA if available, else MPS, else the CPU.

    CUDA is also set to compute float32 exactly. A GPU that is named with its index becomes the current one,
    because pinning and synchronizing act on the current GPU, and would otherwise also use memory of GPU 0.

    Raises:
        OptionError: If the device does not exist.
    """
    torch.backends.cudnn.allow_tf32 = False  # on by default for convolutions, but not for matrix products
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        _warn_of_undetected_card()
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name}: not a device name. Use cuda, cuda:1, mps or cpu.") from error
    if device.type not in DEVICES:
        raise OptionError(f"--device {name}: nothing here computes on {device.type}. Use cuda, mps or cpu.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise OptionError(f"--device {name}: torch sees no Apple GPU. Use --device cpu.")
    if device.type == "cuda":
        # Raise OptionError if torch detects no CUDA device, or none with the index of `device`
        if not torch.cuda.is_available():
            reason = explain_unseen_card(torch.__version__, torch.version.cuda)
            remedy = "Use --device cpu, or install a CUDA build of torch." if reason is None else f"{reason}."
            raise OptionError(f"--device {name}: torch sees no CUDA device. {remedy}")
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise OptionError(
                f"--device {name}: torch sees {count} CUDA devices, counted from cuda:0. Use at most "
                f"cuda:{count - 1}."
            )
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


@functools.cache
def _warn_of_undetected_card() -> None:
    """Warn once of an NVIDIA GPU that torch does not detect, unless CUDA_VISIBLE_DEVICES is set."""
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        reason = explain_unseen_card(torch.__version__, torch.version.cuda)
        if reason is not None:
            logger.warning("This runs on the CPU: %s.", reason)


def send(tensor: Tensor, device: torch.device, non_blocking: bool = False) -> Tensor:
    """Send a tensor of a batch to `device`; integer and bool tensors stay on the host.

    These contain positions and masks of tokens, which the host reads: reading them from the device would wait
    for all work queued there.
    """
    is_content = tensor.is_floating_point()
    return tensor.to(device if is_content else "cpu", non_blocking=non_blocking and is_content)


# maximum bytes that CUDA copies from pageable memory without waiting. For larger copies the driver needs
# page-locked memory, and "may synchronize with the stream": NVIDIA, API synchronization behavior
IN_COMMAND = 64 << 10


def send_ahead(tensor: Tensor, device: torch.device) -> Tensor:
    """Send a host tensor without waiting for queued work; on MPS, wait, as it might read freed memory."""
    is_large = tensor.device.type == "cpu" and tensor.nbytes > IN_COMMAND
    if device.type == "cuda" and is_large and not tensor.is_pinned():
        tensor = pin(tensor)  # torch keeps this memory until the copy is done
    return tensor.to(device, non_blocking=device.type != "mps")


def pin(tensor: Tensor) -> Tensor:
    """Copy a host tensor to page-locked memory; return the tensor itself if the driver refuses.

    In that case, copying it to a CUDA device makes the host wait.
    """
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        logger.debug("not pinned: %s", error)
        return tensor


def empty_pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized host tensor, in page-locked memory if the driver permits."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        logger.debug("not pinned: %s", error)
        return torch.empty(shape, dtype=dtype)


def tensor_on(device: torch.device, numbers: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    """Return a tensor of numbers (or rows of numbers) on a device without the wait of `torch.tensor`."""
    return send_ahead(torch.tensor(numbers, dtype=dtype), device)


def make_deterministic() -> None:
    """Make torch deterministic; other operations only cause warnings. Call before the first CUDA call."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)


def leave_cudnn_out(device: torch.device) -> None:
    """Disable cuDNN in torch, because on some GPUs, mostly AMD's, its convolutions are slow or fail.

    Warns if the device is not a CUDA device, where this has no effect.
    """
    if acts_on_cuda("--disable_cudnn_backend", "convolutions", device):
        torch.backends.cudnn.enabled = False


def acts_on_cuda(option: str, what: str, device: torch.device) -> bool:
    """Return whether an option for CUDA devices has an effect on `device`, and warn if it has none.

    `what` names the operations that the option speeds up or changes, such as "matrix products".
    """
    if device.type == "cuda":
        return True
    logger.warning(
        "%s is ignored because it is for %s on a CUDA GPU, and this run computes on %s.",
        *(option, what, device.type),
    )
    return False


def parse_dtype(name: str, option: str) -> torch.dtype:
    """Return the torch dtype named by an option's value; an unknown name raises OptionError with a list."""
    try:
        return DTYPES[name.lower()]
    except KeyError:
        names = ", ".join(spelling for spelling, dtype in DTYPES.items() if dtype.itemsize > 1)
        raise OptionError(f"{option} {name}: unknown dtype. Use one of {names}.") from None


def select_compute_dtype(name: str | None, option: str, usual: Default) -> torch.dtype | Default:
    """Return the compute dtype that an option names; `usual` if the option is not given.

    Raises:
        OptionError: If the name is unknown or an fp8 dtype.
    """
    if name is None:
        return usual
    dtype = parse_dtype(name, option)
    if dtype.itemsize == 1:
        raise OptionError(f"{option} {name}: nothing is computed in fp8. Use bfloat16, float16 or float32.")
    return dtype


def replace_slow_float16(device: torch.device, dtype: torch.dtype, what: str) -> torch.dtype:
    """Return float32 instead of float16 on a CPU, where float16 is slow; otherwise `dtype`.

    `what` is the name of the network, for the log.
    """
    if device.type != "cpu" or dtype != torch.float16:
        return dtype
    logger.info("%s computes in float32: the CPU has no fast float16", what)
    return torch.float32


def get_compute_dtype(dit: nn.Module) -> torch.dtype:
    """Return a network's compute dtype: its `compute_dtype`, else the dtype of its first parameter."""
    dtype = getattr(dit, "compute_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else next(dit.parameters()).dtype


def emulates_bfloat16() -> bool:
    """Return whether the CPU lacks instructions for bfloat16.

    On such a CPU, torch takes 7 to 90 times as long for matrix products as in float32, and 40 times as long
    for convolutions.
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def warn_if_emulated(device: torch.device, dtype: torch.dtype, what: str) -> None:
    """Warn if a network computes in bfloat16 on a CPU without bfloat16 instructions.

    `what` is the name of the network.
    """
    if device.type == "cpu" and dtype == torch.bfloat16 and emulates_bfloat16():
        logger.warning(
            "%s computes in bfloat16, which is very slow on this processor; float32 takes a fraction of the "
            "time (--vae_dtype float32, --dit_dtype float32, --mixed_precision no)",
            what,
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for `torch.bfloat16`, as in cache tensor names and metadata."""
    return str(dtype).removeprefix("torch.")


def free_memory(device: torch.device) -> None:
    """Return unused memory of Python and the device's allocator to the system."""
    gc.collect()
    release_heap()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@functools.cache
def freeze_libraries() -> None:
    """Exclude all existing objects from garbage collection, for the rest of this process.

    torch and its dependencies have some 365,000 objects, which each collection would scan: 0.2 s on a laptop.
    Call it after the libraries are imported and before a network is loaded: a frozen object is never
    collected. Only the first call has an effect, so a process that runs several commands does not freeze
    networks of an earlier one. The cache saves later calls of `gc.get_freeze_count`, which is slow.
    """
    if gc.get_freeze_count() == 0:
        gc.freeze()


def release_heap() -> None:
    """Return freed memory to the system, because glibc may keep gaps as large as a network."""
    if _GLIBC is not None:
        _GLIBC.malloc_trim(0)


def keep_heap_small() -> None:
    """Make glibc return the memory of weights as soon as it is freed, for the rest of this process.

    By default, glibc raises its mmap threshold to the size of freed blocks, up to 32 MiB. Smaller blocks then
    come from its heap, where weights that are still in use leave holes.
    """
    if _GLIBC is not None:
        _GLIBC.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)


MMAP_THRESHOLD = 128 << 10  # bytes; glibc's own at the start
_M_MMAP_THRESHOLD = -3  # malloc.h
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_GLIBC = _LIBC if hasattr(_LIBC, "malloc_trim") else None  # other C libraries have neither function


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the host ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


def release_pinned_memory() -> None:
    """Release unused pinned host memory.

    torch would keep it for the rest of the process, rounded up to a power of two: 2 GiB after a text encoder
    whose embedding takes 1.1 GB.
    """
    release_host_cache()


@contextmanager
def separate_stream(device: torch.device) -> Iterator[None]:
    """Run the block in its own CUDA stream, so that threads run in parallel; wait for it at the end."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        yield
        torch.cuda.current_stream(device).synchronize()


def allow_fp16_accumulation(device: torch.device) -> bool:
    """Let fp16 matrix products on a CUDA device accumulate in fp16.

    Returns whether they do, and warns if they cannot.
    """
    matmul = torch.backends.cuda.matmul
    if not acts_on_cuda("--fp16_accumulation", "matrix products", device):
        return False
    if not hasattr(matmul, "allow_fp16_accumulation"):
        logger.warning(
            "--fp16_accumulation is ignored because it needs torch 2.7 or later, and this is %s.",
            torch.__version__,
        )
        return False
    matmul.allow_fp16_accumulation = True
    return True


@dataclass
class Failures:
    """Collects the errors of failed jobs; with `strict`, the first error ends the run."""

    strict: bool = False
    reasons: dict[str, str] = field(default_factory=dict)
    _codes: set[int] = field(default_factory=set, init=False)

    @contextmanager
    def collect_errors(
        self, label: str, fatal: type[Exception] | tuple[type[Exception], ...] = ()
    ) -> Iterator[None]:
        """Record an error in the block and continue, unless it is `fatal` or comes from torch's compiler."""
        try:
            yield
        except Exception as error:
            if self.strict or isinstance(error, fatal) or is_compiler_error(error):
                raise
            self.reasons[label] = f"{type(error).__name__}: {error}"
            self._codes.add(error.exit_code if isinstance(error, UserError) else UserError.exit_code)
            is_known = isinstance(error, (UserError, torch.OutOfMemoryError))
            logger.error("%s is skipped. %s", label, self.reasons[label], exc_info=not is_known)

    def raise_if_any(self, total: int, where: str = "") -> None:
        """Raise UserError with a list of the failures; `where` begins the message, such as "prompts.txt: ".

        If all failures share an exit code other than 1 and 2, the error has that code.
        """
        if not self.reasons:
            return
        lines = "\n".join(f"  {label}: {reason}" for label, reason in self.reasons.items())
        error = UserError(f"{where}{len(self.reasons)} of {total} failed:\n{lines}")
        if len(self._codes) == 1 and max(self._codes) > OptionError.exit_code:
            (error.exit_code,) = self._codes
        raise error


def format_gib(size: int) -> str:
    """Format a size in bytes as GiB with two decimals."""
    return f"{size / GIB:.2f}"


def host_peak() -> int:
    """Return the peak host memory of this process, in bytes."""
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_peak_memory(device: torch.device) -> str:
    """Describe the peak memory so far: of the CUDA device, else of the host."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_peak()
    return f"{format_gib(used)} GiB"
