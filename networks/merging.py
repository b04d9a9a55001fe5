"""Merge LoRAs into model files, tensor by tensor, or into one LoRA."""
# Letters: R rank

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints.finite import check_finite
from checkpoints.opening import Checkpoint, checkpoint_paths, open_checkpoint
from checkpoints.quantizing import dequantized_on_read
from checkpoints.writing import save_tensors, stream_tensors
from modules.atomic_write import free_bytes
from modules.console import format_duration, format_size, list_some, show_box
from modules.devices import dtype_name, select_device
from modules.errors import CheckpointError, OptionError
from modules.options import Options, not_needed, option, unsupported
from modules.output_files import reject_replacing
from modules.text_files import real_path
from networks.apply import LoraPatch
from networks.depth_variants import fit_depths
from networks.key_formats import find_lora_families
from networks.kinds.factors import DOWN, UP, Factors
from networks.loading import LoraFile, WeightedLora, read_lora, read_weighted_loras
from networks.lora_network import get_prefix
from networks.metadata import add_hashes
from networks.module_factors import CPU, LORA_FACTORS, compute_scaling, group_by_module, to_meta_tensor
from networks.module_names import family_named, read_family
from networks.names.layouts import FIRST_LAYERS, TRAINED_ON, FamilyNames
from networks.rank_masks import read_rank_rule
from networks.rounding import LoraRounding
from networks.rows_by_head import with_stacked_rows
from networks.tensor_names import find_networks
from networks.text_loras import FullPatch, is_full, select_for_network, warn_about_other_encoders
from networks.use_options import NEAREST, LoraOptions, lora_rounding_option, multipliers_for, require_loras
from networks.writing import convert_to_our_layout, rename_to_aliases
from protocols.loading import TensorInfo
from protocols.rules import infer_expert_from_path

MERGE_CHANNELS_UNCHECKED = 16  # --dit_in_channels of merge_lora: the default disables the check
PRECISIONS = ("float", "fp16", "bf16")
BY_TENSOR = "models are always read and written tensor by tensor."
ONLY_NEEDED = "write only what loaders need to know"
EXACT_SUM = (
    "merging into a LoRA: add up the ranks, so that the sum is exact; by default, the best LoRA of the "
    "first file's rank is written"
)
MERGED_FAMILIES = ("sd1", "sd2", "sdxl")
LORA_MERGE_HINT = "it is for merging LoRAs into one"
# option of a model to merge into -> option of the result
FLUX_OUTPUTS = {"flux_model": "save_to", "clip_l": "clip_l_save_to", "t5xxl": "t5xxl_save_to"}
NO_SHUFFLE = not_needed("the merged LoRA is exact, in whatever order its ranks are.")

logger = getLogger(__name__)
FLUX = family_named("flux")
DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# option that sets a model -> prefix of the text encoder's modules in LoRA files; "": the transformer
MODEL_PREFIXES = {"clip_l": "lora_te1", "t5xxl": "lora_te3", "flux_model": ""}
_FLOAT_DTYPES = {torch.bfloat16, torch.float16, torch.float32, torch.float64}
_STALE = ("sshs_", "modelspec.hash_sha256")  # hashes of the model before the merge


class MergeOptions(Options):
    """Options of `merge_lora.py`."""

    dit: Path = option(
        "checkpoint of the model: a file, one of its shards, an index, or a folder",
        place="there",
        required=True,
    )
    dit_in_channels: int = option(
        "reject a checkpoint whose first layer has a different number of input channels; the default, 16, "
        "accepts any",
        default=MERGE_CHANNELS_UNCHECKED,
    )
    lora: LoraOptions
    lora_rounding: str = lora_rounding_option()
    expert: str | None = option(
        "the expert of Wan2.2 A14B that --dit is: selects its LoRA in a file for both, and warns of a LoRA "
        "for the other one; default: from the name of the file or folder",
        choices=("high_noise", "low_noise"),
    )
    save_merged_model: Path = option("safetensors file to write", place="safetensors", required=True)
    device: str | None = option("device that computes the deltas; default: CUDA if available, else the CPU")

    def __post_init__(self) -> None:
        require_loras(self.lora_rounding, [self.lora.lora_weight], "--lora_weight")


