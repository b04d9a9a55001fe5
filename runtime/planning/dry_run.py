"""Run real code on fake tensors, and count the bytes that a device would need.

Inside `dry_run` tensors have shapes, dtypes, devices and storages with their usual lifetimes, but no values:
a step of a 14B model takes seconds and no memory. The device `ACCELERATOR` stands for the GPU, the plain CPU
for the host. Small integer tensors (text masks, lengths) do have values, so that code may read them.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modules.integers import round_up
from modules.layers.convolution import compute_piece
from modules.private_torch import (
    READ_NUMBER,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    tree_leaves,
    tree_map_only,
    unset_fake_temporarily,
)
from runtime.planning.kernels import ATTENTION_WORKSPACE, PlannedKernels

# torch treats it as a different device than plain `cpu`, and every build can compute on it
ACCELERATOR = torch.device("cpu:0")
HOST = torch.device("cpu")
GRANULE = 512  # CUDA's caching allocator rounds every allocation up to a multiple of this
MAX_REAL_ELEMENTS = 1 << 16  # integer tensors with at most this many elements keep their values

WEIGHTS, NETWORK, OPTIMIZER, GRADIENTS, BATCH = "weights", "network", "optimizer", "gradients", "batch"
ATTENTION = "attention"  # workspace of attention
TEXTS = "texts"  # weights of text encoders
ADAPTER = "adapter"  # trained LoRAs; the LoRAs of all transformers stay on the device
# all other tensors: allocated before the current phase of the run, or in it
ACTIVATIONS, TEMPORARY = "kept", "working"
BytesByKind = Mapping[str, int]  # bytes by kind


def round_up_bytes(size: int) -> int:
    """Round a size up to a multiple of the allocation granularity of CUDA's allocator."""
    return round_up(size, GRANULE)


@dataclass
class _Allocation:
    size: int
    kind: str
    phase_index: int  # phase in which it was allocated
    on_device: bool


