"""The only entry to attention: models call `attend`, which looks up the back end in a table.

Optional packages are imported only here, when they are first used. Samples of different lengths are packed,
so that padding is not computed.
"""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from modules.attention.sdpa import causal_sdpa, cudnn_note, sdpa
from modules.devices import dtype_name, tensor_on
from modules.errors import OptionError
from modules.speed_options import SDPA, AttentionChoice, get_attention_flag

# Letters: B batch, L query tokens, S key tokens, T real tokens of all samples together, N heads, D head width


Dense = Callable[[Tensor, Tensor, Tensor], Tensor]  # query B L N D, key and value B S N D -> B L N D


@dataclass(frozen=True)
class SampleLengths:
    """Number of real tokens of each sample in a padded batch; `make_lengths` makes it once per pass."""

    # B numbers on the host: reading them from the device in every layer would make the host wait
    counts: tuple[int, ...]
    # B + 1 int32: where each sample begins once the real tokens are concatenated, and where the last ends
    starts: Tensor

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest sample."""
        return max(self.counts)

    def shorten(self, count: int) -> "SampleLengths":
        """Return the lengths after `count` real tokens of each sample were removed."""
        return make_lengths([real - count for real in self.counts], self.starts.device)


def make_lengths(counts: Sequence[int], device: torch.device) -> SampleLengths:
    """Return the `SampleLengths` of a padded batch.

    `counts` contains the number of real tokens of each sample, at least 1.
    """
    starts = tensor_on(device, [0, *accumulate(counts)], torch.int32)
    return SampleLengths(tuple(counts), starts)


def pack(tokens: Tensor, lengths: SampleLengths) -> Tensor:
    """Concatenate the real tokens of a padded batch, B L N D, to T N D."""
    # unbind: the gradient of a slice of the batch would be a batch of zeros for each sample
    return torch.cat([sample[:count] for sample, count in zip(tokens.unbind(0), lengths.counts, strict=True)])


def unpack(packed: Tensor, lengths: SampleLengths, length: int) -> Tensor:
    """Convert packed tokens, T N D, back to a padded batch, B `length` N D, with zeros as padding."""
    return _pad_outputs(packed.split(lengths.counts), length)


def _pad_outputs(samples: Sequence[Tensor], length: int) -> Tensor:
    """Pad samples, each n N D, to `length` tokens, and stack them: B `length` N D."""
    # A single concatenation makes the batch, so that tokens are copied once.
    pieces = []
    for sample in samples:
        padding = sample.new_zeros(length - len(sample), *sample.shape[1:])
        pieces += [sample, padding]
    return torch.cat(pieces).unflatten(0, (len(samples), length))


def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run FlashAttention 2 (Dao 2023, arXiv 2307.08691) on B L N D."""
    from flash_attn import flash_attn_func

    return flash_attn_func(query, key, value)


def flash_packed(query: Tensor, key: Tensor, value: Tensor, lengths: SampleLengths) -> Tensor:
    """Run FlashAttention 2 on packed samples, T N D."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query, key, value, lengths.starts, lengths.starts, lengths.max_length, lengths.max_length
    )


def flash3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run FlashAttention 3 (Shah et al. 2024, arXiv 2407.08608) on B L N D."""
    from flash_attn_interface import flash_attn_func

    return _drop_normalizer(flash_attn_func(query, key, value))


def flash3_packed(query: Tensor, key: Tensor, value: Tensor, lengths: SampleLengths) -> Tensor:
    """Run FlashAttention 3 on packed samples, T N D."""
    from flash_attn_interface import flash_attn_varlen_func

    starts, longest = lengths.starts, lengths.max_length
    return _drop_normalizer(flash_attn_varlen_func(query, key, value, starts, starts, longest, longest))


def sage(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run SageAttention (Zhang et al. 2024, arXiv 2410.02367) on B L N D; inference only.

    Its function for packed sequences uses an older, slower kernel, so padded batches run sample by sample.
    """
    from sageattention import sageattn

    return sageattn(query, key, value, tensor_layout="NHD")  # the package's letters for B L N D


def xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run xFormers' memory-efficient attention on B L N D."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, key, value)


def xformers_packed(query: Tensor, key: Tensor, value: Tensor, lengths: SampleLengths) -> Tensor:
    """Run xFormers on packed samples, T N D; the mask is a list of lengths instead of a matrix."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(list(lengths.counts))
    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask)[0]


