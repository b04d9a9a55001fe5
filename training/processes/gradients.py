"""Sum gradients over processes, once per optimizer step and in flat buffers; the model needs no wrapper."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

BUCKET_ELEMENTS = 64 << 20  # a LoRA fits into one buffer, a whole DiT is sent in pieces


def fill_missing_gradients(parameters: Iterable[Parameter]) -> None:
    """Set the gradient of parameters that no micro-batch of this step reached to zero.

    Whether a parameter was reached must not depend on how the micro-batches were spread over processes.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def norm_of_gradients(parameters: Iterable[Parameter]) -> Tensor:
    """Return the norm of all gradients together, in float32.

    For bf16 gradients torch itself would round it to 3 digits.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        return torch.nn.utils.get_total_norm(gradients)
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def sum_over_processes(parameters: list[Parameter], numbers: Tensor) -> Tensor:
    """Add up all gradients over the processes, in place; return the sums of `numbers` (float32, 1-D)."""
    sent = False
    for bucket in _buckets(parameters):
        gradients = [parameter.grad for parameter in bucket if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        extra = not sent and flat.dtype == numbers.dtype
        if extra:
            flat = torch.cat([flat, numbers])
        torch.distributed.all_reduce(flat)
        if extra:
            numbers, flat, sent = flat[-len(numbers) :].clone(), flat[: -len(numbers)], True
        for gradient, total in zip(
            gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
        ):
            gradient.copy_(total.view_as(gradient))
    if not sent:
        torch.distributed.all_reduce(numbers)
    return numbers


def is_any(value: bool, processes: int, device: torch.device) -> bool:
    """Return whether it is true in one of the processes. All must call it."""
    if processes == 1:
        return value
    count = torch.tensor(float(value), device=device)
    torch.distributed.all_reduce(count)
    return count.item() > 0


def largest(value: int, processes: int, device: torch.device) -> int:
    """Return the largest value among the processes. All must call it."""
    if processes == 1:
        return value
    number = torch.tensor(value, device=device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)


def _buckets(parameters: Iterable[Parameter]) -> Iterator[list[Parameter]]:
    """Yield runs of parameters of one dtype, each at most BUCKET_ELEMENTS long."""
    bucket: list[Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size + parameter.numel() > BUCKET_ELEMENTS or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket
