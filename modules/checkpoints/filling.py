"""Fill a network from an open model file, tensor by tensor.

    with open_checkpoint(path) as checkpoint:
        sources = plain_sources(checkpoint)              # or a dialect's table of Sources
        with on_meta_device():
            network = Network(config)
        dtype = lambda name, stored: torch.bfloat16
        load_module(network, checkpoint, sources, device=device, dtype=dtype, what="--vae")

Each tensor is renamed, patched by LoRAs, rounded (also to 8 bits) and placed. Every mismatch is reported
before anything is read. The host never holds more than the network in its target dtype and one tensor of the
file.
"""

import contextlib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from modules.bars import BYTES, track
from modules.checkpoints.finite import FiniteCheck
from modules.checkpoints.fp8_layers import Fp8Loading
from modules.checkpoints.opening import QUANT_EXTRAS, Checkpoint
from modules.contract.loading import HostPlace, TensorInfo, TensorSource, WeightPatch
from modules.devices import empty_pinned, release_pinned_memory
from modules.errors import CheckpointError
from modules.fp8.weights import E4M3, attach

FIRST_WEIGHTS = {init.constant_, init.kaiming_uniform_, init.normal_, init.uniform_}


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """Make modules without weights, for a file to fill.

    torch's random functions load its compiler on that device, which takes a second: they are not called.
    """
    with torch.device("meta"), _NoFirstWeights():
        yield


