"""Load transformers of all families: remove prefixes, choose dtypes, fill the network."""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from checkpoints.filling import (
    QuantizedLoading,
    find_quantized_weights,
    linear_weights,
    load_module,
    on_meta_device,
    read_quantized_on_meta,
)
from checkpoints.kinds import UNSUPPORTED_MODELS, describe_file_kind
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint, reject_quantized
from checkpoints.stored.forms import QuantizationFormat, make_quantization_format
from checkpoints.unused import UnusedTensors
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.speed_options import BASE_FORMS, Quantization
from protocols.family import DitSpec
from protocols.loading import Placement, TensorSource

logger = logging.getLogger(__name__)

PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.diffusion_model.",
    "model.model.",
    "diffusion_model.",
    "ema.diff_dec.",  # of Bernini-R's trainer, before the network's own prefix
    "diff_dec.",
    "transformer.",
    "transformer_2.",
    "net.",
)
# prefixes of other networks in all-in-one files
OTHER_NETWORKS = (
    "vae.",
    "first_stage_model.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
    "audio_vae.",
    "vocoder.",
    "text_embedding_projection.",
    "scaled_fp8",
    "diff_dec.",  # a copy without averaging, next to the averaged one
)
# Rounding errors of the last blocks go directly into the velocity, while later blocks compensate for errors
# of earlier ones. In the pocket model, two of eight blocks cause three quarters of the loss that fp8 adds. In
# Wan 14B, two of forty blocks are 5 % of what fp8 gains.
LAST_IN_16_BITS = 2
FP8_COMPUTE = torch.bfloat16  # compute dtype of an fp8 file


class DitConfig(Protocol):
    """Dimensions of a transformer, read from its tensor shapes."""

    @property
    def dim(self) -> int:
        """Hidden size of the transformer."""

    @property
    def kind(self) -> str:
        """Return the task of the model, such as t2v or i2v."""


Config = TypeVar("Config", bound=DitConfig)
Dit = TypeVar("Dit", bound=nn.Module)


@dataclass(frozen=True)
class DitHeader(Generic[Config]):
    """Dimensions, naming and dtype of a transformer, read from the header of its file."""

    config: Config
    dialect: str  # naming scheme in the file, such as official or diffusers
    block_dtype: torch.dtype  # dtype of block weights in the file

    @property
    def compute_dtype(self) -> torch.dtype:
        """Compute dtype of the blocks: the dtype of their weights, or bfloat16 if the weights are 8-bit."""
        return self.block_dtype if self.block_dtype.itemsize > 1 else FP8_COMPUTE


@dataclass(frozen=True)
class DitFormat(Generic[Config, Dit]):
    """How to recognize and read the transformer files of a model family."""

    # takes a checkpoint without prefixes; raises CheckpointError for files of other families
    read_bare: Callable[[Checkpoint], DitHeader[Config]]
    describe: Callable[[DitHeader[Config]], str]  # for messages: "a FLUX.1 dev transformer"
    network: Callable[..., Dit]  # takes the config, the attention, and other arguments of `load`
    # returns how each tensor is built from the file, by published name
    sources: Callable[[Checkpoint, DitHeader[Config]], Mapping[str, TensorSource]]
    option: str = "--dit"
    ignore: tuple[str, ...] = ()  # patterns of tensor names in files that the network lacks
    # Some releases order the rows of fused tensors differently in their shards and in their single file.
    # Returns functions, by name in the file, that restore the order of the single file
    single_file_row_orders: Callable[
        [Checkpoint, DitHeader[Config]], Mapping[str, Callable[[Tensor], Tensor]]
    ] = lambda *_: {}
    # joins the two files of a model, the first without prefixes; None: `Checkpoint.join`
    add_second: Callable[[Checkpoint, Checkpoint], Checkpoint] | None = None

    def read_header(self, checkpoint: Checkpoint) -> DitHeader[Config]:
        """Read the dimensions, naming and dtype of a transformer from an open file.

        Raises:
            CheckpointError: If the file is not a supported transformer.
        """
        checkpoint = bare_names(checkpoint)
        # checked first, because some unsupported models have all tensors of a supported model
        kind = next(
            (description for name, description in UNSUPPORTED_MODELS if name in checkpoint.tensors), None
        )
        if kind is None:
            reject_quantized(checkpoint)
            try:
                return self.read_bare(checkpoint)
            except CheckpointError:
                kind = describe_file_kind(
                    checkpoint.tensors, UNSUPPORTED_MODELS
                )  # names may have unknown prefixes
                if kind is None:
                    raise
        raise CheckpointError(
            f"{checkpoint.path} is {kind}.\n  Pass the transformer of a model that this script runs to "
            f"{self.option}.",
            checkpoint.path,
        )

    def identify(self, path: Path) -> str | None:
        """Return a description of a transformer file of this family; None for any other file."""
        try:
            with open_checkpoint(path) as checkpoint:
                return f"it is {self.describe(self.read_header(checkpoint))} ({self.option})"
        except CheckpointError:
            return None

    def load(self, path: Path, placement: Placement, *settings: Any, second_file: Path | None = None) -> Dit:
        """Load a transformer tensor by tensor to its device and dtype, in eval mode, without gradients.

        Weights have the dtype from `select_dtype`, with two exceptions: some layers are always float32, and
        if `placement.keep_file_dtypes` is set, each layer has the dtype of its weight in the file.

        Args:
            path: File of the transformer.
            placement: Device, dtypes and patch. The patch is called with published parameter names.
            *settings: Other arguments of `network`.
            second_file: File with additional tensors of the transformer, if any.

        Raises:
            CheckpointError: If the file has a different model, is incomplete or has unknown tensors, or if
                fp8 weights would have to be rounded again.
        """
        with self._open(path, second_file) as checkpoint:
            # build the network without allocating weights
            header = self.read_header(checkpoint)
            description = self.describe(header)
            weight_dtype = select_dtype(header.block_dtype, placement)
            with on_meta_device():
                dit = self.network(header.config, placement.attention, *settings)
            spec = dit.spec
            assert isinstance(spec, DitSpec)
            counts = " + ".join(str(len(blocks)) for blocks in spec.blocks(dit).values())
            size = f"{counts} blocks of width {header.config.dim}"
            logger.info("Loading %s: %s, %s, as %s", path, description, size, dtype_name(weight_dtype))
            sources = self.sources(checkpoint, header)

            def select_tensor_dtype(name: str, file_dtype: torch.dtype) -> torch.dtype:
                """Return the dtype to load a tensor in, given its dtype in the file."""
                if spec.stays_float32(name):
                    return torch.float32
                if placement.keep_file_dtypes:
                    file_dtype = _find_layer_dtype(name, checkpoint, sources, default=file_dtype)
                    return file_dtype if file_dtype.itemsize > 1 else weight_dtype
                return weight_dtype

            sharder = placement.block_sharder
            load_module(
                dit,
                checkpoint,
                sources,
                device=placement.device,
                dtype=select_tensor_dtype,
                patch=placement.patch,
                ignore=self.ignore,
                label=description,
                quantized=select_quantized_layers(dit, checkpoint, sources, placement=placement, spec=spec),
                host=placement.host_weights,
                check=placement.check,
                on_tensor_loaded=None if sharder is None else sharder.watch(dit),
            )
            # record what full fine-tuning needs to save the model like the source file
            saved_dtypes = _select_saved_dtypes(checkpoint, sources, weight_dtype, header.block_dtype)
            dit.saved_dtypes = saved_dtypes  # type: ignore[assignment]
            names = dit.state_dict().keys()
            unused = {name: source for name, source in sources.items() if name not in names}
            if unused:  # full fine-tuning copies them to its output, for which it opens the file again
                reopen = functools.partial(self._open, path, second_file)
                dit.unused_tensors = UnusedTensors(unused, reopen)  # type: ignore[assignment]
        return dit.eval()

    def _open(self, path: Path, second_file: Path | None) -> Checkpoint:
        """Open a transformer's file, or its two files, as one checkpoint, which closes all of them."""
        checkpoint = bare_names(open_checkpoint(path))
        if second_file is None:
            return checkpoint
        try:
            second = open_checkpoint(second_file)
        except BaseException:
            checkpoint.close()
            raise
        if self.add_second is None:
            return checkpoint.join(bare_names(second))
        return self.add_second(checkpoint, second)


