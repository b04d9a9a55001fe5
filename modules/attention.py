"""The one door to attention. Back ends are a table; models call `attend` and know none of them."""
# Letters: B batch, L query tokens, S key tokens, N heads, D head width

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from modules.errors import OptionError

WRITTEN_OUT = 256 * 256  # queries x keys up to which a CPU in 16 bit does without PyTorch's attention kernels

Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]  # query, key, value, lengths, repeats -> result


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mode: str = "sdpa",
    lengths: Tensor | None = None,
    repeats: Tensor | None = None,
) -> Tensor:
    """Softmax attention, scaled by 1/sqrt(D), in the dtype of the inputs (under autocast in its dtype).

    query: B L N D. key, value: B S N D. lengths: B, how many keys of each sample are real; the rest are not looked at.
    repeats: S float32, for how many equal keys each key stands; not together with lengths.
    Returns B L N D. Raises OptionError for a back end that is not there.
    """
    return backend(mode)(query, key, value, lengths, repeats)


def backend(mode: str) -> Backend:
    """The back end of that name, for checking an option before anything is loaded. Raises OptionError."""
    if mode not in BACKENDS:
        raise OptionError(f"attention {mode} is not supported yet. Use one of: {', '.join('--' + name for name in BACKENDS)}.")
    return BACKENDS[mode]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, repeats: Tensor | None) -> Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # B N L D
    mask = None
    if lengths is not None:
        mask = torch.arange(key.shape[1], device=key.device) < lengths[:, None].to(key.device)
        mask = mask[:, None, None, :]  # B 1 1 S
    if repeats is not None:
        mask = repeats.log().expand(1, 1, query.shape[1], -1)  # n equal keys: n exp(x) = exp(x + log n)
    if lengths is None and query.device.type == "cpu" and query.dtype.itemsize < 4 and q.shape[2] * k.shape[2] <= WRITTEN_OUT:
        return _written_out(q, k, v, mask).transpose(1, 2)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The same as matrix products, B N L D. For few tokens in 16 bit on a CPU two to five times faster than PyTorch's kernels."""
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return weights.to(v.dtype) @ v


BACKENDS: dict[str, Backend] = {"sdpa": _sdpa}
