"""Frozen weights of layers with a common input, one below another in memory: one product computes them all.

Each module keeps its own parameter, which becomes a view. So code that replaces a weight, moves it or reads
it needs not know of this: whether weights still lie together is asked of their addresses in each pass.
"""
# Letters: P parts, M rows of all samples, R rank of a part, C width of a part's output

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Largest number of values of the outputs together, in one memory, which is freed with the last of them. Where
# there are more, a GPU computes for longer than the host needs for its kernels.
MAX_JOINED = 1 << 26


@torch.no_grad()
def join_weights(modules: Sequence[nn.Linear | nn.Conv2d], device: torch.device) -> None:
    """Put the weights of linear modules, and their biases, one below another in memory.

    Modules whose weights are elsewhere, are parts of a larger piece of memory or have different dtypes stay
    as they are.

    Args:
        modules: Frozen modules that get the same tensor.
        device: Device that the weights must be on.
    """
    if not all(type(module) is nn.Linear and not module.weight.requires_grad for module in modules):
        return
    weights = [module.weight for module in modules]
    biases = [module.bias for module in modules if module.bias is not None]
    if len(biases) not in (0, len(modules)):
        return
    tensors: list[Tensor] = [*weights, *biases]
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    dtype = weights[0].dtype
    # other dtypes are not those of a pass, and cost a cast of each weight
    if dtype not in (torch.bfloat16, torch.float16) or kinds != {(device, dtype)}:
        return
    if len({weight.shape[1:] for weight in weights}) > 1:
        return
    if not all(_is_alone(tensor) for tensor in tensors):
        return
    for group in (weights, biases):
        if group:
            parts = torch.cat([each.data for each in group]).split([len(each) for each in group])
            for parameter, part in zip(group, parts, strict=True):
                parameter.data = part


def _is_alone(tensor: Tensor) -> bool:
    """Return whether a tensor has its memory for itself."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return one tensor of all rows of tensors that lie one below another in memory, else None."""
    first = tensors[0]
    memory = first.untyped_storage().data_ptr()
    end = first.storage_offset()
    rows = 0
    for tensor in tensors:
        is_next = tensor.storage_offset() == end and tensor.untyped_storage().data_ptr() == memory
        if not (is_next and tensor.dtype == first.dtype and tensor.is_contiguous()):
            return None
        if tensor.shape[1:] != first.shape[1:]:
            return None
        end += tensor.numel()
        rows += len(tensor)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def add_products(total: Tensor, left: Tensor, right: Tensor, sizes: Sequence[int]) -> None:
    """Add to the columns of each part the product of its columns of `left` and its rows of `right`, in place.

    Args:
        total: Tensor to add to, M x (C of all parts), contiguous.
        left: Left matrices side by side, M x P R.
        right: Right matrices, transposed, one below another, (C of all parts) x R.
        sizes: Sizes C of the parts.
    """
    if len(set(sizes)) == 1:
        _parts(total, len(sizes)).baddbmm_(_parts(left, len(sizes)), _stack(right, len(sizes)).mT)
        return
    columns = zip(total.split(sizes, -1), left.chunk(len(sizes), -1), right.split(sizes), strict=True)
    for part, factor, rows in columns:
        part.addmm_(factor, rows.t())


def multiply_parts(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the product of each part, side by side, M x P R.

    Args:
        left: Left matrices side by side, M x (C of all parts).
        right: Right matrices one below another, (C of all parts) x R.
        sizes: Sizes C of the parts.
    """
    rank = right.shape[1]
    product = left.new_empty((len(left), len(sizes) * rank))
    if len(set(sizes)) == 1:
        torch.bmm(_parts(left, len(sizes)), _stack(right, len(sizes)), out=_parts(product, len(sizes)))
        return product
    columns = zip(left.split(sizes, -1), right.split(sizes), product.split(rank, -1), strict=True)
    for part, rows, target in columns:
        torch.mm(part, rows, out=target)
    return product


def multiply_transposed(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return left^T times right of each part, one below another, (C of all parts) x R.

    Args:
        left: Left matrices side by side, M x (C of all parts).
        right: Right matrices side by side, M x P R.
        sizes: Sizes C of the parts.
    """
    count = len(sizes)
    if len(set(sizes)) == 1:
        return torch.bmm(_parts(left, count).mT, _parts(right, count)).flatten(0, 1)
    product = left.new_empty((left.shape[1], right.shape[1] // count))
    columns = zip(left.split(sizes, -1), right.chunk(count, -1), product.split(sizes), strict=True)
    for part, factor, target in columns:
        torch.mm(part.t(), factor, out=target)
    return product


def _parts(matrix: Tensor, count: int) -> Tensor:
    """Return a view of matrices side by side, M x P C, as P M C."""
    return matrix.unflatten(-1, (count, -1)).transpose(0, 1)


def _stack(matrix: Tensor, count: int) -> Tensor:
    """Return a view of matrices one below another, P C x R, as P C R."""
    return matrix.unflatten(0, (count, -1))
