"""Options of the LoRA tools: merge, extract. Standard library only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.options import Options, not_needed, option, unsupported
from modules.text_files import real_path
from networks.use_options import (
    LoraOptions,
    lora_rounding_option,
    multipliers_for,
    require_loras,
)

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
MIN_DIFF = 0.01
NON_DIT_OPTIONS = ("conv_dim", "min_diff")  # of `ExtractOptions`: options that do not apply to a DiT


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


class ExtractOptions(Options):
    """Options for extracting a LoRA; scripts for one transformer omit those in `NON_DIT_OPTIONS`."""

    model_org: Path = option(
        "the model before fine-tuning: a file, or the folder of a transformer", place="there", required=True
    )
    model_tuned: Path = option("the fine-tuned model", place="there", required=True)
    conv_dim: int | None = option(
        "rank for residual blocks and convolutions; default: they get no LoRA", minimum=1
    )
    min_diff: float = option(
        "a text encoder gets no LoRA unless one of its values has changed by more than this",
        default=MIN_DIFF,
        minimum=0,
    )
    save_precision: str | None = option("dtype of the LoRA; default: float", choices=PRECISIONS)
    save_to: Path = option(
        "LoRA file to write",
        place="safetensors",
        must_not_replace=("model_org", "model_tuned"),
        required=True,
    )
    dim: int = option("rank of the LoRA", default=4, minimum=1)
    device: str | None = option("device that computes; default: CUDA if available, else the CPU")
    clamp_quantile: float = option(
        "limit the factors to this quantile of their values; 1: no limit", default=0.99, above=0.5, maximum=1
    )
    no_metadata: bool = option(ONLY_NEEDED)


class BlockExtractOptions(Options):
    """Options that only `networks/flux_extract_lora.py` and `qwen_extract_lora.py` have."""

    mem_eff_safe_open = not_needed(BY_TENSOR)


class FullExtractOptions(Options):
    """Options that only `networks/extract_lora_from_models.py` has."""

    v2 = not_needed("the files say what they are.")
    v_parameterization = not_needed("the files say what they are.")
    sdxl = not_needed("the files say what they are.")
    load_precision = not_needed("it is computed in float.", choices=PRECISIONS)
    load_original_model_to = not_needed(BY_TENSOR, type=str)
    load_tuned_model_to = not_needed(BY_TENSOR, type=str)


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