def _drop_normalizer(result: Any) -> Tensor:
    """Return only the attention output; early builds also return the softmax normalizer."""
    return result[0] if isinstance(result, tuple) else result


logger = logging.getLogger(__name__)

Packed = Callable[[Tensor, Tensor, Tensor, SampleLengths], Tensor]  # query, key, value T N D -> T N D
HALF_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """An attention kernel: the package that it needs, and the runs that the package supports."""

    dense: Dense
    packed: Packed | None = None  # None: computing sample by sample is as fast
    module: str = ""  # module of the package; "" for torch's own kernels
    name: str = ""  # name of the package, for messages
    install: str = ""  # completes "Install it ..."
    capability: tuple[int, int] | None = None  # the lowest compute capability that it supports
    only: str | None = None  # name of the supported GPUs, if they need exactly that capability
    dtypes: tuple[torch.dtype, ...] | None = None  # None: any
    has_backward: bool = True  # whether it has a backward pass


BACKENDS = {
    # Sample by sample, torch uses cuDNN's kernel. torch.nn.attention.varlen would run FlashAttention 2's on
    # copies of all tokens, which is slower than cuDNN's; one sample of thousands of tokens fills a GPU.
    "sdpa": Backend(sdpa),
    "flash": Backend(
        dense=flash,
        packed=flash_packed,
        module="flash_attn",
        name="FlashAttention 2",
        install="with: pip install flash-attn --no-build-isolation",
        capability=(8, 0),
        dtypes=HALF_DTYPES,
    ),
    "flash3": Backend(
        dense=flash3,
        packed=flash3_packed,
        module="flash_attn_interface",
        name="FlashAttention 3",
        install="from source: the folder hopper of https://github.com/Dao-AILab/flash-attention",
        capability=(9, 0),
        only="Hopper GPUs (H100, H200, GH200)",
        dtypes=HALF_DTYPES,
    ),
    "sage": Backend(
        dense=sage,
        module="sageattention",
        name="SageAttention",
        install="from source: https://github.com/thu-ml/SageAttention",
        capability=(8, 0),
        dtypes=HALF_DTYPES,
        has_backward=False,
    ),
    "xformers": Backend(
        dense=xformers,
        packed=xformers_packed,
        module="xformers",
        name="xFormers",
        install="with: pip install xformers, for this version of torch",
    ),
}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    choice: AttentionChoice = SDPA,
    lengths: SampleLengths | None = None,
    repeats: Tensor | None = None,
) -> Tensor:
    """Compute softmax attention, scaled by 1/sqrt(D), in the inputs' dtype (under autocast in its dtype).

    With `choice.in_float32` it is computed in float32, outside autocast, and returned in the inputs' dtype.
    Padding is not computed: its keys are ignored, its queries give zeros, and the gradients of both are zero.

    Args:
        query: Queries, B L N D.
        key: Keys, B S N D.
        value: Values, B S N D.
        choice: The attention kernel; with its `split`, one sample is computed at a time.
        lengths: Number of real tokens among the L tokens of each sample, for self-attention. If S > L, the
            S - L additional keys come first and are all real.
        repeats: How many equal keys each key stands for, S float32; only with sdpa and without lengths.

    Returns:
        Attention output, B L N D.

    Raises:
        ValueError: If the arguments contradict each other.
    """
    if choice.in_float32:
        choice = replace(choice, in_float32=False)
        with torch.autocast(query.device.type, enabled=False):
            output = attend(query.float(), key.float(), value.float(), choice, lengths, repeats)
        return output.to(value.dtype)
    backend = BACKENDS[choice.mode]
    if repeats is not None and (backend.module or lengths is not None):
        raise ValueError("repeats need sdpa and no lengths")
    # sdpa needs no cast: torch's own function follows autocast
    if backend.module and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query = query.to(dtype)
        key = key.to(dtype)
        value = value.to(dtype)
    if lengths is not None:
        return _attend_without_padding(backend, query, key, value, lengths=lengths, split=choice.split)
    dense = backend.dense if repeats is None else functools.partial(sdpa, repeats=repeats)
    if choice.split and len(query) > 1:
        # one sample at a time
        samples = zip(query.unbind(0), key.unbind(0), value.unbind(0), strict=True)
        return torch.stack([dense(q[None], k[None], v[None])[0] for q, k, v in samples])
    return dense(query, key, value)


