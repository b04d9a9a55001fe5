"""The one door to attention. Back ends are a table; models call `attend` and know none of them."""
# Letters: B batch, L query tokens, S key tokens, N heads, D head width

from collections.abc import Callable

import torch
import torch.nn.functional as functional
from torch import Tensor

from modules.errors import OptionError

Backend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # query, key, value, key lengths -> result


def attend(query: Tensor, key: Tensor, value: Tensor, mode: str = "sdpa", lengths: Tensor | None = None) -> Tensor:
    """Softmax attention, scaled by 1/sqrt(D), in the dtype of the inputs (under autocast in its dtype).

    query: B L N D. key, value: B S N D. lengths: B, how many keys of each sample are real; the rest are not looked at.
    Returns B L N D. Raises OptionError for a back end that is not there.
    """
    return backend(mode)(query, key, value, lengths)


def backend(mode: str) -> Backend:
    """The back end of that name, for checking an option before anything is loaded. Raises OptionError."""
    if mode not in BACKENDS:
        raise OptionError(f"attention {mode} is not supported yet. Use one of: {', '.join('--' + name for name in BACKENDS)}.")
    return BACKENDS[mode]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None) -> Tensor:
    mask = None
    if lengths is not None:
        mask = torch.arange(key.shape[1], device=key.device) < lengths[:, None].to(key.device)
        mask = mask[:, None, None, :]  # B 1 1 S
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))  # B N L D
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


BACKENDS: dict[str, Backend] = {"sdpa": _sdpa}