_MERGED: Mapping[str, Any] = {"place": "safetensors", "must_not_replace": ("models", *FLUX_OUTPUTS)}


class FluxMergeOptions(Options, must_give=True):
    """Options of `networks/flux_merge_lora.py`."""

    save_precision: str | None = option(
        f"type of the numbers to write: {', '.join(PRECISIONS)}; default: as read", one_of=PRECISIONS
    )
    precision: str = option(
        f"{', '.join(PRECISIONS)}; type of a merged LoRA if --save_precision is not given",
        default="float",
        one_of=PRECISIONS,
    )
    concat: bool = option(EXACT_SUM, excludes=("flux_model", "clip_l", "t5xxl"), hint=LORA_MERGE_HINT)
    flux_model: Path | None = option(
        "FLUX.1 or Chroma model to merge into, for --save_to", place="there", needs="save_to"
    )
    clip_l: Path | None = option(
        "CLIP-L to merge into, for --clip_l_save_to", place="there", needs="clip_l_save_to"
    )
    t5xxl: Path | None = option(
        "T5-XXL to merge into, for --t5xxl_save_to", place="there", needs="t5xxl_save_to"
    )
    working_device: str = option("device that computes, such as cuda", default="cpu")
    save_to: Path | None = option("file to write: the model, or the merged LoRA without a model", **_MERGED)
    clip_l_save_to: Path | None = option("file to write the merged CLIP-L to", needs="clip_l", **_MERGED)
    t5xxl_save_to: Path | None = option("file to write the merged T5-XXL to", needs="t5xxl", **_MERGED)
    models: tuple[Path, ...] | None = option("LoRA files to merge, of any dialect", place="there")
    ratios: tuple[float, ...] | None = option("strength of each file of --models")
    lora_rounding: str = lora_rounding_option(needs=tuple(FLUX_OUTPUTS))
    no_metadata: bool = option(ONLY_NEEDED)
    mem_eff_load_save = not_needed(BY_TENSOR)
    loading_device = not_needed("tensors are read one by one.", default="cpu")
    shuffle = NO_SHUFFLE
    diffusers = not_needed("names of diffusers are recognized automatically.")

    def __post_init__(self) -> None:
        if not self.models:
            raise OptionError("--models names no LoRA: pass the files to merge")
        check_ratios(self.models, self.ratios or ())
        if self.save_to is None and not self.targets:
            raise OptionError("--save_to is missing: pass the file to write the merged LoRA to")
        if self.save_to is not None and self.targets and self.flux_model is None:
            raise OptionError("--save_to is given without --flux_model: pass the model to merge into")
        typed_outputs = [getattr(self, name) for name in FLUX_OUTPUTS.values()]
        outputs = [real_path(path) for path in typed_outputs if path]
        if len(set(outputs)) < len(outputs):
            names = ", ".join(f"--{name}" for name in FLUX_OUTPUTS.values())
            raise OptionError(f"{names} are the same file: pass different ones")

    @property
    def targets(self) -> dict[str, Path]:
        """Model files to merge into, by the name of the option that sets the path."""
        models = {name: getattr(self, name) for name in FLUX_OUTPUTS}
        return {name: path for name, path in models.items() if path is not None}


class FullMergeOptions(Options):
    """Options of `networks/sdxl_merge_lora.py`."""

    save_precision: str | None = option("dtype of the result; default: the checkpoint's", choices=PRECISIONS)
    precision: str = option(
        "dtype of a merged LoRA if --save_precision is not given; sums are always computed in float",
        default="float",
        choices=PRECISIONS,
    )
    sd_model: Path | None = option(
        "single-file checkpoint to merge into; without it, the LoRAs are merged into one LoRA", place="there"
    )
    save_to: Path = option(
        "file to write: the checkpoint, or the merged LoRA",
        place="safetensors",
        must_not_replace=("models", "sd_model"),
        required=True,
    )
    models: tuple[Path, ...] = option(
        "LoRA files to merge, of any dialect", nargs="+", place="there", required=True
    )
    ratios: tuple[float, ...] = option("strength of each file of --models", nargs="+", required=True)
    lora_rounding: str = lora_rounding_option(needs="sd_model")
    no_metadata: bool = option(ONLY_NEEDED)
    concat: bool = option(EXACT_SUM, excludes="sd_model", hint=LORA_MERGE_HINT)
    family: str | None = option(
        "the model that the LoRAs are for, if one LoRA is written and neither their metadata nor their "
        "names and sizes show it",
        choices=MERGED_FAMILIES,
        excludes="sd_model",
        hint=LORA_MERGE_HINT,
    )
    shuffle = NO_SHUFFLE
    lbws = unsupported(
        "strengths of single blocks. Omit it, and pass one strength for each file to --ratios",
        "strengths of single blocks",
        nargs="*",
    )

    def __post_init__(self) -> None:
        check_ratios(self.models, self.ratios)


def check_ratios(models: Sequence[Path], ratios: Sequence[float]) -> None:
    """Raise OptionError unless there is one strength for each LoRA.

    Args:
        models: LoRA files.
        ratios: Strengths.
    """
    if len(models) != len(ratios):
        raise OptionError(
            f"--ratios has {len(ratios)} numbers for {len(models)} files of --models: pass one for each, in "
            "the same order"
        )
    multipliers_for(models, ratios, "--ratios")


def merge_dit(options: MergeOptions) -> None:
    """Merge LoRAs into a transformer file, and write the result.

    Raises:
        CheckpointError: If a file is unusable, or if the model lacks all modules of a LoRA.
        OptionError: If the output would replace an input.
        OutputError: If it cannot be written.
    """
    # the name of the file or its folder reveals the expert: `high_noise_model/` in the official repository,
    # `transformer/` and `transformer_2/` in diffusers
    folders = {prefix.removesuffix("."): expert for prefix, expert in find_networks().items()}
    expert = options.expert or infer_expert_from_path(options.dit, folders)
    files_and_multipliers = list(zip(options.lora.lora_weight or (), options.lora.multipliers(), strict=True))
    in_channels: int | None = options.dit_in_channels
    if in_channels == MERGE_CHANNELS_UNCHECKED:
        in_channels = None
    merge_into_file(
        model=options.dit,
        weighted_loras=[
            weighted_lora.for_expert(expert)
            for weighted_lora in read_weighted_loras(files_and_multipliers, with_texts=True)
        ],
        output=options.save_merged_model,
        device=select_device(options.device),
        in_channels=in_channels,
        rounding=options.lora_rounding,
    )


def merge_full(options: FullMergeOptions) -> None:
    """Merge Stable Diffusion LoRAs into a checkpoint (--sd_model), or without a checkpoint, into one LoRA.

    Raises:
        CheckpointError: If a file cannot be used, or if the model lacks all modules of a LoRA.
    """
    weighted_loras = _read_uses(options)
    if options.sd_model is None:
        _write_sum(options, options.save_to, weighted_loras, CPU)
        return
    merge_into_file(
        model=options.sd_model,
        weighted_loras=weighted_loras,
        output=options.save_to,
        device=CPU,
        dtype=_select_dtype(options),
        option="--save_to",
        rounding=options.lora_rounding,
    )


def merge_flux(options: FluxMergeOptions) -> None:
    """Merge FLUX LoRAs into the given transformer and text encoders, or without models, into one LoRA.

    Raises:
        CheckpointError: If a file cannot be used, or if a model lacks all modules of a LoRA.
        OptionError: If no LoRA changes a given model.
    """
    device = torch.device(options.working_device)
    weighted_loras = _read_uses(options)
    is_without_models = not options.targets
    if is_without_models:
        assert options.save_to is not None
        _write_sum(options, options.save_to, weighted_loras, device)
        return
    encoder_prefixes = {prefix for prefix in MODEL_PREFIXES.values() if prefix}
    # option that sets a model -> the LoRAs that change it
    loras_by_model = {
        name: select_for_network(weighted_loras, prefix, encoder_prefixes)
        for name, prefix in MODEL_PREFIXES.items()
    }
    for name, loras_of_model in loras_by_model.items():
        if loras_of_model and name not in options.targets:
            logger.warning(
                f"{len(loras_of_model)} of the LoRAs also change {name}, which is ignored because --{name} "
                "is missing"
            )
    for name, model in options.targets.items():
        option = FLUX_OUTPUTS[name]
        merge_into_file(
            model=model,
            weighted_loras=loras_by_model[name],
            output=getattr(options, option),
            device=device,
            dtype=_select_dtype(options),
            option=f"--{option}",
            rounding=options.lora_rounding,
        )


def _read_uses(options: FluxMergeOptions | FullMergeOptions) -> list[WeightedLora]:
    """Read the LoRA files to merge, each with its strength."""
    files = zip(options.models or (), options.ratios or (), strict=True)
    return [WeightedLora(read_lora(path, with_texts=True), ratio) for path, ratio in files]


def _select_dtype(options: FluxMergeOptions | FullMergeOptions) -> torch.dtype | None:
    """Return the dtype of the merged file; None to keep the base file's dtype."""
    return None if options.save_precision is None else DTYPES[options.save_precision]


def _write_sum(
    options: FluxMergeOptions | FullMergeOptions,
    output: Path,
    weighted_loras: Sequence[WeightedLora],
    device: torch.device,
) -> None:
    """Write the weighted sum of LoRAs as one LoRA file, and show a summary."""
    metadata = save_sum(options, output, weighted_loras, device)
    rows = [
        ("LoRAs", _list_files(weighted_loras)),
        ("result", f"{output} ({format_size(output.stat().st_size)})"),
        ("rank", metadata["ss_network_dim"]),
    ]
    show_box("The LoRAs are merged into one", rows)


def save_sum(
    options: FluxMergeOptions | FullMergeOptions,
    output: Path,
    weighted_loras: Sequence[WeightedLora],
    device: torch.device,
) -> dict[str, str]:
    """Save the weighted sum of LoRAs as one LoRA.

    Args:
        options: How to compute and write the sum.
        output: File to write.
        weighted_loras: The LoRAs with their strengths.
        device: Device to compute on.

    Returns:
        The metadata of the file, without hashes.

    Raises:
        CheckpointError: If the LoRAs have different sizes or models, or if their model is unknown.
        OutputError: If the file cannot be written.
    """
    dtype = _select_dtype(options) or DTYPES[options.precision]
    # Sum(multiplier * alpha / rank * up @ down) over all files as the tensors of one LoRA
    _reject_other_families([weighted_lora.lora for weighted_lora in weighted_loras])
    for weighted_lora in weighted_loras:
        rule = read_rank_rule(weighted_lora.lora.metadata)
        if rule is not None:  # trained with a rank mask, which a sum cannot apply
            logger.warning(rule.explain_merging(weighted_lora.lora.path))
    merged: dict[str, Tensor] = {}
    for name, summands in _list_summands(weighted_loras).items():
        total = _sum_factors(name, summands, device)
        if not options.concat and len(summands) > 1:
            total = _truncate(total, len(summands[0].factors[DOWN]))
        merged[f"{name}.{DOWN}"] = total.down.to("cpu", dtype).contiguous()
        merged[f"{name}.{UP}"] = total.up.to("cpu", dtype).contiguous()
        # equal to the rank: alpha / rank is in the factors
        merged[f"{name}.alpha"] = torch.tensor(float(len(total.down)))
    tensors = merged
    loras = [weighted_lora.lora for weighted_lora in weighted_loras]
    family = _find_merged_family(loras, tensors, options)
    metadata = _make_sum_metadata(loras, tensors, family, options.no_metadata)
    # the names that other programs know, which depend on the family
    renamed = in_known_names(tensors, read_family(metadata))
    save_tensors(output, renamed, add_hashes(renamed, metadata))
    return metadata


def _make_sum_metadata(
    loras: Sequence[LoraFile],
    tensors: Mapping[str, Tensor],
    family: FamilyNames | None,
    no_metadata: bool,
) -> dict[str, str]:
    """Return the metadata for a sum of LoRAs."""
    # a down factor has as many rows as its rank
    ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith(DOWN)}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    module, version = _name_module_and_version(family)
    metadata = {
        "ss_network_module": module,
        "ss_network_dim": rank,
        "ss_network_alpha": rank,  # the sum is not scaled: alpha / rank is 1
        "ss_network_args": "{}",
        TRAINED_ON: _get_first_metadata(loras, TRAINED_ON) or version,
    }
    if no_metadata:
        return metadata
    metadata["modelspec.merged_from"] = ", ".join(lora.path.name for lora in loras)
    architecture = _get_first_metadata(loras, "modelspec.architecture")
    if architecture is not None:
        metadata["modelspec.architecture"] = architecture
    return metadata


def _name_module_and_version(family: FamilyNames | None) -> tuple[str, str]:
    """Return the network module and the base model version for the metadata of a family's LoRA."""
    if family is None or family.name == "flux":
        return "networks.lora_flux", "flux1"
    if family.written_base_model:  # Stable Diffusion
        return "networks.lora", family.written_base_model
    return f"networks.lora_{family.name}", family.name


def _get_first_metadata(loras: Sequence[LoraFile], key: str) -> str | None:
    """Return the value of a metadata key from the first LoRA that has the key; None if no LoRA has it."""
    return next(filter(None, (lora.metadata.get(key) for lora in loras)), None)


def _find_merged_family(
    loras: Sequence[LoraFile], tensors: Mapping[str, Tensor], options: FluxMergeOptions | FullMergeOptions
) -> FamilyNames | None:
    """Return the family of a sum of LoRAs; None if it is unknown because only text encoders change."""
    if isinstance(options, FullMergeOptions) and options.family is not None:
        return family_named(options.family)
    by_metadata = next(filter(None, (read_family(lora.metadata) for lora in loras)), None)
    hint = None if by_metadata is None else by_metadata.name
    families = find_lora_families(group_by_module(tensors), hint)
    if isinstance(options, FluxMergeOptions) and (FLUX in families or not families):
        return FLUX  # if several families are possible, this tool's own
    if not families:  # only text encoders change
        families = [by_metadata] if by_metadata is not None else _find_families_by_encoders(tensors)
    if len(families) > 1:
        raise _make_ambiguous_error(loras, families)
    return families[0] if families else None


def _make_ambiguous_error(loras: Iterable[LoraFile], families: Sequence[FamilyNames]) -> CheckpointError:
    """Return the error for LoRAs that may be for several families."""
    names = [family.name for family in families]
    return CheckpointError(
        f"{list_some([str(lora.path) for lora in loras], 3)} can be for {' or '.join(names)}: all of "
        f"them have layers of these names and sizes.\n  Say which one, such as --family {names[0]}."
    )


def _find_families_by_encoders(tensors: Iterable[str]) -> list[FamilyNames]:
    """Return the Stable Diffusion families that have all the text encoders that these tensors change."""
    prefixes = {get_prefix(name) for name in tensors}
    families = map(family_named, MERGED_FAMILIES)
    return [family for family in families if prefixes <= {prefix for prefix, _ in family.encoders}]


def _list_files(weighted_loras: Sequence[WeightedLora]) -> str:
    """Return a text with one line per LoRA: its path and strength."""
    return "\n".join(
        f"{weighted_lora.lora.path}, strength {weighted_lora.multiplier:g}"
        for weighted_lora in weighted_loras
    )


