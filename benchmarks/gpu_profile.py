"""Where the time of a step goes: the kernels of a profile in a few groups."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

ATTENTION, PRODUCTS, THIN = "attention", "matrix products", "thin products (LoRA)"
ELEMENTWISE, COPIES, IDLE, OTHER = "elementwise and norms", "copies", "host gaps (device idle)", "other"
GROUPS = (ATTENTION, PRODUCTS, THIN, ELEMENTWISE, COPIES, OTHER)
THIN_SIDE = 128  # the largest rank of a LoRA; a matrix with a smaller side does little work per byte
LARGEST = 20  # kernels listed
# kernels and operators by parts of their names; the first pattern that fits counts
NAMES = (
    # inductor's own kernels have the names of all operators that they touch, attention's too
    (ELEMENTWISE, r"^triton_(poi|red|per)_"),
    (PRODUCTS, r"^triton_(tem|mm)_"),
    (COPIES, r"memcpy|memset|aten::copy_$|aten::_to_copy$"),
    (ATTENTION, r"flash|fmha|sdpa|scaled_dot_product|efficient_attention|_attention_|sage"),
    (
        PRODUCTS,
        r"gemm|nvjet|cutlass|xmma|cublas|matmul|splitk|conv(?!ert)|wgrad|dgrad"
        r"|aten::(addmm|mm|bmm|baddbmm|linear|_scaled_mm|mkldnn)",
    ),
    (
        ELEMENTWISE,
        r"elementwise|triton_|norm|reduce|softmax|foreach|multi_tensor|index|scatter|gather|cat|fill|scan|sort"
        r"|aten::(add|mul|div|sub|sum|mean|neg|exp|log|pow|sqrt|rsqrt|silu|gelu|sigmoid|tanh|where|stack|var"
        r"|square|clamp|lerp|random|normal|arange|zero|clone|select|slice|embedding|native|amax|abs|ones|empty)",
    ),
)
PATTERNS = tuple((group, re.compile(pattern, re.IGNORECASE)) for group, pattern in NAMES)
MATRICES = re.compile(r"aten::(addmm|mm|bmm|baddbmm|linear|_scaled_mm)")


@dataclass(frozen=True)
class Kernel:
    """A kernel that ran on the device, or an operator's own time on a CPU. Times are in microseconds."""

    name: str
    start: float
    end: float
    operator: str = ""  # that asked for it
    shapes: tuple[tuple[int, ...], ...] = ()  # of its inputs
    size: int = 0  # bytes that it moved, as far as is known

    @property
    def time(self) -> float:
        """Duration in microseconds."""
        return self.end - self.start


@dataclass(frozen=True)
class Profile:
    """Kernels of some calls, and the microseconds from the first to the last."""

    kernels: Sequence[Kernel]
    wall: float
    busy: float  # in which at least one kernel ran


@dataclass
class Sum:
    """Totals of equal kernels, or of a group."""

    time: float = 0.0
    count: int = 0
    size: int = 0
    names: dict[str, float] = field(default_factory=dict)

    def add(self, kernel: Kernel) -> None:
        """Add a kernel to the totals."""
        self.time += kernel.time
        self.count += 1
        self.size += kernel.size
        self.names[kernel.name] = self.names.get(kernel.name, 0.0) + kernel.time


def classify_kernel(kernel: Kernel) -> str:
    """Return the group of a kernel, by its name or by that of the operator that started it.

    A matrix product is thin if one of its sides is at most 128, which is a LoRA's rank in a transformer.
    """
    found = next((group for group, pattern in PATTERNS if pattern.search(kernel.name)), OTHER)
    if found == OTHER:
        found = next((group for group, pattern in PATTERNS if pattern.search(kernel.operator)), OTHER)
    return THIN if found == PRODUCTS and is_thin(kernel) else found


def is_thin(kernel: Kernel) -> bool:
    """Return whether a product's matrices have a side of at most 128; products with a vector do not count."""
    if not MATRICES.match(kernel.operator or kernel.name):
        return False
    matrices = [shape for shape in kernel.shapes if len(shape) >= 2]
    sides = [side for shape in matrices for side in shape[-2:]]
    return len(matrices) >= 2 and 1 < min(sides) <= THIN_SIDE


def busy_time(kernels: Iterable[Kernel]) -> float:
    """Return the microseconds in which at least one of the kernels ran; streams may overlap."""
    found, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda each: each.start):
        found += max(kernel.end - max(kernel.start, until), 0.0)
        until = max(until, kernel.end)
    return found


def sums_by(kernels: Iterable[Kernel], key: Callable[[Kernel], str]) -> dict[str, Sum]:
    """Add up the kernels with the same key, the largest sum first."""
    sums: dict[str, Sum] = {}
    for kernel in kernels:
        sums.setdefault(key(kernel), Sum()).add(kernel)
    return dict(sorted(sums.items(), key=lambda item: -item[1].time))


def report(found: Profile, calls: int) -> str:
    """Return the tables of a profile: the groups, then the largest kernels. Times are per call."""
    groups = sums_by(found.kernels, classify_kernel)
    lines = ["| group | ms a step | share | kernels | GB/s | largest |", "|---|---|---|---|---|---|"]
    for name in GROUPS:
        if name in groups:
            one = groups[name]
            largest = max(one.names, key=lambda each: one.names[each])
            lines.append(_line(name, one, found.wall, calls, f" {short(largest)} |"))
    idle = max(found.wall - found.busy, 0.0)
    lines.append(f"| {IDLE} | {idle / 1e3 / calls:.2f} | {idle / max(found.wall, 1e-9):.1%} | - | - | - |")
    lines.append(f"| all | {found.wall / 1e3 / calls:.2f} | 100.0% | {len(found.kernels) // calls} | - | - |")
    lines += ["", "| kernel | ms a step | share | runs | GB/s | group |", "|---|---|---|---|---|---|"]
    for name, one in list(
        sums_by(found.kernels, lambda kernel: f"{classify_kernel(kernel)}\n{kernel.name}").items()
    )[:LARGEST]:
        group, kernel = name.split("\n", 1)
        lines.append(_line(short(kernel), one, found.wall, calls, f" {group} |"))
    return "\n".join(lines)


def _line(name: str, one: Sum, wall: float, calls: int, rest: str) -> str:
    moved = f"{one.size / one.time / 1e3:.0f}" if one.size and one.time else "-"
    share = one.time / max(wall, 1e-9)
    return f"| {name} | {one.time / 1e3 / calls:.2f} | {share:.1%} | {one.count // calls} | {moved} |{rest}"


def short(name: str, length: int = 80) -> str:
    """Return a kernel's name, shortened for a table."""
    plain = name.replace("|", "/").replace("\n", " ")
    return plain if len(plain) <= length else f"{plain[: length - 3]}..."


# From torch's profiler


def profile_calls(call: Callable[[], object], calls: int, device: torch.device) -> Profile:
    """Profile some calls; earlier calls have compiled and allocated what is needed."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    if cuda:
        torch.cuda.synchronize(device)
    with profile(activities=activities, record_shapes=True) as found:
        for _ in range(calls):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    if cuda:
        assert found.profiler is not None
        assert found.profiler.kineto_results is not None
        return read_device(found.profiler.kineto_results.events())
    return read_cpu(found.events() or [])


def read_device(events: Sequence[Any]) -> Profile:
    """Join the kernels of a device with the operators that started them.

    `events` are those of the profiler (torch._C._autograd._KinetoEvent); those of releases after 2.11 contain
    more, which is not needed.
    """
    operators = {
        event.correlation_id(): event
        for event in events
        if _is_on_cpu(event.device_type()) and not event.linked_correlation_id() and event.shapes()
    }
    kernels = [
        _kernel(event, operators.get(event.linked_correlation_id()))
        for event in events
        if not _is_on_cpu(event.device_type()) and not _is_annotation(event)
    ]
    if not kernels:
        return Profile((), 0.0, 0.0)
    wall = max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)
    return Profile(kernels, wall, busy_time(kernels))


def _kernel(event: Any, operator: Any) -> Kernel:
    name, start, end = event.name(), event.start_ns() / 1e3, event.end_ns() / 1e3
    if operator is None:
        return Kernel(name, start, end)
    shapes = _shapes(operator.shapes())
    types = operator.dtypes() if hasattr(operator, "dtypes") else ()
    size = 0 if MATRICES.match(operator.name()) else _bytes(operator.shapes(), types)
    return Kernel(name, start, end, operator.name(), shapes, size)


def read_cpu(events: Sequence[Any]) -> Profile:
    """Return the CPU's operators with their own times. `events` are FunctionEvents."""
    kernels = _operators(events)
    if not kernels:
        return Profile((), 0.0, 0.0)
    start = min(event.time_range.start for event in events)
    wall = max(event.time_range.end for event in events) - start
    return Profile(kernels, wall, min(sum(kernel.time for kernel in kernels), wall))


def _operators(events: Sequence[Any]) -> list[Kernel]:
    found = []
    for event in events:
        own = event.self_cpu_time_total
        if own > 0:
            start = event.time_range.start
            shapes = _shapes(event.input_shapes or ())
            found.append(Kernel(event.name, start, start + own, event.name, shapes))
    return found


def _is_on_cpu(device_type: Any) -> bool:
    return str(device_type).endswith("CPU")


def _is_annotation(event: Any) -> bool:
    """Return whether an event is not a kernel, but a named range of the program."""
    return bool(event.is_user_annotation()) if hasattr(event, "is_user_annotation") else False


def _shapes(given: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of tensors among the inputs of an operator."""
    return tuple(
        tuple(shape)
        for shape in given
        if isinstance(shape, list | tuple) and all(isinstance(n, int) for n in shape)
    )


ITEM_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4}


def _bytes(shapes: Sequence[Sequence[int]], types: Sequence[str]) -> int:
    """Return the bytes of an operator's inputs, its minimum to read; 0 if their types are not known."""
    if len(types) != len(shapes):
        return 0
    found = 0
    for shape, kind in zip(shapes, types, strict=True):
        if shape and kind in ITEM_BYTES:
            size = ITEM_BYTES[kind]
            for side in shape:
                size *= side
            found += size
    return found
