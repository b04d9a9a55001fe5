"""The only entry to attention: models call `attend`, which looks up the back end in a table."""
# Letters: B batch, L query tokens, S key tokens, T real tokens of all samples together, N heads, D head width

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modules.attention.lengths import Dense, Lengths, attend_by_sample, lengths_on, pack, unpack
from modules.attention.options import SDPA, AttentionChoice, flag_of
from modules.attention.packages import (
    flash,
    flash3,
    flash3_packed,
    flash_packed,
    sage,
    xformers,
    xformers_packed,
)
from modules.attention.sdpa import cudnn_note, sdpa
from modules.devices import dtype_name
from modules.errors import OptionError

logger = logging.getLogger(__name__)

Packed = Callable[[Tensor, Tensor, Tensor, Lengths], Tensor]  # query, key, value T N D -> T N D
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Package:
    """The package that a back end needs, and the runs that it supports."""

    name: str  # for messages
    module: str
    install: str  # completes "Install it ..."
    capability: tuple[int, int] | None = None  # the lowest compute capability that it supports
    only: str | None = None  # names the supported GPUs, if they are those of exactly that capability
    dtypes: tuple[torch.dtype, ...] | None = None  # None: any
    learns: bool = True  # has a backward pass


@dataclass(frozen=True)
class Backend:
    """One way to compute attention."""

    dense: Dense
    packed: Packed | None = None  # None: computing sample by sample is as fast
    package: Package | None = None


BACKENDS = {
    # Sample by sample, torch uses cuDNN's kernel. torch.nn.attention.varlen would run FlashAttention 2's on
    # copies of all tokens, which is slower than cuDNN's; one sample of thousands of tokens fills a GPU.
    "sdpa": Backend(sdpa),
    "flash": Backend(
        flash,
        flash_packed,
        Package(
            "FlashAttention 2",
            "flash_attn",
            "with: pip install flash-attn --no-build-isolation",
            capability=(8, 0),
            dtypes=HALVES,
        ),
    ),
    "flash3": Backend(
        flash3,
        flash3_packed,
        Package(
            "FlashAttention 3",
            "flash_attn_interface",
            "from source: the folder hopper of https://github.com/Dao-AILab/flash-attention",
            capability=(9, 0),
            only="Hopper GPUs (H100, H200, GH200)",
            dtypes=HALVES,
        ),
    ),
    "sage": Backend(
        sage,
        package=Package(
            "SageAttention",
            "sageattention",
            "from source: https://github.com/thu-ml/SageAttention",
            capability=(8, 0),
            dtypes=HALVES,
            learns=False,
        ),
    ),
    "xformers": Backend(
        xformers,
        xformers_packed,
        Package("xFormers", "xformers", "with: pip install xformers, for this version of torch"),
    ),
}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    choice: AttentionChoice = SDPA,
    lengths: Lengths | None = None,
    repeats: Tensor | None = None,
) -> Tensor:
    """Compute softmax attention, scaled by 1/sqrt(D), in the inputs' dtype (under autocast in its dtype).

    query: B L N D. key, value: B S N D. choice: the back end; `split` computes one sample at a time.
    lengths: how many tokens of each sample are real, for self-attention (L = S). Padding is not computed:
    its keys are ignored, its queries give zeros, and the gradients of both are zero. repeats: S float32, how
    many equal keys each key stands for; sdpa only, not together with lengths. Returns B L N D.
    Raises ValueError if the arguments do not go together.
    """
    backend = BACKENDS[choice.mode]
    if lengths is not None and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"lengths are for self-attention only, not for {query.shape[1]} queries and {key.shape[1]} keys"
        )
    if repeats is not None and (backend.package is not None or lengths is not None):
        raise ValueError("repeats are for sdpa, without lengths")
    # sdpa needs no cast: torch's own function follows autocast
    if backend.package is not None and torch.is_autocast_enabled(query.device.type):
        query, key, value = (
            one.to(torch.get_autocast_dtype(query.device.type)) for one in (query, key, value)
        )
    dense = backend.dense if repeats is None else functools.partial(sdpa, repeats=repeats)
    if lengths is None and not (choice.split and len(query) > 1):
        return dense(query, key, value)
    if lengths is None or choice.split or backend.packed is None:
        return attend_by_sample(dense, query, key, value, lengths)
    packed = backend.packed(pack(query, lengths), pack(key, lengths), pack(value, lengths), lengths)
    return unpack(packed, lengths, query.shape[1])