def merge_into_file(
    model: Path,
    weighted_loras: Sequence[WeightedLora],
    output: Path,
    device: torch.device,
    in_channels: int | None = None,
    dtype: torch.dtype | None = None,
    option: str = "--save_merged_model",
    rounding: str = NEAREST,
) -> None:
    """Write the model with the LoRAs merged in as one safetensors file; keep names, dtypes and metadata.

    1. Open the model, and check that the LoRAs fit it.
    2. Plan the dtype of each written tensor.
    3. Read, change and write one tensor at a time.

    Peak memory: the LoRAs, one tensor of the model and some MB (for LoKr, also the tensor's change in
    float32).

    Args:
        model: File of the model.
        weighted_loras: LoRA files with their strengths.
        output: File to write.
        device: Device of the run.
        in_channels: Required input channels of the model's first layer.
        dtype: Dtype of the result's weights; None keeps the model's, or bfloat16 for quantized weights.
        option: Option that sets `output`, for messages.
        rounding: A value of `--lora_rounding`.

    Raises:
        CheckpointError: If a file is unusable, or if the model lacks all modules of a LoRA.
        OptionError: If the output would replace an input.
        OutputError: If it cannot be written.
    """
    start_time = time.monotonic()
    reject_replacing(
        option,
        output,
        [*checkpoint_paths(model), *(weighted_lora.lora.path for weighted_lora in weighted_loras)],
    )
    with open_checkpoint(model) as opened:
        checkpoint = with_stacked_rows(dequantized_on_read(opened))
        _check_in_channels(checkpoint, in_channels)
        lora_rounding = LoraRounding(rounding)
        patch = _make_patch(weighted_loras, checkpoint, model, lora_rounding)
        _check_fits(patch, checkpoint)
        # `dequantized_on_read` replaces the infos of quantized weights, so these are now different objects
        quantized = {name for name, info in checkpoint.tensors.items() if info is not opened.tensors[name]}
        infos = _list_written_tensors(checkpoint, quantized, dtype)
        size_bytes = sum(info.size_bytes for info in infos.values())
        _show_merge(model, weighted_loras, output, len(quantized), dtype or torch.bfloat16, size_bytes)
        merge = _WeightMerge(
            path=model,
            checkpoint=checkpoint,
            patch=patch,
            written_infos=infos,
            device=device,
            changes_dtypes=dtype is not None,
        )
        stream_tensors(
            output,
            infos,
            merge.read,
            metadata=_make_merged_metadata(checkpoint, model, weighted_loras),
            late_metadata=lambda: lora_rounding.metadata,  # complete only after all weights are rounded
        )
        lora_rounding.report()
    _show_result(output, time.monotonic() - start_time)


def _show_result(output: Path, seconds: float) -> None:
    """Print the size of the merged model, and how long the merge took."""
    rows = [
        ("Merged model", f"{output} ({format_size(output.stat().st_size)})"),
        ("time", format_duration(seconds)),
    ]
    show_box("Merging is finished", rows)


class _WeightMerge(NamedTuple):
    """Merges LoRAs into a model's weights as they are read."""

    path: Path  # of the model, for messages
    checkpoint: Checkpoint
    patch: LoraPatch | FullPatch
    written_infos: Mapping[str, TensorInfo]  # dtype and shape of each tensor in the merged file
    device: torch.device
    changes_dtypes: bool  # whether the result's dtype is given, not the model's

    def read(self, name: str) -> Tensor:
        """Read a tensor of the model, and add the LoRAs to it; return it in the dtype of the merged file."""
        tensor = self.checkpoint.read(name)  # not memory-mapped, so it may be changed in place
        check_finite(self.path, name, tensor)
        written_dtype = self.written_infos[name].dtype
        if not self.patch.changes_parameter(name):
            return tensor.to(written_dtype)
        # if the dtype changes, the sum stays in float32 and is rounded once
        weight = tensor.to(self.device, torch.float32) if self.changes_dtypes else tensor.to(self.device)
        return self.patch.add_to(name, weight, written_dtype).to(written_dtype)


def _show_merge(
    model: Path,
    weighted_loras: Sequence[WeightedLora],
    output: Path,
    num_quantized: int,
    dequantized_dtype: torch.dtype,
    size_bytes: int,
) -> None:
    """Print the files of a merge, the new dtype of quantized weights, and the size of the result."""
    # Warn if there are no LoRAs.
    rows = [("model", str(model)), ("LoRAs", _list_files(weighted_loras)), ("result", str(output))]
    if num_quantized:
        change = f"{num_quantized} quantized weights become {dtype_name(dequantized_dtype)}"
        rows.append(("precision", f"{change}; tools/quantise.py rounds them again"))
    free = format_size(free_bytes(real_path(output).parent))
    rows.append(("disk", f"{format_size(size_bytes)}; {free} free"))
    show_box("Merging", rows)
    if not weighted_loras:
        outcome = "has the values" if num_quantized else "becomes a copy"
        logger.warning(f"no --lora_weight is given: {output} {outcome} of {model}")


