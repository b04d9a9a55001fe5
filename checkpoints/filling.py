"""Fill a network from an open model file, tensor by tensor.

    with open_checkpoint(path) as checkpoint:
        sources = list_tensor_sources(checkpoint)        # or sources renamed by a model family
        with on_meta_device():
            network = Network(config)
        dtype = lambda name, stored: torch.bfloat16
        load_module(network, checkpoint, sources, device=device, dtype=dtype, label="--vae")

Each tensor is renamed, merged with LoRAs, cast or quantized, and moved to its device. All mismatches are
reported before any tensor is read. Host memory needs to fit only the network in its target dtype and one
tensor of the file.
"""

import contextlib
import fnmatch
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from checkpoints.finite import explain_non_finite, is_finite, make_non_finite_error
from checkpoints.opening import QUANTIZATION_EXTRAS, Checkpoint
from checkpoints.stored.forms import QuantizationFormat, QuantizedWeight, attach
from modules.bars import BYTES, track
from modules.devices import empty_pinned, release_heap, release_pinned_memory
from modules.errors import CheckpointError
from modules.integers import round_up
from protocols.loading import HostWeightMemory, TensorInfo, TensorSource, WeightPatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuantizedLoading:
    """Which linear weights stay quantized, or are quantized to 8 or 4 bits, while a network is loaded."""

    format: QuantizationFormat | None  # for `to_quantize`, from the options; None if they set none
    to_quantize: frozenset[str] = frozenset()  # names of weights that are quantized while loading
    quantized_in_file: frozenset[str] = frozenset()  # names of weights that keep the format of the file

    def __contains__(self, name: str) -> bool:
        return name in self.to_quantize or name in self.quantized_in_file


def linear_weights(
    module: nn.Module, lists: Sequence[str] | None = None, exclude: Sequence[str] = ()
) -> frozenset[str]:
    """Return the names of the weights of a network's linear layers.

    Args:
        module: The network.
        lists: Names of block lists to which the result is limited; None: all layers.
        exclude: Substrings; weights whose names contain any of them are skipped.
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


def find_quantized_weights(
    names: Collection[str],
    sources: Mapping[str, TensorSource],
    tensors: Mapping[str, TensorInfo],
    format_is_requested: bool,
) -> frozenset[str]:
    """Return which of the weights `names` stay quantized as in the file.

    If an option requests a quantization format, all quantized weights stay quantized. Otherwise, only formats
    that are kept by default do; other weights are dequantized.

    Args:
        names: Names of the network's weights.
        sources: How each tensor of the network is built from the file, by name.
        tensors: Dtype and shape of the file's tensors.
        format_is_requested: Whether an option requests a quantization format.
    """
    quantized_in_file = set()
    for name in names:
        source = sources.get(name)
        if source is not None and source.build_quantized is not None:
            weight = read_quantized_on_meta(source, tensors)
            if weight is not None and (format_is_requested or weight.format.is_kept_by_default):
                quantized_in_file.add(name)
    return frozenset(quantized_in_file)


def read_quantized_on_meta(source: TensorSource, tensors: Mapping[str, TensorInfo]) -> QuantizedWeight | None:
    """Return a source's quantized weight on the meta device; None if the weight is not quantized."""
    if source.build_quantized is None:
        return None
    return source.build_quantized(*[tensors[part].hollow() for part in source.names])


# Temporary tensors fragment the heap. Returning freed memory to the system takes milliseconds, so it is done
# only after this many bytes of the file, or after 1 / `_TRIM_PARTS` of the file if that is more.
_TRIM_AFTER = 8 << 20
_TRIM_PARTS = 32
_SAMPLED_ROWS = 64  # rows of a weight on which its rounding error is measured
# functions that initialize weights, which modules call when they are built
INITIALIZERS = {init.constant_, init.kaiming_uniform_, init.normal_, init.uniform_}


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """Create modules on the meta device without running initializers, which would load torch's compiler."""
    with torch.device("meta"), _SkipInitializers():
        yield


