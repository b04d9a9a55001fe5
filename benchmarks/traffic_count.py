"""Count what the operators of a dry run compute, read and write: `Counting`, used by benchmarks/traffic.py.

Rules: an operator is one kernel, which reads each operand once and writes each result once. Views cost
nothing, of an expanded tensor only the elements that exist are read, and in-place operators read and write.
Attention and RMSNorm are the stand-ins of runtime/planning/kernels.py.
"""

import re
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = str(Path(__file__).resolve().parent.parent)
OURS_BUT_NOT_THE_MODEL = tuple(
    f"{ROOT}/{name}" for name in ("runtime/planning/", "training/planning/", "benchmarks/traffic", ".venv/")
)

FORWARD, AGAIN, BACKWARD = "forward", "again", "backward"
ATTENTION, PRODUCT, THIN, NORM, CAST, ELEMENTWISE, COPY = (
    *("attention", "matrix products", "thin products", "norms", "casts", "elementwise", "copies"),
)
GROUPS = (ATTENTION, PRODUCT, THIN, NORM, CAST, ELEMENTWISE, COPY)
FUSIBLE = (NORM, CAST, ELEMENTWISE, COPY)  # what a compiler merges with its neighbors
THIN_WIDTH = 256  # a product with a side of at most so many numbers is bound by memory

FREE = re.compile(
    r"aten::(empty|new_empty|empty_like|empty_strided|new_empty_strided|_unsafe_view|detach|lift_fresh|"
    r"_local_scalar_dense|set_|resize_)(\.|$)|planned::attention_workspace|profiler::|prim::"
)
PRODUCTS = re.compile(r"aten::(mm|addmm|bmm|baddbmm|_scaled_mm|convolution|mkldnn_convolution|_convolution)")
NORMS = re.compile(r"aten::(native_(layer|group|batch)_norm|_fused_rms_norm)|planned::rms_norm")
COPIES = re.compile(
    r"aten::(clone|copy_|cat|stack|index_select|index|gather|constant_pad_nd|zeros|zeros_like|new_zeros|"
    r"fill_|zero_|full|full_like|slice_backward|select_backward|slice_scatter|select_scatter|repeat|"
    r"as_strided_scatter)(\.|$)"
)
WRITTEN_ONLY = re.compile(r"aten::(copy_|zero_|fill_)")  # in place, without a look at what was there

Span = tuple[int, int, int]  # number of a storage, offset, bytes


@dataclass(frozen=True)
class Operation:
    """One kernel."""

    phase: str
    group: str
    name: str
    line: str  # of our code that called it, or whose gradient it is
    operations: float  # floating-point operations of products and attention
    reads: tuple[Span, ...]
    writes: tuple[Span, ...]

    @property
    def size(self) -> int:
        """Bytes read and written."""
        return sum(size for _, _, size in (*self.reads, *self.writes))


