"""Join the frozen weights of layers with the same input in memory, so that one product computes all layers.

Each module keeps its own parameter, which becomes a view of the joined memory. Code that replaces, moves or
reads a weight need not know this: each pass checks by memory address whether the weights are still
adjacent.
"""
# Letters: P parts, M rows of all samples, R rank of a part, C width of a part's output

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Maximum number of values of all outputs. They share memory, which is freed only with the last of them. With
# more values, a GPU computes for longer than the host needs to launch kernels, so that nothing is gained.
MAX_JOINED = 1 << 26


@torch.no_grad()
def join_weights(modules: Sequence[nn.Linear | nn.Conv2d], device: torch.device) -> None:
    """Make the weights of linear modules adjacent in memory, for a single product; biases too.

    Modules are unchanged if their weights are on another device, are views of a larger storage, or have
    different dtypes.

    Args:
        modules: Frozen modules that get the same tensor.
        device: Device that the weights must be on.
    """
    if not all(type(module) is nn.Linear and not module.weight.requires_grad for module in modules):
        return
    weights = [module.weight for module in modules]
    biases = [module.bias for module in modules if module.bias is not None]
    if not _can_be_joined(weights, biases, device):
        return
    _move_to_one_storage(weights)
    if biases:
        _move_to_one_storage(biases)


def _move_to_one_storage(parameters: Sequence[Tensor]) -> None:
    """Copy parameters to one tensor, of which each then is a view."""
    joined = torch.cat([parameter.data for parameter in parameters])
    views = joined.split([len(parameter) for parameter in parameters])
    for parameter, view in zip(parameters, views, strict=True):
        parameter.data = view


def _can_be_joined(weights: Sequence[Tensor], biases: Sequence[Tensor], device: torch.device) -> bool:
    """Return whether weights and biases of several modules can be joined in memory on a device."""
    all_or_none_have_biases = len(biases) in (0, len(weights))
    tensors = [*weights, *biases]
    dtype = weights[0].dtype
    # weights in other dtypes are cast in each pass, so joining them would not help
    is_half = dtype in (torch.bfloat16, torch.float16)
    are_alike = all(tensor.device == device and tensor.dtype == dtype for tensor in tensors)
    have_equal_inputs = len({weight.shape[1:] for weight in weights}) == 1
    return (
        all_or_none_have_biases
        and is_half
        and are_alike
        and have_equal_inputs
        and all(
            (tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes)
            for tensor in tensors
        )
    )


def view_as_one_matrix(tensors: Sequence[Tensor]) -> Tensor | None:
    """Return a view of the rows of all tensors as one matrix if they are adjacent in memory; else None."""
    first = tensors[0]
    storage = first.untyped_storage()._cdata  # not a pointer to data, which tensors of a plan do not have
    end = first.storage_offset()  # end of the previous tensors in the storage
    num_rows = 0
    for tensor in tensors:
        is_adjacent = tensor.storage_offset() == end and tensor.untyped_storage()._cdata == storage
        if not (is_adjacent and tensor.dtype == first.dtype and tensor.is_contiguous()):
            return None
        if tensor.shape[1:] != first.shape[1:]:
            return None
        end += tensor.numel()
        num_rows += len(tensor)
    return first.detach().as_strided((num_rows, *first.shape[1:]), first.stride())


def add_products(total: Tensor, left: Tensor, right: Tensor, sizes: Sequence[int]) -> None:
    """Add the product of each part to its columns of `total`, in place.

    Args:
        total: Tensor to add to, M x (C of all parts), contiguous.
        left: Left matrices side by side, M x P R for P parts.
        right: Right matrices, transposed and stacked vertically, (C of all parts) x R.
        sizes: Number of columns C of each part; if all are equal, one batched product computes all parts.
    """
    count = len(sizes)
    if len(set(sizes)) == 1:
        left_batch = _unstack_columns(left, count)
        right_batch = _unstack_rows(right, count)
        _unstack_columns(total, count).baddbmm_(left_batch, right_batch.mT)
        return
    parts = zip(total.split(sizes, -1), left.chunk(count, -1), right.split(sizes), strict=True)
    for total_part, left_part, right_part in parts:
        total_part.addmm_(left_part, right_part.t())


def multiply_parts(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return left @ right for each part, side by side: M x P R for P parts.

    Args:
        left: Left matrices side by side, M x (C of all parts).
        right: Right matrices stacked vertically, (C of all parts) x R.
        sizes: Width C of each part's left matrix.
    """
    count = len(sizes)
    rank = right.shape[1]
    product = left.new_empty((len(left), count * rank))
    if len(set(sizes)) == 1:
        left_batch = _unstack_columns(left, count)
        right_batch = _unstack_rows(right, count)
        torch.bmm(left_batch, right_batch, out=_unstack_columns(product, count))
        return product
    parts = zip(left.split(sizes, -1), right.split(sizes), product.split(rank, -1), strict=True)
    for left_part, right_part, target in parts:
        torch.mm(left_part, right_part, out=target)
    return product


def multiply_transposed(left: Tensor, right: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return left^T @ right for each part, stacked vertically: (C of all parts) x R.

    Args:
        left: Left matrices side by side, M x (C of all parts).
        right: Right matrices side by side, M x P R for P parts.
        sizes: Width C of each part's left matrix.
    """
    count = len(sizes)
    if len(set(sizes)) == 1:
        return torch.bmm(_unstack_columns(left, count).mT, _unstack_columns(right, count)).flatten(0, 1)
    product = left.new_empty((left.shape[1], right.shape[1] // count))
    parts = zip(left.split(sizes, -1), right.chunk(count, -1), product.split(sizes), strict=True)
    for left_part, right_part, target in parts:
        torch.mm(left_part.t(), right_part, out=target)
    return product


def _unstack_columns(matrix: Tensor, count: int) -> Tensor:
    """Return horizontally stacked matrices, M x P C, as a view P x M x C."""
    return matrix.unflatten(-1, (count, -1)).transpose(0, 1)


def _unstack_rows(matrix: Tensor, count: int) -> Tensor:
    """Return vertically stacked matrices, P C x R, as a view P x C x R."""
    return matrix.unflatten(0, (count, -1))