class _SkipInitializers(TorchFunctionMode):
    """Mode in which torch's weight initializers return the tensor unchanged."""

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
    label: str = "this model",
    quantized: QuantizedLoading | None = None,
    host: HostWeightMemory | None = None,
    check: Callable[[], None] | None = None,
    on_tensor_loaded: Callable[[str], None] | None = None,
) -> None:
    """Fill a module that was built on the meta device, tensor by tensor.

    1. Compare names and shapes of the module and the file.
    2. Load each tensor directly to its device and dtype, without gradients; read none on the meta device.
    3. Reject values that are NaN or infinite, and release temporary memory.

    Args:
        module: Network to fill.
        checkpoint: Open file.
        sources: How each tensor is built from the file's tensors, by name in the module's state dict.
        device: Device of the network.
        dtype: Takes a state-dict name and the dtype in the file, and returns the target dtype.
        patch: Takes a state-dict name, the weight before rounding, and the target dtype, and returns the
            changed weight, for example with LoRAs added.
        ignore: Patterns (`*`) of tensors in the file that may be unused.
        label: Option or network, for messages.
        quantized: Which weights stay or become quantized, in which format; None if there are none.
        host: Keeps some of the tensors in host memory; their values are still computed on `device`.
        check: Called before each tensor, and may raise to stop loading; replaces the progress bar.
        on_tensor_loaded: Called with each name after its tensor is loaded.

    Raises:
        CheckpointError: If tensors are missing, unexpected or misshaped (checked before any is read), or if
            values are NaN or infinite.
        OptionError: If the device does not support the quantization format.
    """
    if quantized is not None and quantized.format is not None:
        quantized.format.check_device(device)
    # compare names and shapes before any tensor is read
    targets = module.state_dict()
    _check_fit(targets, checkpoint, sources, ignore=ignore, label=label)
    dtypes, sizes = {}, {}
    for name in targets:
        infos = [checkpoint.tensors[stored_name] for stored_name in sources[name].names]
        dtypes[name] = dtype(name, infos[0].dtype)
        sizes[name] = sum(info.size_bytes for info in infos)
    loader = _TensorLoader(
        module,
        checkpoint,
        sources,
        dtypes=dtypes,
        device=device,
        patch=patch,
        quantized=quantized,
        host=host,
    )
    shows_progress = check is None and device.type != "meta"
    for name in _iterate_with_progress(sizes, checkpoint.path, device, shows_progress):
        if check is not None:
            check()
        loader.load(name)
        if on_tensor_loaded is not None:
            on_tensor_loaded(name)
    # checks on a GPU are read only now, because reading one waits for all copies to the GPU
    if loader.finite_checks and not all(torch.stack([*loader.finite_checks.values()]).tolist()):
        bad_names = [name for name, is_good in loader.finite_checks.items() if not is_good]
        raise make_non_finite_error(checkpoint.path, bad_names)
    del loader.read_buffer
    release_heap()
    if device.type == "cuda":
        release_pinned_memory()
    if quantized is not None:
        _log_quantization(quantized, loader, label)
    if loader.on_host and host is not None:
        host.finish()