class _NoFirstWeights(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if function in FIRST_WEIGHTS else function(*args, **kwargs)


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
    dtypes = {name: dtype(name, checkpoint.tensors[sources[name].names[0]].dtype) for name in wanted}
    devices = {name: device if isinstance(device, torch.device) else device(name) for name in wanted}
    filling = _Filling(module, checkpoint, sources, dtypes, devices, patch, fp8, host)
    sizes = {
        name: sum(checkpoint.tensors[part].size_bytes for part in sources[name].names) for name in wanted
    }
    for name in track(
        wanted,
        f"Loading {checkpoint.path.name}",
        sum(sizes.values()),
        sizes.__getitem__,
        BYTES,
        shown=check is None and any(place.type != "meta" for place in devices.values()),
    ):
        if check is not None:
            check()
        filling.fill(name)
    filling.finish()
    if fp8 is not None:
        fp8.report(what)
    if filling.held and host is not None:
        host.finish()


_ALIGNMENT = 64  # bytes; where tensors begin in the buffer for reading


class _Filling:
    """Sources of one network's tensors, and their targets."""

    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint,
        sources: Mapping[str, TensorSource],
        dtypes: Mapping[str, torch.dtype],
        devices: Mapping[str, torch.device],
        patch: WeightPatch | None,
        fp8: Fp8Loading | None,
        host: HostPlace | None,
    ) -> None:
        """dtypes: to keep if not in 8 bits. The rest: see `load_module`."""
        self._module, self._checkpoint, self._sources = module, checkpoint, sources
        self._dtypes, self._devices, self._patch, self._fp8 = dtypes, devices, patch, fp8
        self._shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        self.held = self._hold(host)  # memory for the tensors that stay on the host
        self._is_filled_here = host is None or host.is_filled_here
        self._finite = FiniteCheck(checkpoint.path)
        # one buffer for all reading: temporary tensors would leave holes in the heap between those that stay
        made = [name for name in dtypes if devices[name].type != "meta" and not self._is_as_stored(name)]
        room = max((self._room(name) for name in made), default=0)
        self._is_pinned = any(
            (fp8.device if fp8 is not None and name in fp8 else devices[name]).type == "cuda" for name in made
        )
        self._scratch = (
            empty_pinned([room], torch.uint8) if self._is_pinned else torch.empty(room, dtype=torch.uint8)
        )

    def fill(self, name: str) -> None:
        """Read, make and place one tensor of the network."""
        source, device, place = self._sources[name], self._devices[name], self.held.get(name)
        if self._fp8 is not None and name in self._fp8:
            self._fill_fp8(name, self._fp8, place)
            return
        if place is not None and not self._is_filled_here:
            tensor = place
            if self._patch is not None:
                # the patch notes which deltas find their weight
                self._patch(name, torch.empty(place.shape, dtype=self._dtypes[name], device="meta"))
        elif self._is_as_stored(name):
            tensor = self._read_as_stored(source.names[0], place)
            self._finite.note(source.names[0], tensor)
        else:
            tensor = (
                torch.empty(self._shapes[name], dtype=self._dtypes[name], device=device)
                if place is None
                else place
            )
            if device.type != "meta":
                tensor.copy_(self._make(name, device, self._dtypes[name]))
        _place_weight(self._module, name, tensor)

    def finish(self) -> None:
        """Check that all values are finite, and free the buffer."""
        self._finite.finish()
        del self._scratch
        if self._is_pinned:
            release_pinned_memory()

    def _hold(self, host: HostPlace | None) -> Mapping[str, Tensor]:
        """Return memory for the tensors that stay on the host; none if nothing is read."""
        if host is None or all(device.type == "meta" for device in self._devices.values()):
            return {}

        def dtype(name: str) -> torch.dtype:
            if self._fp8 is None or name not in self._fp8:
                return self._dtypes[name]
            return self._stored_dtype(name) if name in self._fp8.kept else E4M3

        return host.hold(
            self._module, {name: TensorInfo(dtype(name), shape) for name, shape in self._shapes.items()}
        )

    def _stored_dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.tensors[self._sources[name].names[0]].dtype

    def _is_as_stored(self, name: str) -> bool:
        """Return whether the file has a tensor just as it stays in host memory."""
        return (
            self._patch is None
            and not (self._fp8 is not None and name in self._fp8)
            and (name in self.held or self._devices[name].type == "cpu")
            and self._sources[name].build is None
            and self._stored_dtype(name) == self._dtypes[name]
        )

    def _room(self, name: str) -> int:
        """Return the bytes needed to read all parts of a tensor."""
        parts = self._sources[name].names
        return sum(self._checkpoint.tensors[part].size_bytes + _ALIGNMENT for part in parts)

    def _read_as_stored(self, part: str, place: Tensor | None) -> Tensor:
        if place is None:
            return self._checkpoint.read(part)
        tensor = self._checkpoint.borrow(part, place.view(-1).view(torch.uint8))
        if tensor.data_ptr() != place.data_ptr():  # of a mapped file
            place.copy_(tensor)
        return place

    def _make(self, name: str, device: torch.device, target: torch.dtype) -> Tensor:
        """Make a tensor on a device, not yet rounded to its dtype; it may be a view of the buffer."""
        source = self._sources[name]
        tensor = source.make(self._parts(source, device))
        if self._patch is None:
            return tensor
        if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
            # fp8 cannot take a small delta
            tensor = tensor.to(target if target.itemsize > 1 else torch.float32)
        return self._patch(name, tensor)

    def _parts(self, source: TensorSource, device: torch.device) -> list[Tensor]:
        """Read the parts of a tensor, on that device; may be views of the buffer."""
        parts, start = [], 0
        for part in source.names:
            parts.append(self._checkpoint.borrow(part, self._scratch[start:]).to(device))
            self._finite.note(part, parts[-1])
            start += -(-self._checkpoint.tensors[part].size_bytes // _ALIGNMENT) * _ALIGNMENT
        return parts

    def _fill_fp8(self, name: str, fp8: Fp8Loading, place: Tensor | None) -> None:
        """Give a linear layer its weight in 8 bits: the file's own, or the file's rounded after the patch.

        place: where the weight is to stay; None: on its device. All processes that share places make the
        scales, one of them writes the weights.
        """
        source, device = self._sources[name], self._devices[name]
        layer = self._module.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, nn.Linear)
        scale: Tensor | None
        if device.type == "meta":
            weight, scale = torch.empty(layer.weight.shape, dtype=E4M3, device=device), None
        elif name in fp8.kept:
            weight, scale = source.make_fp8(self._parts(source, fp8.device))
            weight = weight.to(device, copy=True) if place is None else weight
        else:
            weight, scale = fp8.round(name, self._make(name, fp8.device, self._stored_dtype(name)))
            weight = weight.to(device) if place is None else weight
        if place is not None:
            weight = place.copy_(weight) if self._is_filled_here else place
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