def _find_layer_dtype(
    name: str, checkpoint: Checkpoint, sources: Mapping[str, TensorSource], default: torch.dtype
) -> torch.dtype:
    """Return the dtype of a layer's weight in the file, which its bias gets too; `default` if it has none."""
    weight = name.removesuffix("bias") + "weight" if name.endswith(".bias") else name
    if weight not in sources:
        return default
    return checkpoint.tensors[sources[weight].names[0]].dtype


def _select_saved_dtypes(
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    weight_dtype: torch.dtype,
    block_dtype: torch.dtype,
) -> dict[str, torch.dtype]:
    """Return the dtypes in which a trained 16-bit transformer is saved, by published name."""
    # Tensors that are float32 in the file stay float32; all others are saved in `weight_dtype`, even if they
    # are float32 in memory. Returns {} if the file or the transformer is not in 16 bits: weights are then
    # saved in their dtypes in memory.
    if weight_dtype.itemsize != 2 or block_dtype.itemsize != 2:
        return {}
    saved_dtypes = {}
    for name, source in sources.items():
        file_dtype = checkpoint.tensors[source.names[0]].dtype
        saved_dtypes[name] = file_dtype if file_dtype.itemsize > 2 else weight_dtype
    return saved_dtypes


def own_names(checkpoint: Checkpoint, _: object) -> Mapping[str, TensorSource]:
    """Return the sources of a checkpoint whose tensors already have their published names.

    The second argument, the file header that other formats need, is ignored.
    """
    return list_tensor_sources(checkpoint)