def _iterate_with_progress(
    sizes: Mapping[str, int], path: Path, device: torch.device, shows_progress: bool
) -> Iterator[str]:
    """Yield the names of the tensors to load with a progress bar, and release the heap now and then."""
    total = sum(sizes.values())
    names = track(
        sizes,
        f"Loading {path.name}",
        total=total,
        size=sizes.__getitem__,
        unit=BYTES,
        shown=shows_progress,
    )
    release_after = max(_TRIM_AFTER, total // _TRIM_PARTS)
    bytes_since_release = 0
    for name in names:
        yield name
        bytes_since_release += sizes[name]
        if device.type == "cpu" and bytes_since_release > release_after:
            release_heap()
            bytes_since_release = 0


def _log_quantization(quantized: QuantizedLoading, loader: "_TensorLoader", network_name: str) -> None:
    """Log the quantization formats of loaded layers and their rounding errors, which must be finite."""
    new_format = "" if quantized.format is None else quantized.format.name
    for format_name, num_layers in Counter(loader.kept_formats).items():
        logger.info("%s: %d linear layers stay in %s, as in the file", network_name, num_layers, format_name)
    names_by_format: dict[str, list[str]] = {}
    for name in loader.rounding_errors:
        names_by_format.setdefault(loader.rounded_formats[name], []).append(name)
    for format_description, names in names_by_format.items():
        errors = torch.stack([loader.rounding_errors[name].cpu() for name in names])
        # an error is NaN after merging a damaged LoRA; values in the model's file were checked before
        for name, is_finite_error in zip(names, errors.isfinite().tolist(), strict=True):
            if not is_finite_error:
                raise CheckpointError(
                    f"{network_name}: {name} has NaN or infinite values, which {new_format} cannot "
                    "represent. Copy the file again."
                )
        logger.info(
            "%s: %d linear layers %s, relative error %.2f %% (%.2f to %.2f %%)",
            network_name,
            len(errors),
            format_description,
            100 * float(errors.mean()),
            100 * float(errors.min()),
            100 * float(errors.max()),
        )


MAX_ERRORS = 100  # lines of a message about missing and unexpected tensors
_ALIGNMENT = 64  # bytes; tensors begin at multiples of it in the read buffer


class _TensorLoader:
    """Loads the tensors of one network and assigns them to its parameters."""

    def __init__(
        self,
        module: nn.Module,
        checkpoint: Checkpoint,
        sources: Mapping[str, TensorSource],
        *,
        dtypes: Mapping[str, torch.dtype],
        device: torch.device,
        patch: WeightPatch | None,
        quantized: QuantizedLoading | None,
        host: HostWeightMemory | None,
    ) -> None:
        """Store the arguments of `load_module`, and allocate host memory and the read buffer."""
        self._module = module
        self._checkpoint = checkpoint
        self._sources = sources
        self._dtypes = dtypes
        self._device = device
        self._patch = patch
        self._quantized = quantized
        self._shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        self.on_host: Mapping[str, Tensor] = {}  # memory for the tensors that stay on the host
        if host is not None and device.type != "meta":
            infos = {name: self._describe_target(name) for name in self._shapes}
            self.on_host = host.allocate_on_host(module, infos)
        # False if another process writes the weights into shared memory
        self._is_written_by_this_process = host is None or host.is_written_by_this_process
        # scalar bools by name in the file; empty on the CPU, where values are checked immediately
        self.finite_checks: dict[str, Tensor] = {}
        self.rounding_errors: dict[str, Tensor] = {}  # relative rounding errors, by state-dict name
        self.rounded_formats: dict[str, str] = {}  # description of the format for the log, by state-dict name
        self.kept_formats: list[str] = []  # format of each weight that is loaded as stored
        # one buffer for all reads, because temporary tensors would fragment the heap
        # it has room for the stored tensors that any one tensor of the network is built from
        buffer_bytes = 0
        for name in dtypes if device.type != "meta" else ():
            parts = [checkpoint.tensors[stored_name] for stored_name in sources[name].names]
            buffer_bytes = max(buffer_bytes, sum(part.size_bytes + _ALIGNMENT for part in parts))
        if device.type == "cuda":
            self.read_buffer = empty_pinned([buffer_bytes], torch.uint8)
        else:
            self.read_buffer = torch.empty(buffer_bytes, dtype=torch.uint8)

    def _describe_target(self, name: str) -> TensorInfo:
        """Return the dtype and shape that a tensor will have in the loaded model."""
        if self._quantized is not None and name in self._quantized:
            weight = self._empty_quantized(name, self._quantized).weight
            return TensorInfo(weight.dtype, tuple(weight.shape))
        return TensorInfo(self._dtypes[name], self._shapes[name])

    def load(self, name: str) -> None:
        """Load one tensor of the network and assign it to its parameter or buffer."""
        layer_name, _, parameter_name = name.rpartition(".")
        layer = self._module.get_submodule(layer_name)
        if self._quantized is not None and name in self._quantized:
            assert isinstance(layer, nn.Linear)
            attach(layer, self._load_quantized(name, layer, self._quantized))
            return
        tensor = self.on_host.get(name)
        if tensor is None:
            tensor = torch.empty(self._shapes[name], dtype=self._dtypes[name], device=self._device)
            self._write_values(name, tensor)
        elif self._is_written_by_this_process:
            self._write_values(name, tensor)
        elif self._patch is not None:
            # another process writes the values; this call only records that the patch was used
            dtype = self._dtypes[name]
            self._patch(name, torch.empty(tensor.shape, dtype=dtype, device="meta"), dtype)
        if parameter_name in layer._parameters:
            layer._parameters[parameter_name] = nn.Parameter(tensor, requires_grad=False)
        else:
            layer._buffers[parameter_name] = tensor

    def _load_quantized(self, name: str, layer: nn.Linear, plan: QuantizedLoading) -> QuantizedWeight:
        """Return a quantized weight: as in the file, or quantized after LoRAs were added."""
        # If processes on one machine share weights in host memory, one of them writes the packed weight. Each
        # process has its own scales, which are small.
        if self._device.type == "meta":
            loaded = self._empty_quantized(name, plan)
        elif name in plan.quantized_in_file:
            # Read a quantized weight without changing it; its tensors may be views of `read_buffer`
            source = self._sources[name]
            padded_weight = source.make_quantized(self._read_parts(source))
            assert padded_weight is not None
            self.kept_formats.append(padded_weight.format.name)
            shape = (layer.out_features, layer.in_features)
            loaded = QuantizedWeight(padded_weight.format, shape, padded_weight.tensors)
        else:
            assert plan.format is not None
            loaded = self._quantize(name, plan.format)
        weight_format = loaded.format
        if plan.format is not None:  # use the compute settings that the user chose
            weight_format = weight_format.adopt_compute_settings(plan.format)
        weight, *scales = loaded.tensors
        assert weight is not None
        host_weight = self.on_host.get(name)
        if host_weight is not None:
            weight = host_weight.copy_(weight) if self._is_written_by_this_process else host_weight
        elif name in plan.quantized_in_file and self._device.type != "meta":
            weight = weight.clone()  # it may be a view of the buffer, which the next tensor overwrites
        scale_copies = [None if scale is None else scale.clone() for scale in scales]
        return QuantizedWeight(weight_format, loaded.shape, (weight, *scale_copies))

    def _quantize(self, name: str, form: QuantizationFormat) -> QuantizedWeight:
        """Quantize a weight after LoRAs were merged into it, and record its rounding error."""
        first_part = self._sources[name].names[0]
        weight = self._compute_unrounded(name, self._checkpoint.tensors[first_part].dtype)
        quantized_weight = form.quantize(weight)
        # Sum |error| / sum |weight| of a quantized weight, on sampled rows; NaN for non-finite scales
        sample = weight[:: max(1, len(weight) // _SAMPLED_ROWS)]
        rounded = quantized_weight.format.quantize(sample).dequantize()
        exact = sample.float()
        smallest = torch.finfo(torch.float32).tiny  # avoids a division by zero if all weights are zero
        error = (rounded - exact).abs().sum() / exact.abs().sum().clamp_min(smallest)
        for scale in quantized_weight.tensors[1:]:
            if scale is not None:
                error = error + 0 * scale.float().sum()  # 0 * NaN and 0 * infinity are NaN
        self.rounding_errors[name] = error
        self.rounded_formats[name] = quantized_weight.format.log_description
        return quantized_weight

    def _empty_quantized(self, name: str, plan: QuantizedLoading) -> QuantizedWeight:
        """Return a layer's weight as an empty quantized weight on the meta device."""
        empty: QuantizedWeight | None = None
        if name in plan.quantized_in_file:
            empty = read_quantized_on_meta(self._sources[name], self._checkpoint.tensors)
        elif plan.format is not None:
            rows, columns = self._shapes[name]
            empty = plan.format.empty((rows, columns))
        assert empty is not None
        return empty

    def _write_values(self, name: str, tensor: Tensor) -> None:
        """Write the values of one network tensor into the preallocated `tensor`."""
        if tensor.device.type == "meta":
            return
        source = self._sources[name]
        stored_name = source.names[0]
        # without `build`, the tensor is read from the file unchanged
        is_unchanged = source.build is None and self._checkpoint.tensors[stored_name].dtype == tensor.dtype
        if self._patch is not None or not is_unchanged:
            tensor.copy_(self._compute_unrounded(name, tensor.dtype))
            return
        # read directly into the network's memory, without an intermediate copy
        if tensor.device.type == "cpu":
            self._checkpoint.read(stored_name, tensor)
        else:
            tensor.copy_(self._checkpoint.borrow(stored_name, self.read_buffer))
        self._check_finite(stored_name, tensor)

    def _compute_unrounded(self, name: str, target: torch.dtype) -> Tensor:
        """Compute a tensor on the device, not yet cast to `target`; it may be a view of `read_buffer`."""
        source = self._sources[name]
        tensor = source.build_tensor(self._read_parts(source))
        if tensor.ndim != len(self._shapes[name]):
            tensor = tensor.view(add_leading_axes(tuple(tensor.shape), len(self._shapes[name])))
        if self._checkpoint.tensors[source.names[0]].packing is not None:
            # packed weights may be padded, so keep only the network's rows and columns
            tensor = tensor[tuple(slice(length) for length in self._shapes[name])]
        if self._patch is None:
            return tensor
        if tensor.dtype.itemsize == 1 and tensor.is_floating_point():
            # rounding to fp8 would lose a LoRA's small change
            tensor = tensor.to(target if target.itemsize > 1 else torch.float32)
        return self._patch(name, tensor, target)

    def _read_parts(self, source: TensorSource) -> list[Tensor]:
        """Read the stored tensors that a source is built from; they may be views of `read_buffer`."""
        parts: list[Tensor] = []
        start = 0
        for part in source.names:
            tensor = self._checkpoint.borrow(part, self.read_buffer[start:]).to(self._device)
            parts.append(tensor)
            self._check_finite(part, tensor)
            if len(source.names) > 1:  # the next part is read into the buffer after this one
                start += round_up(self._checkpoint.tensors[part].size_bytes, _ALIGNMENT)
        return parts

    def _check_finite(self, part: str, tensor: Tensor) -> None:
        """Check a tensor of the file for NaN and infinite values."""
        # On the CPU, an error is raised immediately. Copies to other devices are asynchronous, and reading
        # the result of a check would wait for them, so these results are collected and read after loading.
        has_finite_values = is_finite(tensor)
        if tensor.device.type != "cpu":
            self.finite_checks[part] = has_finite_values
        elif not has_finite_values:
            raise explain_non_finite(self._checkpoint.path, part, tensor)


def _check_fit(
    targets: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    *,
    ignore: Sequence[str],
    label: str,
) -> None:
    """Raise CheckpointError with up to MAX_ERRORS lines for missing, unexpected or misshaped tensors."""
    missing = set()
    for name in targets:
        stored_names = sources[name].names if name in sources else ()
        if not stored_names or any(stored_name not in checkpoint.tensors for stored_name in stored_names):
            missing.add(name)
    unexpected = _find_unexpected(targets, checkpoint, sources, ignore)
    misshaped = []
    for name, tensor in targets.items():
        if name in missing:
            continue
        needed_shape = tuple(tensor.shape)
        infos = [checkpoint.tensors[stored_name] for stored_name in sources[name].names]
        shape: tuple[int, ...] | None = infos[0].shape
        if sources[name].build is not None:
            shape = _infer_shape(sources[name], infos)
        if shape is not None and len(shape) < len(needed_shape):
            shape = add_leading_axes(shape, len(needed_shape))
        packing = infos[0].packing
        if shape != needed_shape and (packing is None or shape != packing.padded(needed_shape)):
            misshaped.append(f"  {name}: the file has {_sizes(shape)}, {_sizes(needed_shape)} is needed")
    if missing or unexpected or misshaped:
        raise _make_fit_error(checkpoint.path, label, missing, unexpected, misshaped)


def _make_fit_error(
    path: Path, label: str, missing: Collection[str], unexpected: Collection[str], misshaped: Sequence[str]
) -> CheckpointError:
    """Return the error for a file that does not fit; `misshaped` has a line for each misshaped tensor."""
    lines = [f"  missing: {line}" for line in compress_names(missing)]
    lines += [f"  unexpected: {line}" for line in compress_names(unexpected)]
    lines += misshaped
    if len(lines) > MAX_ERRORS:
        lines = [*lines[:MAX_ERRORS], f"  and {len(lines) - MAX_ERRORS:,} lines like these"]
    text = "\n".join(lines)
    return CheckpointError(
        f"{path} does not fit {label}:\n{text}\n  Pass the complete file of that model.", path
    )


def _find_unexpected(
    targets: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    ignore: Sequence[str],
) -> list[str]:
    """Return tensor names in the file that no target uses and no pattern ignores."""
    read_names: set[str] = set()  # names in the file that this network's tensors are read from
    unneeded_names: set[str] = set()  # names in the file for tensors that this network does not have
    for name, source in sources.items():
        if name in targets:
            read_names.update(source.names)
        else:
            unneeded_names.update(source.names)
    unexpected = []
    for name in checkpoint.tensors:
        if name in read_names:
            continue
        # scales of quantized weights are ignored, unless the name belongs to a weight
        patterns = ignore if name in unneeded_names else (*ignore, *QUANTIZATION_EXTRAS)
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            unexpected.append(name)
    return unexpected


def _infer_shape(source: TensorSource, infos: Sequence[TensorInfo]) -> tuple[int, ...] | None:
    """Return the shape of a tensor built from stored tensors; None if their shapes do not match."""
    try:
        return tuple(source.build_tensor([info.hollow() for info in infos]).shape)
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
    """Merge tensor names that differ only in their first number into one name with a range; sort the result.

    `blocks.0.weight` to `blocks.39.weight` become `blocks.{0..39}.weight`.
    """
    groups: dict[tuple[str, str], list[int]] = {}  # text before and after the number -> numbers
    for name in names:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)  # a number between two dots
        if match is None:
            groups.setdefault((name, ""), [])  # a name without a number has its own group
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
    """Group sorted numbers into runs of consecutive numbers; return (first, last) of each run."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
