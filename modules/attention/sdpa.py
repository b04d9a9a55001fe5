"""Attention by torch's scaled_dot_product_attention, with the kernels in the best order for the device."""
# Letters: B batch, L query tokens, S key tokens, N heads, D head width

import torch
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# queries x keys; up to this size matrix products are faster than PyTorch's kernels on a CPU in 16 bit
MAX_SCORES_FOR_MATMUL = 256 * 256
CUDNN_GPUS = {(9, 0), (10, 0), (10, 3)}  # compute capabilities of Hopper and of data-centre Blackwell
# The first cuDNN that is correct for sequence lengths other than multiples of 128. Source:
# pytorch/pytorch#169849
FIRST_CUDNN = 91501


def sdpa(query: Tensor, key: Tensor, value: Tensor, repeats: Tensor | None = None) -> Tensor:
    """Compute attention with torch's own kernels.

    `query` is B L N D. `key` and `value` are B S N D. `repeats`, S float32, is the number of equal keys that
    each key stands for. Returns B L N D.
    """
    q = query.transpose(1, 2)  # B N L D
    k = key.transpose(1, 2)
    v = value.transpose(1, 2)
    length = query.shape[1]
    if not is_on_cuda(query):
        bias = None if repeats is None else key_bias(repeats, length, torch.float32)
        is_16_bit_on_cpu = query.device.type == "cpu" and query.dtype.itemsize < 4
        if is_16_bit_on_cpu and length * key.shape[1] <= MAX_SCORES_FOR_MATMUL:
            return _attend_by_matmul(q, k, v, bias).transpose(1, 2)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
    return _attend_on_cuda(q, k, v, repeats)


def _attend_on_cuda(q: Tensor, k: Tensor, v: Tensor, repeats: Tensor | None) -> Tensor:
    """Compute attention with the fastest CUDA kernel: q is B N L D, k and v B N S D. Returns B L N D."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
    # CUDA's kernel for a bias raises for one in a different dtype than the queries' ("invalid dtype for
    # bias")
    bias = None if repeats is None else key_bias(repeats, q.shape[2], dtype)
    order = list_kernels(
        _capability(q.device), dtype, width=q.shape[-1], has_mask=bias is not None, cudnn=_cudnn_version()
    )
    needs_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    if order[0] == SDPBackend.CUDNN_ATTENTION and len(q) > 1 and needs_gradients:
        # cuDNN's gradients of several samples in one call may be NaN: on an H100 (torch 2.11), those of two
        # samples of 754 tokens were; gradients of single samples never were. A sample of thousands of tokens
        # keeps a GPU busy, so little is lost.
        samples = zip(q.split(1), k.split(1), v.split(1), strict=True)
        return torch.cat([attend_in_order(*sample, None, order).transpose(1, 2) for sample in samples])
    return attend_in_order(q, k, v, bias, order=order).transpose(1, 2)


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute causal attention; the L queries are the last L of the S tokens.

    `query` is B L N D. `key` and `value` are B S N D, S >= L. Returns B L N D.
    """
    q = query.transpose(1, 2)  # B N L D
    k = key.transpose(1, 2)
    v = value.transpose(1, 2)
    length = query.shape[1]
    num_keys = key.shape[1]
    mask = None
    if length != num_keys:  # torch's own causal mask would align the queries with the first L keys
        positions = torch.arange(num_keys, device=q.device)
        mask = positions <= positions[num_keys - length :, None]  # L S
    if not is_on_cuda(query):
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return attended.transpose(1, 2)
    # not cuDNN's kernel: with a mask its gradients may be NaN, and it is planned again for every length
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return attended.transpose(1, 2)


def is_on_cuda(tensor: Tensor) -> bool:
    """Return whether a tensor is on a CUDA device, where PyTorch's fused attention kernels exist."""
    return tensor.device.type == "cuda"


def key_bias(repeats: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """Return an attention bias, 1 1 `queries` S, that acts as if key i were repeated repeats[i] times."""
    # cast before expanding: a later cast would materialize a row for each query
    return repeats.log().to(dtype).expand(1, 1, queries, -1)


def list_kernels(
    capability: tuple[int, int], dtype: torch.dtype, width: int, has_mask: bool, cudnn: int | None
) -> list[SDPBackend]:
    """Return torch's attention kernels to try, best first; it skips kernels that do not fit the sizes.

    cuDNN's kernel is the fastest on Hopper and Blackwell, forward and backward, and the backward pass uses
    the same kernel as the forward pass. It is left out if it is known to fail instead of being skipped by
    torch: with a mask its gradients may be NaN (pytorch/pytorch#196678), before 9.15.1 results may be wrong
    unless the length is a multiple of 128, and other GPUs and wider heads have no plan for some sizes ("No
    execution plans support the graph", pytorch/pytorch#140930).

    Args:
        capability: Compute capability of the GPU, such as (9, 0).
        dtype: Dtype of the queries.
        width: Width of a head.
        has_mask: Whether attention is masked.
        cudnn: Version of cuDNN, such as 91501 for 9.15.1; None leaves cuDNN out.
    """
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    is_good = capability in CUDNN_GPUS and cudnn is not None and cudnn >= FIRST_CUDNN
    is_supported = (
        dtype in {torch.float16, torch.bfloat16} and width <= 128 and width % 8 == 0 and not has_mask
    )
    return [SDPBackend.CUDNN_ATTENTION, *order] if is_good and is_supported else order


def cudnn_note(capability: tuple[int, int], cudnn: int | None) -> str | None:
    """Return a warning if the GPU's fastest kernel is excluded only because cuDNN is too old, or None."""
    if capability not in CUDNN_GPUS or (cudnn is not None and cudnn >= FIRST_CUDNN):
        return None
    return (
        "torch has no cuDNN 9.15.1 or later: attention uses FlashAttention 2's kernel, which is slower on "
        "this GPU.\n"
        "  Install torch for CUDA 13, which includes a newer one."
    )


def attend_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Run scaled_dot_product_attention on B N L D with a bias, B N L S or broadcastable to it, in q's dtype.

    cuDNN's kernel, which torch prefers on Hopper, is excluded: its gradients may be NaN, and
    it is planned again for every length of a text.
    """
    if not is_on_cuda(q):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    order = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return attend_in_order(q, k, v, bias, order=order, scale=scale)


def attend_in_order(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    order: list[SDPBackend],
    scale: float | None = None,
) -> Tensor:
    """Run scaled_dot_product_attention on B N L D with only the given kernels, in the given order.

    `scale` multiplies the scores; None means 1/sqrt(D). The context manager costs about 40 microseconds on
    the host, and nothing under torch.compile, which runs it while tracing.
    """
    with sdpa_kernel(order, set_priority=True):
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _cudnn_version() -> int | None:
    """Return cuDNN's version; None if results must be deterministic, because cuDNN's backward pass is not."""
    return None if torch.are_deterministic_algorithms_enabled() else torch.backends.cudnn.version()


# Both are constants to torch.compile. torch.compiler.assume_constant_result sets the same mark, but imports
# the whole compiler.
for _fact in (_capability, _cudnn_version):
    _fact._dynamo_marked_constant = True  # type: ignore[union-attr]


def _attend_by_matmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Compute attention on B N L D with two matrix products and a softmax."""
    # For few tokens in 16 bits, this is 2 to 5 times as fast on a CPU as PyTorch's kernels.
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return weights.to(v.dtype) @ v