def _make_patch(
    weighted_loras: Sequence[WeightedLora], checkpoint: Checkpoint, model: Path, rounding: LoraRounding
) -> LoraPatch | FullPatch:
    """Return the weight patch for a file with a single network, or for a full checkpoint."""
    if is_full(checkpoint.tensors):
        return FullPatch(weighted_loras, checkpoint.tensors, model, rounding)
    for weighted_lora in weighted_loras:
        warn_about_other_encoders(weighted_lora, weighted_lora.lora.text_tensors, str(model), prefixes=())
    # blocks of LoRAs for a deeper or shallower model are mapped to this model's blocks
    weighted_loras = fit_depths(weighted_loras, checkpoint.tensors, model)
    return LoraPatch(weighted_loras, checkpoint.tensors, model, rounding=rounding)


def _make_merged_metadata(
    checkpoint: Checkpoint, model: Path, weighted_loras: Sequence[WeightedLora]
) -> dict[str, str]:
    """Return the model's metadata without its hashes, plus the names of the merged files."""
    metadata = {key: value for key, value in checkpoint.metadata.items() if not key.startswith(_STALE)}
    if weighted_loras:
        metadata["modelspec.merged_from"] = ", ".join(
            [model.name, *(weighted_lora.lora.path.name for weighted_lora in weighted_loras)]
        )
    return metadata


def _list_written_tensors(
    checkpoint: Checkpoint, quantized: Collection[str], dtype: torch.dtype | None
) -> dict[str, TensorInfo]:
    """Return the shapes and dtypes of a merged model's tensors, by name."""
    written: dict[str, TensorInfo] = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype in _FLOAT_DTYPES:  # integers keep their dtype
            default_dtype = torch.bfloat16 if name in quantized else info.dtype
            info = replace(info, dtype=dtype or default_dtype)
        written[name] = info
    return written


