"""Fill a network from an open model file, tensor by tensor.

    with open_checkpoint(path) as checkpoint:
        sources = plain_sources(checkpoint)              # or a dialect's table of Sources
        with on_meta_device():
            network = Network(config)
        dtype = lambda name, stored: torch.bfloat16
        load_module(network, checkpoint, sources, device=device, dtype=dtype, what="--vae")

Each tensor is renamed, merged with LoRAs, cast or quantized, and moved to its device. All mismatches are
reported before any tensor is read. Host memory holds at most the network in its target dtype and one tensor
of the file.
"""

import contextlib
import fnmatch
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from checkpoints.finite import check_finite, is_finite, make_non_finite_error
from checkpoints.opening import QUANT_EXTRAS, Checkpoint
from checkpoints.stored.forms import Stored, StoredForm, attach
from modules.bars import BYTES, track
from modules.devices import empty_pinned, release_heap, release_pinned_memory
from modules.errors import CheckpointError
from modules.integers import round_up
from protocols.loading import HostPlace, TensorInfo, TensorSource, WeightPatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredLoading:
    """Names and storage form of the linear weights that a network is loaded with in 8 or 4 bits."""

    form: StoredForm | None  # from the options; None if they set none
    rounded: frozenset[str] = frozenset()  # names of weights that are quantized to `form` while loading
    staying: frozenset[str] = frozenset()  # names of weights that keep the quantized form of the file

    def __contains__(self, name: str) -> bool:
        return name in self.rounded or name in self.staying