def attend_causally(query: Tensor, key: Tensor, value: Tensor, choice: AttentionChoice = SDPA) -> Tensor:
    """Compute causal attention: each query attends to the key of its own position and to earlier keys.

    Args:
        query: Queries, B L N D, for the last L of the S positions.
        key: Keys, B S N D.
        value: Values, B S N D.
        choice: Only its `in_float32` matters. Torch's own kernels are always used, because other packages
            align the triangle differently, and models have few causal queries (those of text encoders).

    Raises:
        ValueError: If there are fewer keys than queries.
    """
    if key.shape[1] < query.shape[1]:
        raise ValueError(f"{query.shape[1]} causal queries and only {key.shape[1]} keys")
    if choice.in_float32:
        with torch.autocast(query.device.type, enabled=False):
            return causal_sdpa(query.float(), key.float(), value.float()).to(value.dtype)
    return causal_sdpa(query, key, value)


def _attend_without_padding(
    backend: Backend, query: Tensor, key: Tensor, value: Tensor, *, lengths: SampleLengths, split: bool
) -> Tensor:
    """Compute self-attention over the real tokens of each sample. Returns B L N D, padded with zeros."""
    # All samples are computed at once if the kernel supports it, unless `split` or additional keys forbid it.
    num_extra_keys = key.shape[1] - query.shape[1]  # they come first
    if num_extra_keys < 0:
        raise ValueError(
            f"lengths are for self-attention only, not for {query.shape[1]} queries and {key.shape[1]} keys"
        )
    if backend.packed is not None and not split and not num_extra_keys:
        packed = backend.packed(pack(query, lengths), pack(key, lengths), pack(value, lengths), lengths)
        return unpack(packed, lengths, query.shape[1])
    dense = backend.dense
    outputs = []
    samples = zip(query.unbind(0), key.unbind(0), value.unbind(0), lengths.counts, strict=True)
    for q, k, v, count in samples:
        keys = num_extra_keys + count
        outputs.append(dense(q[None, :count], k[None, :keys], v[None, :keys])[0])
    return _pad_outputs(outputs, query.shape[1])


def check_backend(
    choice: AttentionChoice, device: torch.device, dtype: Callable[[], torch.dtype], training: bool
) -> None:
    """Raise OptionError if an attention kernel does not support a run, before anything is loaded.

    The last check computes attention on small tensors, in training with the backward pass, because a package
    may be built for another GPU or version of torch.

    Args:
        choice: The attention kernel.
        device: Device of the run.
        dtype: Returns the model's compute dtype; called only if needed, because it may have to read a file.
        training: Whether a backward pass is needed; messages then name the flags of training.
    """
    backend = BACKENDS[choice.mode]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if not backend.module:  # torch's own kernels
        cudnn_warning = None if capability is None else cudnn_note(capability, torch.backends.cudnn.version())
        if cudnn_warning is not None:
            logger.warning(cudnn_warning)
        return
    flag = get_attention_flag(choice.mode, training)
    remedy = f"Omit {flag} to use torch's own attention."
    reason = explain_unsupported(backend, capability, dtype, training)
    if reason is not None:
        raise OptionError(f"{flag} {reason} {remedy}")
    _import_package(backend, flag, remedy)
    try:
        check_results(choice, device, dtype(), training)
    except Exception as error:  # kernels may raise anything
        raise OptionError(
            f"{flag}: {backend.name} does not work here ({type(error).__name__}: {error}).\n"
            f"  Reinstall it {backend.install}. {remedy}"
        ) from error