class Counting(TorchDispatchMode):
    """While active inside a dry run, records every operator on its device in `operations`.

    Run the forward pass under `torch.autograd.set_detect_anomaly(True, check_nan=False)`: then operators of
    the backward pass have the line of the forward pass whose gradient they compute.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.operations: list[Operation] = []
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name()
        if func.is_view or FREE.match(name):
            return result
        given = {key: value for key, value in kwargs.items() if key != "out"}
        inputs, outputs = self._on_device((args, given)), self._on_device(result)
        if not inputs and not outputs:
            return result
        reads = self._spans(inputs[1:] if WRITTEN_ONLY.match(name) else inputs)
        writes = self._spans(outputs)
        phase, line = where()
        work = count_operations(func, args, kwargs, result)
        group = _group(name, inputs, outputs)
        self.operations.append(Operation(phase, group, name, line, work, reads, writes))
        return result

    def _on_device(self, tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.device == self.device]

    def _spans(self, tensors: Iterable[Tensor]) -> tuple[Span, ...]:
        """Return what the tensors occupy in memory, equal ones once."""
        return tuple(
            dict.fromkeys(
                (self._number(each), each.storage_offset(), real_size(each))
                for each in tensors
                if each.numel()
            )
        )

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        known = self._storages.get(id(storage))
        if known is None or known[0]() is not storage:
            self._count += 1
            known = self._storages[id(storage)] = (weakref.ref(storage), self._count)
        return known[1]


def real_size(tensor: Tensor) -> int:
    """Return the bytes of the elements that exist: an expanded axis counts once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def _group(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    if name.startswith("planned::attention"):
        return ATTENTION
    if PRODUCTS.match(name):
        matrices = [each for each in inputs if each.ndim > 1]
        sides = [side for each in matrices[-2:] for side in each.shape[-2:]]
        return THIN if min(sides) <= THIN_WIDTH and "convolution" not in name else PRODUCT
    if NORMS.match(name):
        return NORM
    if name.startswith("aten::_to_copy"):
        return CAST if not inputs or inputs[0].dtype != outputs[0].dtype else COPY
    return COPY if COPIES.match(name) else ELEMENTWISE


def where() -> tuple[str, str]:
    """Return the phase of the step, and the line of our code that an operator belongs to."""
    names, is_again = list[str](), False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.endswith("torch/autograd/graph.py"):  # outside is what called `backward`
            break
        is_again = is_again or path.endswith("torch/utils/checkpoint.py")
        if len(names) < 2 and _is_model(path):
            names.append(_short(path, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    if torch._C._current_graph_task_id() == -1:
        return FORWARD, _line(names)
    return (AGAIN, _line(names)) if is_again else (BACKWARD, _line(names or list(_lines_of_node())))


def _lines_of_node() -> Iterator[str]:
    """Yield our lines that made the graph's node that is running now, innermost first."""
    node = torch._C._current_autograd_node()
    for entry in reversed(node.metadata.get("traceback_", []) if node is not None else []):
        found = re.match(r'\s*File "(.+)", line (\d+), in (\S+)', entry)
        if found and _is_model(found[1]):
            yield _short(found[1], int(found[2]), found[3])


def _is_model(path: str) -> bool:
    return path.startswith(ROOT) and not path.startswith(OURS_BUT_NOT_THE_MODEL)


def _short(path: str, line: int, name: str) -> str:
    return f"{path.removeprefix(ROOT + '/')}:{line} {name}"


def _line(names: list[str]) -> str:
    return " < ".join(names[:2]) or "autograd"


def fused(operations: Iterable[Operation]) -> Iterator[Operation]:
    """Yield operations, with neighbors that a compiler could merge as one: an estimate.

    What such a group computes and only itself reads is neither written nor read; what it reads, it reads
    once.
    """
    groups = list[list[Operation]]()
    for operation in operations:
        joins = bool(groups) and groups[-1][-1].group in FUSIBLE and operation.group in FUSIBLE
        if joins and groups[-1][-1].phase == operation.phase:
            groups[-1].append(operation)
        else:
            groups.append([operation])
    last = {number: index for index, group in enumerate(groups) for one in group for number, *_ in one.reads}
    for index, group in enumerate(groups):
        if group[0].group not in FUSIBLE:
            yield group[0]
            continue
        made, reads, writes = set[int](), dict[Span, None](), dict[int, Span]()
        for one in group:
            reads |= {span: None for span in one.reads if span[0] not in made}
            made |= {number for number, *_ in one.writes}
            writes |= {span[0]: span for span in one.writes if last.get(span[0], index) > index}
        yield Operation(
            group[0].phase, ELEMENTWISE, "fused", f"{len(group)} operators", 0, (*reads,), (*writes.values(),)
        )


def count_operations(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> float:
    """Return the floating-point operations of a product or an attention; 0 for other operators."""
    name = func.name()
    if name in {"planned::attention", "planned::attention_backward"}:
        query, key = args[1:3] if "backward" in name else args[:2]
        batch, length, heads, width = query.shape
        # backward: the products q k and p v again as five; arXiv 2307.08691
        return (10.0 if "backward" in name else 4.0) * batch * length * key.shape[1] * heads * width
    aten = torch.ops.aten
    in_place = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}  # which torch does not count
    packet = func._overloadpacket
    count = flop_registry.get(in_place.get(packet, packet))
    return float(count(*args, **kwargs, out_val=result)) if count is not None else 0.0