def _check_fits(patch: LoraPatch | FullPatch, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError before anything is written if a LoRA does not fit the model."""
    for name, info in checkpoint.tensors.items():
        patch.add_to(name, to_meta_tensor(info))
    patch.check()


def _check_in_channels(checkpoint: Checkpoint, in_channels: int | None) -> None:
    """Raise CheckpointError unless the first layer has `in_channels` inputs; None allows any number."""
    if in_channels is None:
        return
    layer = next((name for name in checkpoint.tensors if name.endswith(FIRST_LAYERS)), None)
    if layer is None:
        reason = "it has no known first layer"
    else:
        channels = checkpoint.tensors[layer].shape[1]  # out x in x kernel
        if channels == in_channels:
            return
        reason = f"{layer} takes {channels} channels"
    raise CheckpointError(
        f"{checkpoint.path}: {reason}, but --dit_in_channels is {in_channels}.", checkpoint.path
    )


class _Summand(NamedTuple):
    """One LoRA's factors for a module, and the multiplier of the LoRA."""

    lora: LoraFile
    factors: Factors
    multiplier: float


def _reject_other_families(loras: Sequence[LoraFile]) -> None:
    """Raise CheckpointError if the LoRAs' metadata names different model families."""
    first: LoraFile | None = None
    first_family: FamilyNames | None = None
    for lora in loras:
        family = read_family(lora.metadata)
        if family is None:
            continue
        if first is None or first_family is None:
            first = lora
            first_family = family
        elif family is not first_family:
            raise CheckpointError(
                f"{lora.path} is for {family.name}, {first.path} for {first_family.name}: no model can use "
                "their sum.\n  Use LoRAs for the same model.",
                lora.path,
            )


def _list_summands(weighted_loras: Sequence[WeightedLora]) -> dict[str, list[_Summand]]:
    """Return the factors from all files by module. Raises CheckpointError for anything but plain LoRAs."""
    modules: dict[str, list[_Summand]] = {}
    for weighted_lora in weighted_loras:
        lora = weighted_lora.lora
        tensors = {**convert_to_our_layout(lora.tensors, lora.family()), **lora.text_tensors}
        for name, factors in group_by_module(tensors).items():
            if set(factors) - {"alpha"} != set(LORA_FACTORS):
                raise CheckpointError(
                    f"{lora.path} cannot be merged into a LoRA: {name} has {', '.join(sorted(factors))}.\n"
                    "  Only plain LoRAs can; merge it into the model instead.",
                    lora.path,
                )
            modules.setdefault(name, []).append(_Summand(lora, factors, weighted_lora.multiplier))
    return modules


class _LowRank(NamedTuple):
    """Factors up @ down of a weight change."""

    down: Tensor  # R x in (x kernel)
    up: Tensor  # out x R (x 1 x 1)

    @property
    def size(self) -> tuple[torch.Size, int]:
        """Return the input axes of the weight (including the kernel) and the number of output rows."""
        return self.down.shape[1:], len(self.up)

    def describe_size(self) -> str:
        return f"{len(self.up)} x {self.down.shape[1]}"

    def reshaped_as(self, first: "_LowRank") -> "_LowRank":
        """Return the factors reshaped to the axes of `first` (a matrix equals a 1x1 convolution)."""
        inputs, outputs = self.size
        first_inputs, first_outputs = first.size
        if inputs.numel() != first_inputs.numel() or outputs != first_outputs:
            return self
        up_shape = (*self.up.shape[:2], *first.up.shape[2:])
        return _LowRank(self.down.reshape(-1, *first_inputs), self.up.reshape(up_shape))


def _sum_factors(name: str, summands: Sequence[_Summand], device: torch.device) -> _LowRank:
    """Return the factors of a weighted sum, with the ranks of all LoRAs concatenated; alpha is the rank."""
    scaled: list[_LowRank] = []
    for summand in summands:
        change = _LowRank(
            down=summand.factors[DOWN].to(device, torch.float32),
            up=summand.factors[UP].to(device, torch.float32),
        )
        if scaled:
            first = scaled[0]
            change = change.reshaped_as(first)
            if change.size != first.size:
                raise CheckpointError(
                    f"{summand.lora.path} does not fit {summands[0].lora.path}: {name} changes "
                    f"{change.describe_size()} and {first.describe_size()}. Use LoRAs for the same model.",
                    summand.lora.path,
                )
        scale = summand.multiplier * compute_scaling(summand.factors)
        root = abs(scale) ** 0.5  # split between both factors so that neither underflows in 16 bits
        signed_root = root if scale >= 0 else -root  # the sign goes into one factor only
        scaled.append(_LowRank(change.down * signed_root, change.up * root))
    return _LowRank(
        down=torch.cat([change.down for change in scaled]),
        up=torch.cat([change.up for change in scaled], 1),
    )


class DecomposedProduct(NamedTuple):
    """Singular value decomposition of a product: (left @ u) diag(singular_values) (vh @ right^T)."""

    left: Tensor  # out x R, orthogonal columns
    u: Tensor
    singular_values: Tensor  # the largest first
    vh: Tensor
    right: Tensor  # in x R, orthogonal columns


def decompose_product(up: Tensor, down: Tensor) -> DecomposedProduct:
    """Decompose up @ down (out x R times R x in) by two QR decompositions, without computing the product."""
    left, small_left = torch.linalg.qr(up)
    right, small_right = torch.linalg.qr(down.T)
    u, singular_values, vh = torch.linalg.svd(small_left @ small_right.T, full_matrices=False)
    return DecomposedProduct(left, u, singular_values, vh, right)


def _truncate(change: _LowRank, rank: int) -> _LowRank:
    """Return the best rank-`rank` approximation of up @ down (Eckart and Young, 1936)."""
    down, up = change
    product = decompose_product(up.flatten(1), down.flatten(1))
    rank = min(rank, len(product.singular_values))
    root = product.singular_values[:rank].sqrt()  # both factors get the root of each singular value
    new_up = product.left @ (product.u[:, :rank] * root)
    new_down = (root[:, None] * product.vh[:rank]) @ product.right.T
    return _LowRank(
        down=new_down.unflatten(1, down.shape[1:]),
        up=new_up.reshape(*new_up.shape, *up.shape[2:]),
    )


def in_known_names(tensors: Mapping[str, Tensor], family: FamilyNames | None) -> Mapping[str, Tensor]:
    """Return tensors under the names that other tools use for the family's LoRAs."""
    if family is None or family.underscored_names != "aliases":
        return tensors
    return rename_to_aliases(tensors, family)