def _import_package(backend: Backend, flag: str, remedy: str) -> None:
    """Import the package of an attention kernel; raise OptionError if it is missing or cannot be loaded."""
    try:
        importlib.import_module(backend.module)
    except Exception as error:  # a package built for another torch may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == backend.module.partition(".")[0]:
            raise OptionError(
                f"{flag} needs {backend.name}, which is not installed. Install it {backend.install}. {remedy}"
            ) from None
        raise OptionError(
            f"{flag}: {backend.name} cannot be loaded ({error}).\n  Reinstall it {backend.install}. {remedy}"
        ) from error


def explain_unsupported(
    backend: Backend, capability: tuple[int, int] | None, dtype: Callable[[], torch.dtype], training: bool
) -> str | None:
    """Return why an attention kernel cannot be used in a run, worded to follow "--flag"; None if it can.

    The package of `backend` need not be installed. `capability` is None without a CUDA device. `dtype`
    returns the dtype of the model, which may read the checkpoint.
    """
    if training and not backend.has_backward:
        return "has no backward pass, so nothing would be learned: it is for generation only."
    if capability is None:
        return "runs on CUDA devices only, and this run does not use one."
    if backend.capability is not None:
        needed = ".".join(map(str, backend.capability))
        available = ".".join(map(str, capability))
        if backend.only is not None and capability != backend.capability:
            return f"runs on {backend.only}, of compute capability {needed}; this GPU has {available}."
        if capability < backend.capability:
            return (
                f"runs on GPUs of compute capability {needed} or more (Ampere and later); this one has "
                f"{available}."
            )
    if backend.dtypes is not None and dtype() not in backend.dtypes:
        remedy = "--mixed_precision bf16" if training else "a checkpoint in 16 bit"
        return (
            f"computes in float16 and bfloat16 only, and the model computes in {dtype_name(dtype())}. Use "
            f"{remedy}."
        )
    return None


def check_results(choice: AttentionChoice, device: torch.device, dtype: torch.dtype, training: bool) -> None:
    """Compute attention on small tensors with and without padding, in training with its gradients.

    Raises any error of the kernel, and ArithmeticError if the results are not close to torch's.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = []  # query, key and value: B 2, L 128, N 2, D 128
    for _ in range(3):
        tensor = torch.randn(2, 128, 2, 128, generator=generator).to(device, dtype)
        inputs.append(tensor.requires_grad_(training))
    query, key, value = inputs
    with torch.set_grad_enabled(training):
        for counts in (None, (128, 72)):  # without padding, and with a second sample of 72 tokens
            lengths = None if counts is None else make_lengths(counts, device)
            result = attend(query, key, value, choice, lengths=lengths)
            expected = attend(query, key, value, SDPA, lengths=lengths)
            # wide tolerances: SageAttention rounds to 8 bits
            if not torch.allclose(result, expected, rtol=0.1, atol=0.05):
                keys = key.shape[1] if counts is None else min(counts)
                raise ArithmeticError(f"its results are wrong for {keys} keys")
            if training:
                torch.autograd.grad(result.float().sum(), inputs)


# Letters: B batch, L tokens of image or video, T tokens of the first text, T' of the second, N heads


# outputs of attention to the wanted text and to another one, each B L N D -> the output to use instead
CombineAttention = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SecondText:
    """Where the tokens of a second prompt are, B L+T+T' ..., and how attention uses them."""

    num_image_tokens: int  # tokens of the image, L
    num_text_tokens: int  # tokens of the second text, T'
    lengths: SampleLengths | None  # number of real tokens among L + T'; None: all
    combine_attention: CombineAttention

    def drop_second_text(self, x: Tensor) -> Tensor:
        """Return the tokens of the image and of the first text, B L+T ..."""
        return x[:, : -self.num_text_tokens]

    def drop_first_text(self, x: Tensor) -> Tensor:
        """Return the tokens of the image and of the second text, B L+T' ..."""
        return torch.cat([x[:, : self.num_image_tokens], x[:, -self.num_text_tokens :]], dim=1)

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        """Combine two attention outputs, each computed with one of two prompts, into one: B L+T+T' N D."""
        steered = self.combine_attention(
            first[:, : self.num_image_tokens], second[:, : self.num_image_tokens]
        )
        return torch.cat(
            [steered, first[:, self.num_image_tokens :], second[:, self.num_image_tokens :]], dim=1
        )