def check_backend(
    choice: AttentionChoice, device: torch.device, dtype: Callable[[], torch.dtype], training: bool
) -> None:
    """Raise OptionError if this back end cannot do this run, before anything is loaded.

    dtype: returns the model's compute dtype; called only if it matters, as it may have to read a file.
    training: a backward pass is needed, and messages name the training flags. The last check computes a small
    attention (in training with its backward pass), as a package may be built for another GPU or torch.
    """
    package = BACKENDS[choice.mode].package
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if package is None:
        note = None if capability is None else cudnn_note(capability, torch.backends.cudnn.version())
        if note is not None:
            logger.warning(note)
        return
    flag = flag_of(choice.mode, training)
    instead = f"Leave {flag} out to use torch's own attention."
    reason = refusal(package, capability, dtype, training)
    if reason is not None:
        raise OptionError(f"{flag} {reason} {instead}")
    try:
        importlib.import_module(package.module)
    except Exception as error:  # a binary built for another torch may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == package.module.partition(".")[0]:
            raise OptionError(
                f"{flag} needs {package.name}, which is not installed. Install it {package.install}. "
                f"{instead}"
            ) from None
        raise OptionError(
            f"{flag}: {package.name} cannot be loaded ({error}).\n  Reinstall it {package.install}. {instead}"
        ) from error
    try:
        try_out(choice, device, dtype(), training)
    except Exception as error:
        raise OptionError(
            f"{flag}: {package.name} does not work here ({type(error).__name__}: {error}).\n"
            f"  Reinstall it {package.install}. {instead}"
        ) from error


def refusal(
    package: Package, capability: tuple[int, int] | None, dtype: Callable[[], torch.dtype], training: bool
) -> str | None:
    """Return why a package cannot do a run, whatever is installed, to follow "--flag"; None if it can.

    capability: None without a CUDA device.
    """
    if training and not package.learns:
        return "has no backward pass, so nothing would be learned: it is for generation only."
    if capability is None:
        return "runs on CUDA devices only, and this run does not use one."
    if package.capability is not None:
        needed, found = (".".join(map(str, one)) for one in (package.capability, capability))
        if package.only is not None and capability != package.capability:
            return f"runs on {package.only}, of compute capability {needed}; this GPU has {found}."
        if capability < package.capability:
            return (
                f"runs on GPUs of compute capability {needed} or more (Ampere and later); this one has "
                f"{found}."
            )
    if package.dtypes is not None and dtype() not in package.dtypes:
        mend = "--mixed_precision bf16" if training else "a checkpoint in 16 bit"
        return (
            f"computes in float16 and bfloat16 only, and the model computes in {dtype_name(dtype())}. Use "
            f"{mend}."
        )
    return None


def try_out(choice: AttentionChoice, device: torch.device, dtype: torch.dtype, training: bool) -> None:
    """Compute a small attention with and without padding, in training with its gradients.

    Raises whatever the back end raises, and ArithmeticError if the results are not close to torch's.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 128, 2, 128, generator=generator).to(device, dtype).requires_grad_(training)
        for _ in range(3)
    ]
    query, key, value = inputs
    with torch.set_grad_enabled(training):
        for counts in (None, (128, 72)):
            lengths = None if counts is None else lengths_on(counts, device)
            result = attend(query, key, value, choice, lengths)
            expected = attend(query, key, value, SDPA, lengths)
            # wide tolerances: SageAttention rounds to 8 bits
            if not torch.allclose(result, expected, rtol=0.1, atol=0.05):
                raise ArithmeticError("its results are wrong")
            if training:
                torch.autograd.grad(result.float().sum(), inputs)