def bare_names(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint without the name prefixes that trainers and all-in-one files add."""
    return checkpoint.without_prefix(*PREFIXES, ignored_prefixes=OTHER_NETWORKS)


def select_dtype(block_dtype: torch.dtype, placement: Placement) -> torch.dtype:
    """Return the weight dtype: `compute_dtype` if set, else `storage_dtype` if set, else the file's dtype."""
    if block_dtype.itemsize == 1:
        block_dtype = placement.fp8_compute_dtype or FP8_COMPUTE
    return placement.compute_dtype or placement.storage_dtype or block_dtype


def with_dtype(placement: Placement, dit_dtype: torch.dtype | None) -> Placement:
    """Set --dit_dtype as the compute dtype of a placement that has none."""
    has_dtype = placement.compute_dtype is not None or placement.storage_dtype is not None
    return placement if has_dtype else replace(placement, compute_dtype=dit_dtype)


def select_quantized_layers(
    dit: nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    *,
    placement: Placement,
    spec: DitSpec,
) -> QuantizedLoading | None:
    """Select the linear layers to load in 8 or 4 bits: quantized in the file, or selected by options.

    If layers also multiply in 8 bits, the last `LAST_IN_16_BITS` blocks stay in 16 bits.

    Raises:
        CheckpointError: If the options would quantize weights that already have a different quantized format.
    """
    if placement.quantization is not None:
        return _select_requested_layers(dit, checkpoint, sources, placement, spec, placement.quantization)
    if all(source.build_quantized is None for source in sources.values()):
        return None
    quantized_in_file = find_quantized_weights(
        linear_weights(dit), sources, checkpoint.tensors, format_is_requested=False
    )
    if not quantized_in_file:
        return None
    unmerged = _without_merged_weights(quantized_in_file, dit, checkpoint.path, placement)
    return QuantizedLoading(None, quantized_in_file=unmerged)


def _select_requested_layers(
    dit: nn.Module,
    checkpoint: Checkpoint,
    sources: Mapping[str, TensorSource],
    placement: Placement,
    spec: DitSpec,
    quantization: Quantization,
) -> QuantizedLoading:
    """Select the layers to load in the quantized format that an option sets."""
    blocks_in_16_bits = _list_blocks_in_16_bits(dit, spec) if quantization.fp8_matmul else ()

    def without_16_bit_blocks(names: frozenset[str]) -> frozenset[str]:
        return frozenset(name for name in names if not name.startswith(blocks_in_16_bits))

    new_format: QuantizationFormat | None = make_quantization_format(quantization)
    linear_names = without_16_bit_blocks(linear_weights(dit, spec.block_lists))
    quantized_in_file = find_quantized_weights(
        linear_names, sources, checkpoint.tensors, format_is_requested=True
    )
    is_file_unquantized = not quantized_in_file
    if is_file_unquantized:
        exclude = spec.form_exclude.get(quantization.form, spec.fp8_exclude)
        to_quantize = without_16_bit_blocks(linear_weights(dit, spec.block_lists, exclude))
        return QuantizedLoading(new_format, to_quantize)
    if have_chosen_form(quantization, quantized_in_file, sources, checkpoint):
        logger.info(
            "%s: %s is already in %s and is not changed",
            quantization.option_name,
            checkpoint.path,
            quantization.form,
        )
        new_format = None  # nothing is left to quantize
    elif quantization.kind != "cast":  # a plain cast (--fp8) leaves quantized layers as in the file
        infos = [checkpoint.tensors[sources[name].names[0]] for name in quantized_in_file]
        is_packed = any(info.packing is not None for info in infos)
        raise _make_quantized_error(checkpoint.path, quantization.option_name, is_packed)
    # layers that are in 16 bits in a quantized file stay in 16 bits
    unmerged = _without_merged_weights(quantized_in_file, dit, checkpoint.path, placement)
    return QuantizedLoading(new_format, quantized_in_file=unmerged)


def _list_blocks_in_16_bits(dit: nn.Module, spec: DitSpec) -> tuple[str, ...]:
    """Return name prefixes of the `LAST_IN_16_BITS` blocks that run last; () if there are few blocks."""
    counts = []
    names = []
    for name, blocks in spec.blocks(dit).items():
        counts.append(len(blocks))
        names += [f"{name}.{index}." for index in range(len(blocks))]
    in_order = [names[index] for index in spec.execution_order(counts)]
    if len(in_order) < 4 * LAST_IN_16_BITS:
        return ()
    return tuple(in_order[-LAST_IN_16_BITS:])


def _make_quantized_error(path: Path, flag: str, is_packed: bool) -> CheckpointError:
    """Return the error for an already quantized file, which the option `flag` cannot quantize again."""
    state = "quantized"
    instead = "layers stay as the file has them."
    if not is_packed:
        state = "in fp8"
        instead = (
            "--fp8_base (training) and --fp8 (generation) keep the file as it is. Or pass the bf16 file."
        )
    return CheckpointError(
        f"{flag}: {path} is already {state}; rounding it again would only lose more.\n"
        f"  Omit {flag}: {instead}",
        path,
    )


# formats whose rounding is deterministic, so that stored layers equal newly rounded ones
_SAME_FORMS = {form.name for form in BASE_FORMS if form.rounds_in_one_way}


def have_chosen_form(
    quantization: Quantization,
    names: frozenset[str],
    sources: Mapping[str, TensorSource],
    checkpoint: Checkpoint,
) -> bool:
    """Return whether all quantized weights in a file already have the format that the options select."""
    if quantization.form not in _SAME_FORMS or quantization.int8_backward:
        return False
    stored = [read_quantized_on_meta(sources[name], checkpoint.tensors) for name in names]
    return all(weight is not None and weight.format.name == quantization.form for weight in stored)


def _without_merged_weights(
    names: frozenset[str], dit: nn.Module, path: Path, placement: Placement
) -> frozenset[str]:
    """Return the quantized weights of a file into which no LoRA is merged; all others become 16-bit."""
    if placement.patch is None:
        return names
    weights = dit.state_dict()
    # called with a weight's name and shape; None: LoRAs are merged into all weights
    adds_lora_to_output = placement.leave_unmerged
    unmerged: set[str] = set()
    for name in names:
        if adds_lora_to_output is not None and adds_lora_to_output(name, tuple(weights[name].shape)):
            unmerged.add(name)
    if unmerged != names:
        logger.info(
            "%s: %d of %d stored layers are kept in 16 bits, because LoRAs are merged into them",
            path,
            len(names - unmerged),
            len(names),
        )
    return frozenset(unmerged)