def linear_weights(
    module: nn.Module, lists: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> frozenset[str]:
    """Return the names of the weights of a network's linear layers.

    Args:
        module: The network.
        lists: Names of block lists to which the result is limited; None: all layers.
        exclude: Substrings; weights whose names contain one are skipped.
    """
    prefixes = None if lists is None else tuple(f"{name}." for name in lists)
    names = set()
    for layer_name, layer in module.named_modules():
        name = f"{layer_name}.weight"
        is_in_lists = prefixes is None or name.startswith(prefixes)
        is_excluded = any(part in name for part in exclude)
        if isinstance(layer, nn.Linear) and is_in_lists and not is_excluded:
            names.add(name)
    return frozenset(names)


def find_stored_weights(
    names: Collection[str],
    sources: Mapping[str, TensorSource],
    tensors: Mapping[str, TensorInfo],
    form_is_given: bool,
) -> frozenset[str]:
    """Return those of the weights `names` that keep the quantized form of the file.

    If an option sets a quantized form (`form_is_given`), these are all quantized weights. Otherwise, only
    weights whose form is always kept (`StoredForm.stays`) are returned; the others are dequantized.
    """
    staying = set()
    for name in names:
        source = sources.get(name)
        if source is not None and source.as_stored is not None:
            stored = stored_as(source, tensors)
            if stored is not None and (form_is_given or stored.form.stays):
                staying.add(name)
    return frozenset(staying)


def stored_as(source: TensorSource, tensors: Mapping[str, TensorInfo]) -> Stored | None:
    """Return the quantized weight that a source reads, on the meta device; None if it is not quantized."""
    if source.as_stored is None:
        return None
    return source.as_stored(*[tensors[part].hollow() for part in source.names])


# Temporary tensors fragment the heap. Returning freed memory to the system takes milliseconds, so it is done
# only after this many bytes of the file, or after 1 / `_TRIM_PARTS` of the file if that is more.
_TRIM_AFTER = 8 << 20
_TRIM_PARTS = 32
_SAMPLED_ROWS = 64  # rows of a weight on which its rounding error is measured
# functions that initialize weights, which modules call when they are built
INITIALIZERS = {init.constant_, init.kaiming_uniform_, init.normal_, init.uniform_}


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """Create modules on the meta device and skip initializers, which would load torch's compiler."""
    with torch.device("meta"), _SkipInitializers():
        yield


class _SkipInitializers(TorchFunctionMode):
    """Replace torch's weight initializers by functions that return the tensor unchanged."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # torch passes the tensor to a mode by keyword, however the initializer was called
        return kwargs["tensor"] if function in INITIALIZERS else function(*args, **kwargs)


def load_module(
    module: nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    *,
    device: torch.device,
    dtype: Callable[[str, torch.dtype], torch.dtype],
    patch: WeightPatch | None = None,
    ignore: Sequence[str] = (),
    what: str = "this model",
    stored: StoredLoading | None = None,
    host: HostPlace | None = None,
    check: Callable[[], None] | None = None,
    filled: Callable[[str], None] | None = None,
) -> None:
    """Fill a module that was built on the meta device, tensor by tensor.

    Each tensor is loaded directly to its device and dtype. Parameters have `requires_grad` off. If `device`
    is the meta device, no tensor is read.

    Args:
        module: Network to fill.
        checkpoint: Open file.
        sources: How each tensor is made from tensors of the file, by name in the module's state dict.
        device: Device of the network.
        dtype: Takes a state-dict name and the dtype in the file, and returns the target dtype.
        patch: Takes a state-dict name, the weight before rounding, and the target dtype, and returns the
            changed weight, for example with LoRAs added.
        ignore: Patterns (`*`) of tensors in the file that may be unused.
        what: Option or network, for messages.
        stored: Weights that are quantized to 8 or 4 bits; None if there are none.
        host: Keeps some of the tensors in host memory; their values are still computed on `device`.
        check: Called before each tensor, and may raise to stop loading; replaces the progress bar.
        filled: Called with each name once its tensor is loaded.

    Raises:
        CheckpointError: If tensors are missing, unexpected or misshaped (checked before any is read), or if
            values are NaN or infinite.
        OptionError: If the device does not support the quantized form.
    """
    if stored is not None and stored.form is not None:
        stored.form.check_device(device)
    # compare names and shapes before any tensor is read
    targets = module.state_dict()
    _check_fit(targets, checkpoint, sources, ignore=ignore, what=what)
    dtypes, sizes = {}, {}
    for name in targets:
        infos = [checkpoint.tensors[stored_name] for stored_name in sources[name].names]
        dtypes[name] = dtype(name, infos[0].dtype)
        sizes[name] = sum(info.size_bytes for info in infos)
    filling = _Filling(
        module,
        checkpoint,
        sources,
        dtypes=dtypes,
        device=device,
        patch=patch,
        stored=stored,
        host=host,
    )
    total = sum(sizes.values())
    names = track(
        targets,
        f"Loading {checkpoint.path.name}",
        total=total,
        size=sizes.__getitem__,
        unit=BYTES,
        shown=check is None and device.type != "meta",
    )
    untrimmed = 0  # bytes loaded since freed memory was last returned to the system
    trim_after = max(_TRIM_AFTER, total // _TRIM_PARTS)
    for name in names:
        if check is not None:
            check()
        filling.fill(name)
        if filled is not None:
            filled(name)
        untrimmed += sizes[name]
        if device.type == "cpu" and untrimmed > trim_after:
            release_heap()
            untrimmed = 0
    # read the checks that were collected on the device
    if filling.are_finite and not all(torch.stack([*filling.are_finite.values()]).tolist()):
        bad_names = [name for name, is_good in filling.are_finite.items() if not is_good]
        raise make_non_finite_error(checkpoint.path, bad_names)
    del filling.scratch
    release_heap()
    if device.type == "cuda":
        release_pinned_memory()
    if stored is not None:
        _log_forms(stored, filling, what)
    if filling.on_host and host is not None:
        host.finish()


def _log_forms(stored: StoredLoading, filling: "_Filling", what: str) -> None:
    """Log the quantized forms of layers and their rounding errors.

    Raises:
        CheckpointError: If a rounding error is NaN or infinite.
    """
    for form, num_layers in Counter(filling.kept_forms).items():
        logger.info("%s: %d linear layers stay in %s as the file has them", what, num_layers, form)
    names_by_form: dict[str, list[str]] = {}
    for name in filling.errors:
        names_by_form.setdefault(filling.rounded_forms[name], []).append(name)
    for form_text, names in names_by_form.items():
        errors = torch.stack([filling.errors[name].cpu() for name in names])
        for name, is_finite_error in zip(names, errors.isfinite().tolist(), strict=True):
            # a LoRA must have caused it, because values of the file are checked when read
            if not is_finite_error:
                form_name = "" if stored.form is None else stored.form.name
                raise CheckpointError(
                    f"{what}: {name} has NaN or infinite values, which {form_name} cannot hold. Copy "
                    "the file again."
                )
        logger.info(
            "%s: %d linear layers %s, relative error %.2f %% (%.2f to %.2f %%)",
            what,
            len(errors),
            form_text,
            100 * float(errors.mean()),
            100 * float(errors.min()),
            100 * float(errors.max()),
        )


MAX_ERRORS = 100  # lines of a message about missing and unexpected tensors
_ALIGNMENT = 64  # bytes; tensors begin at multiples of it in the buffer for reading


class _Filling:
    """Load the tensors of one network and assign them to its parameters."""

    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint,
        sources: Mapping[str, TensorSource],
        *,
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
        patch: WeightPatch | None,
        stored: StoredLoading | None,
        host: HostPlace | None,
    ) -> None:
        """Store the arguments of `load_module`, and allocate host memory and the buffer for reading."""
        self._module = module
        self._checkpoint = checkpoint
        self._sources = sources
        self._dtypes = dtypes
        self._device = device
        self._patch = patch
        self._stored = stored
        self._shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        self.on_host: Mapping[str, Tensor] = {}  # memory for the tensors that stay on the host
        if host is not None and device.type != "meta":
            infos = {name: self._describe_target(name) for name in self._shapes}
            self.on_host = host.hold(module, infos)
        # False if another process writes the weights into memory that both share
        self._is_filled_here = host is None or host.is_filled_here
        # scalar bools by name in the file; empty on the CPU, where values are checked at once
        self.are_finite: dict[str, Tensor] = {}
        self.errors: dict[str, Tensor] = {}  # relative rounding errors, by state-dict name
        self.rounded_forms: dict[str, str] = {}  # description of the form for the log, by state-dict name
        self.kept_forms: list[str] = []  # form of each weight that stays as in the file
        self.scratch = self._make_scratch()

    def _make_scratch(self) -> Tensor:
        """Allocate one buffer for all reads, because temporary tensors would fragment the heap."""
        size_bytes = 0
        for name in self._dtypes if self._device.type != "meta" else ():
            infos = [self._checkpoint.tensors[part] for part in self._sources[name].names]
            size_bytes = max(size_bytes, sum(info.size_bytes + _ALIGNMENT for info in infos))
        if self._device.type == "cuda":
            return empty_pinned([size_bytes], torch.uint8)
        return torch.empty(size_bytes, dtype=torch.uint8)

    def _describe_target(self, name: str) -> TensorInfo:
        """Return the dtype and shape that a tensor has once it is loaded."""
        if self._stored is not None and name in self._stored:
            weight = self._make_empty(name).weight
            return TensorInfo(weight.dtype, tuple(weight.shape))
        return TensorInfo(self._dtypes[name], self._shapes[name])

    def fill(self, name: str) -> None:
        """Load one tensor of the network and assign it to its parameter or buffer."""
        parent_name, _, leaf = name.rpartition(".")
        parent = self._module.get_submodule(parent_name)
        if self._stored is not None and name in self._stored:
            assert isinstance(parent, nn.Linear)
            attach(parent, self._make_stored(name, parent, self._stored))
            return
        tensor = self.on_host.get(name)
        if tensor is None:
            tensor = torch.empty(self._shapes[name], dtype=self._dtypes[name], device=self._device)
            self._write(name, tensor)
        elif self._is_filled_here:
            self._write(name, tensor)
        elif self._patch is not None:
            # another process writes the values; the patch is called only so that it records that it was used
            dtype = self._dtypes[name]
            self._patch(name, torch.empty(tensor.shape, dtype=dtype, device="meta"), dtype)
        if leaf in parent._parameters:
            parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            parent._buffers[leaf] = tensor

    def _make_stored(self, name: str, layer: nn.Linear, loading: StoredLoading) -> Stored:
        """Return a quantized weight: as in the file, or quantized after the patch.

        If processes on one machine share weights in host memory, one of them writes the packed weight. Each
        process has its own scales, which are small.
        """
        if self._device.type == "meta":
            stored = self._make_empty(name)
        elif name in loading.staying:
            stored = self._read_stored(name, layer)
        else:
            assert loading.form is not None
            stored = self._round(name, loading.form)
        form = stored.form
        if loading.form is not None:  # products are computed as the user chose
            form = form.computing_as(loading.form)
        weight, *scales = stored.tensors
        assert weight is not None
        host_weight = self.on_host.get(name)
        if host_weight is not None:
            weight = host_weight.copy_(weight) if self._is_filled_here else host_weight
        elif name in loading.staying and self._device.type != "meta":
            weight = weight.clone()  # it may be a view of the buffer, which the next tensor overwrites
        copies = [None if tensor is None else tensor.clone() for tensor in scales]
        return Stored(form, stored.shape, (weight, *copies))

    def _read_stored(self, name: str, layer: nn.Linear) -> Stored:
        """Read a quantized weight unchanged; its tensors may be views of `scratch`."""
        source = self._sources[name]
        stored = source.make_stored(self._read_parts(source))
        assert stored is not None
        self.kept_forms.append(stored.form.name)
        return Stored(stored.form, (layer.out_features, layer.in_features), stored.tensors)

    def _round(self, name: str, form: StoredForm) -> Stored:
        """Quantize a weight after LoRAs have been folded in, and record its rounding error."""
        first_part = self._sources[name].names[0]
        weight = self._make(name, self._checkpoint.tensors[first_part].dtype)
        stored = form.quantize(weight)
        self.errors[name] = _measure_rounding_error(weight, stored)
        self.rounded_forms[name] = stored.form.how
        return stored

    def _make_empty(self, name: str) -> Stored:
        """Return the quantized form of a layer's weight on the meta device."""
        assert self._stored is not None
        if name in self._stored.staying:
            stored = stored_as(self._sources[name], self._checkpoint.tensors)
        else:
            rows, columns = self._shapes[name]
            stored = None if self._stored.form is None else self._stored.form.empty((rows, columns))
        assert stored is not None
        return stored

    def _write(self, name: str, tensor: Tensor) -> None:
        """Write the values of one network tensor into `tensor`, which is already allocated."""
        if tensor.device.type == "meta":
            return
        source = self._sources[name]
        stored_name = source.names[0]
        # without `build`, the tensor is one of the file, unchanged
        is_unchanged = source.build is None and self._checkpoint.tensors[stored_name].dtype == tensor.dtype
        if self._patch is not None or not is_unchanged:
            tensor.copy_(self._make(name, tensor.dtype))
            return
        # read directly into the network's memory, without an intermediate copy
        if tensor.device.type == "cpu":
            self._checkpoint.read(stored_name, tensor)
        else:
            tensor.copy_(self._checkpoint.borrow(stored_name, self.scratch))
        self._check_finite(stored_name, tensor)

    def _make(self, name: str, target: torch.dtype) -> Tensor:
        """Compute a tensor on the device, not yet cast to `target`; it may be a view of `scratch`."""
        source = self._sources[name]
        tensor = source.make(self._read_parts(source))
        if tensor.ndim != len(self._shapes[name]):
            tensor = tensor.view(add_leading_axes(tuple(tensor.shape), len(self._shapes[name])))
        if self._checkpoint.tensors[source.names[0]].packing is not None:
            # packed weights may be padded: only the first rows and columns are the network's
            tensor = tensor[tuple(slice(length) for length in self._shapes[name])]
        if self._patch is None:
            return tensor
        if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
            # fp8 would round the small change of a LoRA away
            tensor = tensor.to(target if target.itemsize > 1 else torch.float32)
        return self._patch(name, tensor, target)

    def _read_parts(self, source: TensorSource) -> list[Tensor]:
        """Read the stored tensors of one source to the device; they may be views of `scratch`."""
        parts: list[Tensor] = []
        start = 0
        for part in source.names:
            tensor = self._checkpoint.borrow(part, self.scratch[start:]).to(self._device)
            parts.append(tensor)
            self._check_finite(part, tensor)
            if len(source.names) > 1:  # the next part is read into the buffer after this one
                start += round_up(self._checkpoint.tensors[part].size_bytes, _ALIGNMENT)
        return parts

    def _check_finite(self, part: str, tensor: Tensor) -> None:
        """Check a tensor of the file for NaN and infinite values.

        On the CPU, an error is raised immediately. Copies to other devices are asynchronous, and reading a
        check would wait for them; so those checks are collected and read after loading.
        """
        if tensor.device.type == "cpu":
            check_finite(self._checkpoint.path, part, tensor)
        else:
            self.are_finite[part] = is_finite(tensor)


def _measure_rounding_error(weight: Tensor, stored: Stored) -> Tensor:
    """Return sum |error| / sum |weight| of a quantized weight on some rows; NaN if a scale is not finite."""
    sample = weight[:: max(1, len(weight) // _SAMPLED_ROWS)]
    rounded = stored.form.quantize(sample).value()
    exact = sample.float()
    smallest = torch.finfo(torch.float32).tiny  # avoids a division by zero if all weights are zero
    error = (rounded - exact).abs().sum() / exact.abs().sum().clamp_min(smallest)
    for scale in stored.tensors[1:]:
        if scale is not None:
            error = error + 0 * scale.float().sum()  # 0 * NaN and 0 * infinity are NaN
    return error


def _check_fit(
    targets: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    *,
    ignore: Sequence[str],
    what: str,
) -> None:
    """Raise CheckpointError, with up to MAX_ERRORS lines, if tensors are missing, unexpected or misshaped."""
    # compare the names
    missing = set()
    for name in targets:
        parts = sources[name].names if name in sources else ()
        if not parts or any(part not in checkpoint.tensors for part in parts):
            missing.add(name)
    unexpected = _find_unexpected(targets, checkpoint, sources, ignore)
    lines = []
    for error, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            lines += [f"  {error}: {line}" for line in compress_names(names)]
    # compare the shapes of tensors that are there
    for name, tensor in targets.items():
        if name in missing:
            continue
        infos = [checkpoint.tensors[part] for part in sources[name].names]
        needed = tuple(tensor.shape)
        shape: tuple[int, ...] | None = infos[0].shape
        if sources[name].build is not None:
            shape = _infer_shape(sources[name], infos)
        if shape is not None and len(shape) < len(needed):
            shape = add_leading_axes(shape, len(needed))
        packing = infos[0].packing
        if shape != needed and (packing is None or shape != packing.padded(needed)):
            lines.append(f"  {name}: the file has {_sizes(shape)}, {_sizes(needed)} is needed")
    if lines:
        if len(lines) > MAX_ERRORS:
            lines = [*lines[:MAX_ERRORS], f"  and {len(lines) - MAX_ERRORS:,} lines like these"]
        text = "\n".join(lines)
        raise CheckpointError(
            f"{checkpoint.path} does not fit {what}:\n{text}\n  Give the complete file of that model.",
            checkpoint.path,
        )


def _find_unexpected(
    targets: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    ignore: Sequence[str],
) -> list[str]:
    """Return names in the file that no target uses and no pattern ignores."""
    # names in the file from which a tensor of the network is read, and those from which a tensor would be
    # read that this network does not have
    used: set[str] = set()
    unneeded: set[str] = set()
    for name, source in sources.items():
        parts = used if name in targets else unneeded
        parts.update(source.names)
    unexpected = []
    for name in checkpoint.tensors:
        # scales and marks of quantized weights are ignored, unless the name is that of a weight
        patterns = ignore if name in unneeded else (*ignore, *QUANT_EXTRAS)
        if name not in used and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            unexpected.append(name)
    return unexpected


def _infer_shape(source: TensorSource, infos: Sequence[TensorInfo]) -> tuple[int, ...] | None:
    """Return the shape of a tensor that is built from stored tensors; None if their shapes do not match."""
    try:
        return tuple(source.make([info.hollow() for info in infos]).shape)
    except (RuntimeError, IndexError):
        return None


def add_leading_axes(shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """Prepend axes of length 1, which GGUF converters drop, until the shape has `axes` axes."""
    return (1,) * (axes - len(shape)) + shape


def _sizes(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "parts that do not fit together"
    return " x ".join(str(size) for size in shape) or "a single number"


def compress_names(names: Iterable[str]) -> list[str]:
    """Shorten a list of tensor names: names that differ only in their first number become one with a range.

    `blocks.0.weight` to `blocks.39.weight` become `blocks.{0..39}.weight`. The result is sorted.
    """
    groups: dict[tuple[str, str], list[int]] = {}  # text before and after the number -> numbers
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)  # a number between two dots
        if match is None:
            groups.setdefault((name, ""), [])  # a name without a number is a group of its own
        else:
            key = (name[: match.start()], name[match.end() :])
            groups.setdefault(key, []).append(int(match[0]))
    lines = []
    for (before, after), numbers in sorted(groups.items()):
        for first, last in _find_runs(sorted(numbers)):
            number = str(first) if first == last else f"{{{first}..{last}}}"
            lines.append(f"{before}{number}{after}")
        if not numbers:
            lines.append(before)
    return lines


def _find_runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Group sorted numbers into runs of consecutive numbers; return the first and last number of each."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
