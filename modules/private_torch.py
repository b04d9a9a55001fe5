"""Collect all private names of torch that this project uses, to check them in one place at new releases.

Slow imports are inside functions.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as disable_dynamo  # torch.compiler.disable imports Dynamo at once
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.optim import Optimizer
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as disable_modes
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "READ_NUMBER",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "copy_each",
    "disable_dynamo",
    "disable_modes",
    "dynamo",
    "exchange_rows",
    "function_modes",
    "has_cpp_compiler",
    "has_triton",
    "has_triton_package",
    "int8_product",
    "lerp_each",
    "release_host_cache",
    "scale_each",
    "scaled_product",
    "shape_config",
    "tree_leaves",
    "tree_map_only",
    "unset_fake_temporarily",
    "without_dynamo",
]

_EXCLUDED = "__dynamo_disable"  # attribute with what `_disable_dynamo` calls, set at its first call
READ_NUMBER = torch.ops.aten._local_scalar_dense.default  # what `Tensor.item` calls


def scaled_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, **settings: Any) -> Tensor:
    """Multiply 8-bit matrices with scales; `settings` are further arguments of torch's `_scaled_mm`."""
    # not functional.scaled_mm, which torch 2.10 and 2.11 do not compile (pytorch/pytorch#180604)
    return torch._scaled_mm(a, b, scale_a, scale_b, **settings)


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two int8 matrices and return the int32 product, M N.

    CUDA requires more than 16 rows, and sizes that are multiples of 32 (Turing) or 8 (later GPUs), so
    matrices are padded with zeros on CUDA.

    Args:
        a: Left matrix, M K.
        b: Right matrix, K N, column-major.
    """
    rows = a.shape[0]
    columns = b.shape[1]
    if a.device.type == "cuda":
        missing_rows = max(0, 17 - rows)  # `_int_mm` and cuBLAS require at least 17 rows
        missing_inner = -a.shape[1] % 32  # up to the next multiple of 32
        missing_columns = -columns % 32
        a = torch.nn.functional.pad(a, (0, missing_inner, 0, missing_rows))
        if missing_inner or missing_columns:
            b = torch.nn.functional.pad(b.t(), (0, missing_inner, 0, missing_columns)).t()
    return torch._int_mm(a, b)[:rows, :columns]


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into target tensors, whose dtypes may differ, with few kernel launches."""
    torch._foreach_copy_(list(targets), list(sources))


def scale_each(values: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Multiply each tensor by its factor in place, with few kernel launches."""
    torch._foreach_mul_(list(values), list(factors))


def lerp_each(values: list[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Interpolate each tensor towards its end by the fraction `weight`, in place."""
    torch._foreach_lerp_(values, list(ends), weight)


def exchange_rows(tensors: Sequence[Tensor], group: str) -> tuple[Tensor, ...]:
    """Send row i of each tensor, P ..., to process i of a group; return the rows that this process receives.

    `group` is the group's name. All rows are sent at the same time. Not differentiable. Unlike torch's public
    functions, it can be compiled.
    """
    functional = torch.ops._c10d_functional
    sent = [
        functional.all_to_all_single(tensor, [1] * len(tensor), [1] * len(tensor), group)
        for tensor in tensors
    ]
    return tuple(functional.wait_tensor(tensor) for tensor in sent)


def release_host_cache() -> None:
    """Release unused pinned host memory of torch's allocator; without CUDA there is none."""
    # public only from torch 2.10 on, as torch.accelerator.empty_host_cache; missing in builds without CUDA
    release = getattr(torch._C, "_host_emptyCache", None)
    if release is not None:
        release()


def dynamo() -> Any:
    """Import and return torch._dynamo, which takes seconds."""
    import torch._dynamo

    return torch._dynamo


@contextmanager
def without_dynamo() -> Iterator[None]:
    """Let optimizers be made in the block without importing torch._dynamo, as for a check that takes no step.

    Making one calls `add_param_group`, which torch wraps in a function that imports torch._dynamo once, to
    exclude it from compiled code.
    """
    wrapped: Any = getattr(Optimizer.add_param_group, "__wrapped__", None)
    if wrapped is None or "torch._dynamo" in sys.modules:
        yield
        return
    setattr(wrapped, _EXCLUDED, wrapped)
    try:
        yield
    finally:
        delattr(wrapped, _EXCLUDED)


def shape_config() -> Any:
    """Return torch's configuration module for dynamic shapes in compiled code."""
    from torch.fx.experimental import _config

    return _config


def has_cpp_compiler() -> bool:
    """Return whether torch's inductor finds a C++ compiler."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return False
    return True


def has_triton_package() -> bool:
    """Return whether Triton is installed, for any device."""
    from torch.utils import _triton

    return _triton.has_triton_package()


def has_triton() -> bool:
    """Return whether Triton is installed and supports this machine's device."""
    from torch.utils import _triton

    return _triton.has_triton()
