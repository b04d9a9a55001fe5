"""Fill a network from an open model file, tensor by tensor.

    with open_checkpoint(path) as checkpoint:
        sources = plain_sources(checkpoint)              # or a dialect's table of Sources
        with torch.device("meta"):
            network = Network(config)
        dtype = lambda name, stored: torch.bfloat16
        load_module(network, checkpoint, sources, device=device, dtype=dtype, what="--vae")

Each tensor is renamed, patched by LoRAs, rounded (also to 8 bits) and placed. Every mismatch is reported
before anything is read. The host never holds more than the network in its target dtype and one tensor of the
file.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from modules.bars import BYTES, track
from modules.checkpoints.finite import FiniteCheck
from modules.checkpoints.fp8_layers import Fp8Loading
from modules.checkpoints.opening import QUANT_EXTRAS, Checkpoint
from modules.checkpoints.sources import TensorSource
from modules.contract.loading import HostPlace, TensorInfo, WeightPatch
from modules.devices import empty_pinned, release_pinned_memory
from modules.errors import CheckpointError
from modules.fp8.weights import E4M3, attach


def load_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    *,
    device: torch.device | Callable[[str], torch.device],
    dtype: Callable[[str, torch.dtype], torch.dtype],
    patch: WeightPatch | None = None,
    ignore: Sequence[str] = (),
    what: str = "this model",
    fp8: Fp8Loading | None = None,
    host: HostPlace | None = None,
    check: Callable[[], None] | None = None,
) -> None:
    """Fill a module that was built on the meta device, tensor by tensor, each going straight to its device
    and dtype.

    sources: our state-dict names -> how each is made. dtype: (our name, dtype in the file) -> dtype to keep.
    device: of all, or our name -> device. patch: given our name and the weight before it is rounded to that
    dtype; returns the weight to keep. ignore: patterns (`*`) of tensors in the file that need not be used.
    what: the option or network, for messages. fp8: which weights of linear layers are kept in 8 bits; they
    are rounded on its device and then go to theirs. host: keeps some of the tensors in host memory; they are
    made on the device all the same, where anything is to be computed. check: called before each tensor, in
    place of a progress bar; it may raise to end the loading. Parameters come out with `requires_grad` off. On
    the meta device nothing is read. Raises CheckpointError listing every missing, unexpected and misshaped
    tensor, before anything is read, and naming those with values that are NaN or
    infinite.
    """
    wanted = module.state_dict()
    _check_fit(wanted, checkpoint, sources, ignore, what)
    plan = {name: dtype(name, checkpoint.tensors[sources[name].names[0]].dtype) for name in wanted}
    devices = {name: device if isinstance(device, torch.device) else device(name) for name in wanted}
    held = _hold(module, checkpoint, sources, plan, fp8, host, devices)
    ends = {name: _CPU if name in held else devices[name] for name in wanted}
    plain = (
        wanted
        if patch is None and fp8 is None
        else [name for name in wanted if patch is None and name not in (fp8 or ())]
    )
    as_stored = {name for name in plain if _is_as_stored(sources[name], checkpoint, plan[name], ends[name])}
    # one buffer for all reading: temporary tensors would leave holes in the heap between those that stay
    made = [name for name in wanted if name not in as_stored and devices[name].type != "meta"]
    room = max((_room(sources[name], checkpoint) for name in made), default=0)
    pinned = any(
        (fp8.device if fp8 is not None and name in fp8 else devices[name]).type == "cuda" for name in made
    )
    scratch = empty_pinned([room], torch.uint8) if pinned else torch.empty(room, dtype=torch.uint8)
    is_filled_here = host is None or host.is_filled_here
    finite = FiniteCheck(checkpoint.path)
    sizes = {name: _stored_bytes(sources[name], checkpoint) for name in wanted}
    for name, target in track(
        plan.items(),
        f"Loading {checkpoint.path.name}",
        sum(sizes.values()),
        lambda item: sizes[item[0]],
        BYTES,
        shown=check is None and any(place.type != "meta" for place in devices.values()),
    ):
        if check is not None:
            check()
        place = held.get(name)
        if fp8 is not None and name in fp8:
            _place_fp8(
                module,
                name,
                sources[name],
                checkpoint,
                scratch,
                devices[name],
                patch,
                fp8,
                place,
                is_filled_here,
                finite,
            )
            continue
        if place is not None and not is_filled_here:
            tensor = place
            if patch is not None:
                # the patch notes which deltas find their weight
                patch(name, torch.empty(place.shape, dtype=target, device="meta"))
        elif name in as_stored:
            tensor = (
                checkpoint.read(sources[name].names[0])
                if place is None
                else _read_into(place, checkpoint, sources[name].names[0])
            )
            finite.note(sources[name].names[0], tensor)
        else:
            tensor = (
                torch.empty(wanted[name].shape, dtype=target, device=devices[name])
                if place is None
                else place
            )
            if devices[name].type != "meta":
                tensor.copy_(
                    _make_tensor(
                        name, sources[name], checkpoint, scratch, devices[name], target, patch, finite
                    )
                )
        _place_weight(module, name, tensor)
    finite.finish()
    if pinned:
        del scratch
        release_pinned_memory()
    if fp8 is not None:
        fp8.report(what)
    if held and host is not None:
        host.finish()


_CPU = torch.device("cpu")


def _hold(
    module: nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    plan: Mapping[str, torch.dtype],
    fp8: Fp8Loading | None,
    host: HostPlace | None,
    devices: Mapping[str, torch.device],
) -> Mapping[str, Tensor]:
    """Return memory for the tensors that stay on the host; none if nothing is read.

    plan: name -> dtype to keep if not in 8 bits.
    """
    if host is None or all(device.type == "meta" for device in devices.values()):
        return {}

    def dtype(name: str) -> torch.dtype:
        if fp8 is None or name not in fp8:
            return plan[name]
        return checkpoint.tensors[sources[name].names[0]].dtype if name in fp8.kept else E4M3

    return host.hold(
        module,
        {name: TensorInfo(dtype(name), tuple(each.shape)) for name, each in module.state_dict().items()},
    )


def _read_into(room: Tensor, checkpoint: Checkpoint, name: str) -> Tensor:
    """Read a tensor to where it is to stay; only mapped files need a copy."""
    tensor = checkpoint.borrow(name, room.view(-1).view(torch.uint8))
    if tensor.data_ptr() != room.data_ptr():
        room.copy_(tensor)
    return room


_ALIGNMENT = 64  # bytes; where tensors begin in `scratch`


def _is_as_stored(
    source: TensorSource, checkpoint: Checkpoint, target: torch.dtype, device: torch.device
) -> bool:
    return (
        device.type == "cpu" and source.build is None and checkpoint.tensors[source.names[0]].dtype == target
    )


def _stored_bytes(source: TensorSource, checkpoint: Checkpoint) -> int:
    """Return the bytes that a tensor's parts take in the file."""
    return sum(checkpoint.tensors[part].size_bytes for part in source.names)