class Ledger(TorchDispatchMode):
    """Tracks the bytes in use by kind, and the peak in each phase of the run.

    `begin_phase` begins a phase, such as the backward pass through a block.
    """

    def __init__(self, device: torch.device = ACCELERATOR) -> None:
        """Start without tensors.

        Args:
            device: Device whose tensors are counted.
        """
        super().__init__()
        self.device = device
        self.is_backward = False
        self.peaks: dict[str, BytesByKind] = {}  # phase of the run -> bytes by kind at its peak
        self._phase = "start"
        self._phase_index = 0
        self._kind = TEMPORARY  # kind of new tensors
        self._live_bytes: Counter[str] = Counter()  # TEMPORARY includes ACTIVATIONS
        self._bytes_of_phase = 0  # of TEMPORARY, allocated in this phase
        self._total = 0
        self._highest_total = 0  # highest total since `peak_increase` was last called
        self._allocations: dict[int, tuple[weakref.ref[Any], _Allocation]] = {}  # by id of the storage
        self._reads_unknown_as_one = False  # whether code that reads a number from a fake tensor gets 1
        self.block_counts: dict[str, int] = {}  # name of a list of blocks -> number of its blocks that run
        # name of a list of blocks -> bytes of the tokens that a block gets
        self.input_bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._reads_unknown_as_one and func is READ_NUMBER and isinstance(args[0], FakeTensor):
            return _read_as_one(args[0])
        result = _compute(func, args, kwargs or {}, self.device)
        kind = ATTENTION if func.name() == ATTENTION_WORKSPACE else None
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.track(leaf, kind)
        return result

    def begin_phase(self, phase: str) -> None:
        """Begin another phase of the run.

        From now on, live tensors without a kind count as kept from an earlier phase.
        """
        self._phase = phase
        self._phase_index += 1
        self._bytes_of_phase = 0
        self._update_peaks()

    def forget_peaks(self) -> None:
        """Forget the peaks before another phase is measured."""
        self.peaks = {}

    def peak_increase(self, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
        """Call `run`; return its result and the largest increase of the device's total, in bytes."""
        before, self._highest_total = self._total, self._total
        result = run()
        return result, self._highest_total - before

    @contextmanager
    def allocating(self, kind: str) -> Iterator[None]:
        """Count the tensors created in the `with` block as memory of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    @contextmanager
    def reading_unknown_as_one(self) -> Iterator[None]:
        """Let code inside read unknown tensor values as 1; only for code whose memory use ignores them."""
        before, self._reads_unknown_as_one = self._reads_unknown_as_one, True
        try:
            yield
        finally:
            self._reads_unknown_as_one = before

    def track(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage; if `kind` is given and the storage is known, change its kind."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._allocations:
            reference, known_allocation = self._allocations[key]
            is_same_storage = reference() is storage  # a new storage may have the id of a freed one
            if is_same_storage and kind is not None:
                self._add(known_allocation, -1)
                known_allocation.kind = kind
                self._add(known_allocation, 1)
            if is_same_storage:
                return
        allocation = _Allocation(
            round_up_bytes(storage.nbytes()),
            kind or self._kind,
            self._phase_index,
            tensor.device == self.device,
        )

        # called when the storage is freed
        def forget(_: Any) -> None:
            self._add(self._allocations.pop(key)[1], -1)

        self._allocations[key] = (weakref.ref(storage, forget), allocation)
        self._add(allocation, 1)
        self._update_peaks()

    @property
    def bytes_by_kind(self) -> BytesByKind:
        """Return the device's current bytes by kind."""
        bytes_by_kind = {kind: size for kind, size in self._live_bytes.items() if kind != TEMPORARY}
        return {
            **bytes_by_kind,
            ACTIVATIONS: self._live_bytes[TEMPORARY] - self._bytes_of_phase,
            TEMPORARY: self._bytes_of_phase,
        }

    def _add(self, allocation: _Allocation, sign: int) -> None:
        if not allocation.on_device:
            return
        self._live_bytes[allocation.kind] += sign * allocation.size
        self._total += sign * allocation.size
        if allocation.kind == TEMPORARY and allocation.phase_index == self._phase_index:
            self._bytes_of_phase += sign * allocation.size

    def _update_peaks(self) -> None:
        self._highest_total = max(self._highest_total, self._total)
        if self._total > sum(self.peaks.get(self._phase, {}).values()):
            self.peaks[self._phase] = self.bytes_by_kind


def _compute(func: Any, args: Any, kwargs: Any, device: torch.device) -> Any:
    """Run an operator on tensors; some of them are fake tensors, which have no values."""
    # 1. Real inputs give a real result, except for floating-point data that are copied to the device.
    # 2. Real and fake inputs give a fake result.
    # 3. An operator without inputs gives a real result if that is a small tensor of integers.
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
    if not tensors:
        return _create(func, args, kwargs)
    if not fakes:
        return _compute_real(func, args, kwargs, tensors, device)
    if len(fakes) < len(tensors):
        without_values = functools.partial(_drop_values, device=fakes[0].device)
        args, kwargs = tree_map_only(Tensor, without_values, (args, kwargs))
    return func(*args, **kwargs)


def _compute_real(func: Any, args: Any, kwargs: Any, tensors: list[Tensor], device: torch.device) -> Any:
    # a copy of floating-point data on the device needs only its size: values would take real memory
    goes_to_device = device != HOST and kwargs.get("device") == device
    if goes_to_device and any(tensor.is_floating_point() for tensor in tensors):
        dtype = kwargs.get("dtype") or tensors[0].dtype
        return torch.empty(tensors[0].shape, dtype=dtype, device=device)
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _drop_values(tensor: Tensor, device: torch.device) -> Tensor:
    if isinstance(tensor, FakeTensor):
        return tensor
    return torch.empty_like(tensor, device=device if tensor.ndim else HOST)


def _create(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator that creates a tensor; small integer tensors are real, because code reads them."""
    result = func(*args, **kwargs)
    is_small_integer_tensor = (
        isinstance(result, FakeTensor)
        and not result.dtype.is_floating_point
        and result.numel() <= MAX_REAL_ELEMENTS
    )
    if not is_small_integer_tensor:
        return result
    if "device" in kwargs:
        kwargs = {**kwargs, "device": HOST}  # values can only be on the host
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def modules_in(thing: object, depth: int = 4) -> Iterator[nn.Module]:
    """Yield the modules in an object: itself, or those among its attributes and the items of these."""
    if isinstance(thing, nn.Module):
        yield thing
    elif depth:
        parts = thing if isinstance(thing, tuple | list) else getattr(thing, "__dict__", {}).values()
        for part in parts:
            yield from modules_in(part, depth - 1)


class _ComputedPiece(NamedTuple):
    """Shapes and memory of the largest piece that `compute_piece` has computed, among pieces of one kind."""

    shape: torch.Size
    result_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    peak_increase: int  # bytes


class LargestPieceMode(TorchFunctionMode):
    """Make `compute_piece` compute only pieces larger than all earlier ones; others just get memory."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self._ledger = ledger
        self._computed: dict[tuple[Any, ...], _ComputedPiece] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch function; let `compute_piece` compute only the largest piece so far of each kind."""
        if func is not compute_piece:
            return func(*args, **(kwargs or {}))
        compute, piece = args
        kind = (compute, piece.shape[:-2], piece.dtype, piece.device)
        largest_piece = self._computed.get(kind)
        # only a piece larger than all before is computed; smaller ones get a share of its memory
        if largest_piece is None or piece.shape[-2:].numel() > largest_piece.shape[-2:].numel():
            result, peak_increase = self._ledger.peak_increase(lambda: compute(piece))
            self._computed[kind] = _ComputedPiece(
                shape=piece.shape,
                result_shape=result.shape,
                dtype=result.dtype,
                device=result.device,
                peak_increase=peak_increase,
            )
            return result
        return self._allocate_share(piece.shape, largest_piece)

    def _allocate_share(self, shape: torch.Size, computed: _ComputedPiece) -> Tensor:
        """Allocate and free the memory that computing a piece of this shape needs; return an empty result."""
        peak_increase = computed.peak_increase * shape.numel() // computed.shape.numel()
        memory = torch.empty(peak_increase, dtype=torch.uint8, device=self._ledger.device)
        del memory
        rows, columns = shape[-2:]
        computed_rows, computed_columns = computed.shape[-2:]
        result_rows, result_columns = computed.result_shape[-2:]
        result_shape = (
            *computed.result_shape[:-2],
            rows * result_rows // computed_rows,
            columns * result_columns // computed_columns,
        )
        return torch.empty(result_shape, dtype=computed.dtype, device=computed.device)


@contextmanager
def dry_run(device: torch.device = ACCELERATOR) -> Iterator[Ledger]:
    """Run the `with` block on fake tensors: memory is tracked, and nothing is computed.

    Args:
        device: Device on which the code inside computes.
    """
    ledger = Ledger(device)
    # the last mode is applied first, so that kernels inside pieces are replaced too
    with FakeTensorMode(allow_non_fake_inputs=True), PlannedKernels(), LargestPieceMode(ledger), ledger:
        yield ledger


def allocate_empty_weights(module: nn.Module, ledger: Ledger, kind: str = WEIGHTS) -> None:
    """Replace the tensors of a module by empty ones on the ledger's device, inside a dry run."""
    empty_tensors: dict[int, Tensor] = {}  # a tensor may have several names
    with ledger.allocating(kind):
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in empty_tensors:
                        empty_tensors[id(tensor)] = _empty_like(tensor, ledger.device)
                    tensors[name] = empty_tensors[id(tensor)]  # type: ignore[assignment]  # a parameter for a parameter


def _empty_like(tensor: Tensor, device: torch.device) -> Tensor:
    # a dry run keeps small integer tensors, with values, on the host: so 8-bit codes of stored weights are
    # allocated as floats and viewed as integers
    dtype = torch.float8_e4m3fn if tensor.dtype.itemsize == 1 else tensor.dtype
    empty = torch.empty(tensor.shape, dtype=dtype, device=device).view(tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def track_blocks(blocks: Mapping[str, list[nn.Module]], ledger: Ledger) -> None:
    """Make each block's forward and backward pass a phase of the ledger, named after the block's position.

    Call this after adding LoRAs and before checkpointing: recomputing a block counts as its backward pass.
    """
    is_first = True
    for name, all_blocks in blocks.items():
        for index, block in enumerate(all_blocks):
            block.forward = _track_forward(block.forward, name, index, ledger=ledger, is_first=is_first)
            is_first = False


def keep_kernels(parts: Iterable[nn.Module]) -> None:
    """Use stand-ins for kernels in parts of a network in the backward pass too, which recomputes them.

    This is needed because torch disables torch function modes during `backward`.

    Args:
        parts: Modules that `checkpoint_blocks` is going to wrap.
    """
    for part in parts:
        part.forward = functools.partial(_run_planned, part.forward)


def _run_planned(forward: Callable[..., Tensor], *inputs: Any, **named: Any) -> Tensor:
    with PlannedKernels():
        return forward(*inputs, **named)


def _read_as_one(tensor: Tensor) -> bool | int | float:
    """Return 1 as the Python number for the tensor's dtype: bool, int or float."""
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _name_position(index: int, count: int) -> str:
    """Return the name of a block's position in its list."""
    # The two blocks at each end have names of their own: the outermost one may differ from the rest, and its
    # neighbor stands for all blocks between.
    if index == count - 1:  # including a lone block
        return "last"
    if index == 0:
        return "first"
    if index == 1:
        return SECOND
    if index == count - 2:
        return BEFORE_LAST
    return "between"


def _track_forward(
    forward: Callable[..., Tensor], name: str, index: int, *, ledger: Ledger, is_first: bool
) -> Callable[..., Tensor]:
    """Return a block's `forward` that names the block in the ledger while it and its backward pass run."""

    def enter_hook(phase: str) -> Callable[[Tensor], None]:
        """Return a gradient hook that begins a phase of the ledger."""
        return lambda _: ledger.begin_phase(phase)

    def tracked_forward(x: Tensor, *inputs: Any, **named: Any) -> Tensor:
        """Run the block's `forward`, and begin the phases of the dry run before and after it."""
        if ledger.is_backward:  # checkpointing recomputes the block, which counts as its backward pass
            return forward(x, *inputs, **named)
        # the gradient of the first block's input is ready when the backward pass leaves the blocks
        if is_first and x.requires_grad:
            x.register_hook(enter_hook("backward before the blocks"))
        ledger.input_bytes[name] = round_up_bytes(x.nbytes)
        position = _name_position(index, ledger.block_counts[name])
        ledger.begin_phase(f"forward of {name}, {position}")
        result = forward(x, *inputs, **named)
        ledger.begin_phase("forward outside the blocks")
        # a block of the side stream returns two tensors
        last_output = result[-1] if isinstance(result, tuple) else result
        if last_output.requires_grad:
            last_output.register_hook(enter_hook(f"backward of {name}, {position}"))
        return result

    return tracked_forward


SECOND, BEFORE_LAST = "second", "last but one"
IN_BLOCKS = "forward of ", "backward of "  # prefixes of the names of phases inside a block


Counts = tuple[int, ...]  # blocks in each list
FEW_BLOCKS = 3  # both ends of a list, and one block in between


def truncate_blocks(
    dit: nn.Module, blocks: Mapping[str, list[nn.Module]], counts: Counts, ledger: Ledger
) -> None:
    """Keep only the first `counts` blocks of each list in a network, so that a dry run is short.

    Args:
        dit: The transformer.
        blocks: All blocks by list.
        counts: Number of blocks to keep in each list.
        ledger: Counts the memory.
    """
    for (name, all_blocks), count in zip(blocks.items(), counts, strict=True):
        parent, _, leaf = name.rpartition(".")
        setattr(dit.get_submodule(parent), leaf, nn.ModuleList(all_blocks[:count]))
        ledger.block_counts[name] = count


def extrapolate(
    measure: Callable[[Counts], Mapping[str, BytesByKind]], counts: Counts
) -> dict[str, BytesByKind]:
    """Extrapolate the memory that `measure` reports for few blocks to `counts` blocks in each list.

    The bytes in use while a block runs grow linearly with the block's index in its list, so the maximum is
    at the first or the last block.
    """
    few_counts = tuple(min(count, FEW_BLOCKS) for count in counts)
    # of three blocks, the second is also the last but one: its entry is copied under that name
    with_few = _with_both_ends(measure(few_counts))
    peaks_by_phase = with_few
    for index, count in enumerate(counts):
        num_missing = count - few_counts[index]
        if num_missing > 0:
            # one more block in this list shows how many bytes each of its blocks adds
            one_more = (*few_counts[:index], few_counts[index] + 1, *few_counts[index + 1 :])
            with_one_more = _with_both_ends(measure(one_more))
            peaks_by_phase = {
                phase: _add_growth(peak, num_missing, before=with_few[phase], after=with_one_more[phase])
                for phase, peak in peaks_by_phase.items()
            }
    return {phase: dict(peak) for phase, peak in peaks_by_phase.items()}


def _add_growth(peak: BytesByKind, num_blocks: int, before: BytesByKind, after: BytesByKind) -> BytesByKind:
    """Return the bytes of a phase with `num_blocks` more blocks, each of which adds `after - before`."""
    return {
        kind: peak.get(kind, 0) + num_blocks * (after.get(kind, 0) - before.get(kind, 0))
        for kind in {*peak, *before, *after}
    }


Extrapolate = Callable[[Callable[[Counts], Mapping[str, BytesByKind]], Counts], dict[str, BytesByKind]]


def extrapolate_on_one_device(_: nn.Module) -> Extrapolate:
    """Return `extrapolate`, which extends the measured memory to all blocks, for runs on one device."""
    return extrapolate


def _with_both_ends(peaks_by_phase: Mapping[str, BytesByKind]) -> dict[str, BytesByKind]:
    """Add phases for the last block but one, which in a dry run of three blocks is the second one."""
    ends = {
        name.removesuffix(SECOND) + BEFORE_LAST: bytes_by_kind
        for name, bytes_by_kind in peaks_by_phase.items()
        if name.endswith(SECOND)
    }
    return {**ends, **peaks_by_phase}


def find_peak_phase(peaks_by_phase: Mapping[str, BytesByKind]) -> tuple[str, BytesByKind]:
    """Return the phase in which most device memory is in use, and the bytes in that phase by kind."""
    name = max(peaks_by_phase, key=lambda phase: sum(peaks_by_phase[phase].values()))
    return name, peaks_by_phase[name]