def _room(source: TensorSource, checkpoint: Checkpoint) -> int:
    """Return the bytes needed to read all parts of a tensor."""
    return sum(checkpoint.tensors[part].size_bytes + _ALIGNMENT for part in source.names)


def _make_tensor(
    name: str,
    source: TensorSource,
    checkpoint: Checkpoint,
    scratch: Tensor,
    device: torch.device,
    target: torch.dtype,
    patch: WeightPatch | None,
    finite: FiniteCheck,
) -> Tensor:
    """Make one of our tensors on its device, not yet rounded to its dtype; it may be a view of `scratch`."""
    tensor = source.make(_parts(source, checkpoint, scratch, device, finite))
    if patch is None:
        return tensor
    if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
        tensor = tensor.to(target if target.itemsize > 1 else torch.float32)  # fp8 cannot take a small delta
    return patch(name, tensor)


def _parts(
    source: TensorSource, checkpoint: Checkpoint, scratch: Tensor, device: torch.device, finite: FiniteCheck
) -> list[Tensor]:
    """Read what a tensor is made of, on that device; may be views of `scratch`."""
    parts, start = [], 0
    for part in source.names:
        parts.append(checkpoint.borrow(part, scratch[start:]).to(device))
        finite.note(part, parts[-1])
        start += -(-checkpoint.tensors[part].size_bytes // _ALIGNMENT) * _ALIGNMENT
    return parts


def _place_fp8(
    module: nn.Module,
    name: str,
    source: TensorSource,
    checkpoint: Checkpoint,
    scratch: Tensor,
    device: torch.device,
    patch: WeightPatch | None,
    fp8: Fp8Loading,
    room: Tensor | None,
    is_filled_here: bool,
    finite: FiniteCheck,
) -> None:
    """Give a linear layer its weight in 8 bits: the file's own, or the file's rounded after the patch.

    room: where the weight is to stay; None: on `device`. is_filled_here: if False, another process writes it;
    all processes make the scales.
    """
    layer = module.get_submodule(name.removesuffix(".weight"))
    assert isinstance(layer, nn.Linear)
    scale: Tensor | None
    if device.type == "meta":
        weight, scale = torch.empty(layer.weight.shape, dtype=E4M3, device=device), None
    elif name in fp8.kept:
        weight, scale = source.make_fp8(_parts(source, checkpoint, scratch, fp8.device, finite))
        weight = weight.to(device, copy=True) if room is None else weight
    else:
        stored = checkpoint.tensors[source.names[0]].dtype
        made = _make_tensor(name, source, checkpoint, scratch, fp8.device, stored, patch, finite)
        weight, scale = fp8.round(name, made)
        weight = weight.to(device) if room is None else weight
    if room is not None:
        weight = room.copy_(weight) if is_filled_here else room
    attach(layer, weight, None if scale is None else scale.to(fp8.device, copy=True), fp8.quantisation)


def _place_weight(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    if leaf in parent._parameters:
        parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        parent._buffers[leaf] = tensor


def _check_fit(
    wanted: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    ignore: Sequence[str],
    what: str,
) -> None:
    used = {part for name in wanted if name in sources for part in sources[name].names}
    absent = {
        name
        for name in wanted
        if name not in sources or any(part not in checkpoint.tensors for part in sources[name].names)
    }
    known = used | {part for name, source in sources.items() if name not in wanted for part in source.names}
    unused = [
        name
        for name in checkpoint.tensors
        if name not in used and not any(fnmatch.fnmatchcase(name, p) for p in ignore)
    ]
    unused = [
        name
        for name in unused
        if name in known or not any(fnmatch.fnmatchcase(name, p) for p in QUANT_EXTRAS)
    ]
    lines = [f"  missing: {line}" for line in compress_names(absent)]
    lines += [f"  unexpected: {line}" for line in compress_names(unused)]
    for name, tensor in wanted.items():
        if name not in absent:
            shape = _built_shape(sources[name], checkpoint)
            if shape != tuple(tensor.shape):
                lines.append(
                    f"  {name}: the file has {_sizes(shape)}, {_sizes(tuple(tensor.shape))} is needed"
                )
    if lines:
        text = "\n".join(lines)
        raise CheckpointError(
            f"{checkpoint.path} does not fit {what}:\n{text}\n  Give the complete file of that model.",
            checkpoint.path,
        )


def _built_shape(source: TensorSource, checkpoint: Checkpoint) -> tuple[int, ...] | None:
    infos = [checkpoint.tensors[part] for part in source.names]
    if source.build is None:
        return infos[0].shape
    try:
        return tuple(
            source.make([torch.empty(info.shape, dtype=info.dtype, device="meta") for info in infos]).shape
        )
    except (RuntimeError, IndexError):
        return None  # the parts do not even go together


def _sizes(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "parts that do not fit together"
    return " x ".join(str(size) for size in shape) or "a single number"


def compress_names(names: Iterable[str]) -> list[str]:
    """Sort names and join those that differ only in their first number: `blocks.{0..39}.norm3.weight`."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        found = re.search(r"(?<=\.)\d+(?=\.)", name)
        key = (name[: found.start()], name[found.end() :]) if found else (name, "")
        groups.setdefault(key, []).extend([int(found[0])] if found else [])
    lines = []
    for (before, after), numbers in sorted(groups.items()):
        for first, last in _runs(sorted(numbers)):
            lines.append(
                f"{before}{first}{after}" if first == last else f"{before}{{{first}..{last}}}{after}"
            )
        if not numbers:
            lines.append(before)
    return lines


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
