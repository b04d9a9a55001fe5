"""Options of the LoRA tools: merge, convert, average, extract. Standard library only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.options import Options, not_needed, option, unsupported
from modules.output_files import check_output_file, refuse_replacing
from modules.paths import explain_missing, sort_by_numbers
from modules.text_files import real_path
from networks.kinds.composing import OF_MAGNITUDES, PRODUCTS, in_series
from networks.use_options import (
    LoraOptions,
    lora_rounding_option,
    multipliers_for,
    require_files,
    require_loras,
)

MERGE_CHANNELS_UNCHECKED = 16  # --dit_in_channels of merge_lora: the default asks for no check
# of a profile that weighs all files alike; Karras et al. 2023, arXiv 2312.02696, equation 123 at gamma = 0
LARGEST_SIGMA = 12**-0.5
PRECISIONS = ("float", "fp16", "bf16")
DIALECTS = ("sd-scripts", "ai-toolkit")
BY_TENSOR = "models are always read and written tensor by tensor."
ONLY_NEEDED = "write only what loaders need to know"
EXACT_SUM = (
    "LoRA into LoRA: add up the ranks, so that the sum is exact; without it, the best LoRA of the first "
    "file's rank"
)
OF_STABLE_DIFFUSION = ("sd1", "sd2", "sdxl")
OF_LORAS = "it is for merging LoRAs into one"
# option of a model to merge into -> of its result
FLUX_OUTPUTS = {"flux_model": "save_to", "clip_l": "clip_l_save_to", "t5xxl": "t5xxl_save_to"}
NO_SHUFFLE = not_needed("the merged LoRA is exact, in whatever order its ranks are.")
MIN_DIFF = 0.01
# kinds of which --bake makes plain LoRAs without the model, and with it
_BAKED = (*PRODUCTS, *filter(None, (OF_MAGNITUDES,)))
_UNJOINABLE = in_series([f"{name}s" for name in PRODUCTS], "and")
OF_WHOLE = ("conv_dim", "min_diff")  # of `ExtractOptions`: what a DiT has no use for


class MergeOptions(Options):
    """Options of `merge_lora.py`."""

    dit: Path = option(
        "checkpoint of the model: a file, one of its shards, an index, or a folder",
        place="there",
        required=True,
    )
    dit_in_channels: int = option(
        "refuse a checkpoint whose first layer takes another number of channels; the default, 16, "
        "accepts any",
        default=MERGE_CHANNELS_UNCHECKED,
    )
    lora: LoraOptions
    lora_rounding: str = lora_rounding_option()
    expert: str | None = option(
        "which expert of Wan2.2 A14B --dit is: chooses the part of a LoRA file for both, and warns of a "
        "LoRA for the other; default: as the name of the file or folder says",
        choices=("high_noise", "low_noise"),
    )
    save_merged_model: Path = option("safetensors file to write", place="safetensors", required=True)
    device: str | None = option("device that computes the deltas; default: CUDA if available, else the CPU")

    def __post_init__(self) -> None:
        require_loras(self.lora_rounding, [self.lora.lora_weight], "--lora_weight")


_RESULT: Mapping[str, Any] = {"place": "safetensors", "spares": ("input", "input_high_noise", "dit")}


class ConvertOptions(Options):
    """Options of `convert_lora.py`."""

    input: Path = option(
        "LoRA file, any dialect; of two experts that of low noise, or of both",
        place="there",
        required=True,
        by_place=True,
    )
    input_high_noise: Path | None = option(
        "LoRA file of the high-noise expert of Wan2.2, to be written next to --input",
        place="there",
        excludes="expert",
    )
    output: Path = option("safetensors file to write", **_RESULT, required=True, by_place=True)
    output_high_noise: Path | None = option(
        "safetensors file for the LoRA of the high-noise expert; --output then gets that of low noise",
        excludes="expert",
        **_RESULT,
    )
    expert: str | None = option(
        "of a file with a LoRA for each expert, take only this one", choices=("high_noise", "low_noise")
    )
    target: str = option(
        "other or comfyui: as ComfyUI and most tools read it: diffusion_model. (FramePack, FLUX: "
        "transformer.) with lora_A and lora_B, alpha folded in; HunyuanImage: lora_unet_ with ComfyUI's "
        "names; default: lora_unet_ with lora_down and lora_up; "
        "diffusers: transformer. with diffusers' module names, both experts in one file as transformer. "
        "(high noise) and transformer_2. (low noise)",
        required=True,
        choices=("other", "comfyui", "default", "diffusers"),
    )
    family: str | None = option(
        "the model that the LoRA is for, such as flux or hunyuan_video; default: as the file's metadata, "
        "names and sizes say"
    )
    bake: int | None = option(
        f"make a plain LoRA of this rank of each {in_series(_BAKED, 'and')}, for "
        "tools that do not know them; says how much of the change is lost",
        least=1,
        hint="a rank",
    )
    dit: tuple[Path, ...] | None = option(
        "the model that a DoRA was trained for; after it text encoders that it changes. With --bake, or for "
        "--target other, which is exact in ComfyUI then, and for the way back",
        nargs="+",
        place="there",
        excludes=("input_high_noise", "output_high_noise"),
        hint="each expert has its own model: --expert takes one LoRA out of a file for both",
    )
    device: str | None = option(
        "device that --bake and --dit compute on; default: CUDA if available, else MPS, else the CPU",
        needs=("bake", "dit"),
    )

    def __post_init__(self) -> None:
        if self.output_high_noise is not None and real_path(self.output) == real_path(self.output_high_noise):
            raise OptionError(f"--output and --output_high_noise are both {self.output}: give two names")
        is_joined = self.input_high_noise is not None and self.output_high_noise is None
        if is_joined and self.target != "diffusers":
            raise OptionError(
                f"--target {self.target} has no form for two LoRAs in one file: use --target diffusers, or "
                "add --output_high_noise FILE"
            )


class AveragingOptions(Options):
    """Options of `lora_post_hoc_ema.py`."""

    path: tuple[Path, ...] = option(
        "saved files of one run, from any of its epochs or steps", positional=True, nargs="+"
    )
    no_sort: bool = option(
        "take the files in the given order; without it they are sorted by their step, or by time if they "
        "do not record it"
    )
    beta: float = option(
        "share of the average so far at each further file; the first file keeps a large share",
        default=0.95,
        least=0,
        most=1,
        hint="such as 0.9",
    )
    beta2: float | None = option(
        "that share at the last file; it changes evenly from --beta to this",
        least=0,
        most=1,
        hint="such as 0.9",
    )
    sigma_rel: float | None = option(
        "instead of --beta: width of the average as a share of the run, 0.05 to 0.28 (power function)",
        above=0,
        most=LARGEST_SIGMA,
        hint="there all files count alike; 0.2 is a good start",
    )
    output_file: Path = option("safetensors file to write", required=True)

    def __post_init__(self) -> None:
        files = self.files()
        if len(files) < 2:
            raise OptionError(f"{files[0]} is a single file: give two or more of one run")
        require_files("path", files, folders="its files end in .safetensors")
        refuse_replacing("--output_file", self.output_file, files)
        check_output_file("--output_file", self.output_file)

    def files(self) -> list[Path]:
        """Return the files, each once; patterns such as `x-*.safetensors` are expanded: not all shells do."""
        files: dict[Path, None] = {}
        for path in self.path:
            if path.exists():
                files[path] = None
                continue
            matching = sort_by_numbers(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
            if not matching:
                raise OptionError(
                    f"{path}: no such file.{explain_missing(path)} Give files that a training has saved"
                )
            files |= dict.fromkeys(matching)
        return list(files)


class ExtractOptions(Options):
    """Options to extract a LoRA; without `OF_WHOLE` those of a transformer's own scripts."""

    model_org: Path = option(
        "the model before fine-tuning: a file, or of a transformer a folder", place="there", required=True
    )
    model_tuned: Path = option("the fine-tuned model", place="there", required=True)
    conv_dim: int | None = option(
        "rank for residual blocks and convolutions; default: they get no LoRA", least=1
    )
    min_diff: float = option(
        "a text encoder of which no value has changed by more gets no LoRA", default=MIN_DIFF, least=0
    )
    save_precision: str | None = option("type of the LoRA's numbers; default: float", choices=PRECISIONS)
    save_to: Path = option(
        "LoRA file to write", place="safetensors", spares=("model_org", "model_tuned"), required=True
    )
    dim: int = option("rank of the LoRA", default=4, least=1)
    device: str | None = option("device that computes; default: CUDA if available, else the CPU")
    clamp_quantile: float = option(
        "limit the factors to this quantile of their values; 1: no limit", default=0.99, above=0.5, most=1
    )
    no_metadata: bool = option(ONLY_NEEDED)


class BlockExtractWords(Options):
    """Further options of `networks/flux_extract_lora.py` and `qwen_extract_lora.py`."""

    mem_eff_safe_open = not_needed(BY_TENSOR)


class WholeExtractWords(Options):
    """Further options of `networks/extract_lora_from_models.py`."""

    v2 = not_needed("the files say what they are.")
    v_parameterization = not_needed("the files say what they are.")
    sdxl = not_needed("the files say what they are.")
    load_precision = not_needed("it is computed in float.", choices=PRECISIONS)
    load_original_model_to = not_needed(BY_TENSOR, type=str)
    load_tuned_model_to = not_needed(BY_TENSOR, type=str)


_MERGED: Mapping[str, Any] = {"place": "safetensors", "spares": ("models", *FLUX_OUTPUTS)}


class FluxMergeOptions(Options):
    """Options of `networks/flux_merge_lora.py`."""

    save_precision: str | None = option(
        f"type of the numbers to write: {', '.join(PRECISIONS)}; default: as read", one_of=PRECISIONS
    )
    precision: str = option(
        f"{', '.join(PRECISIONS)}; type of a merged LoRA if --save_precision is not given",
        default="float",
        one_of=PRECISIONS,
    )
    concat: bool = option(EXACT_SUM, excludes=("flux_model", "clip_l", "t5xxl"), hint=OF_LORAS)
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
    diffusers = not_needed("names of diffusers are recognised automatically.")

    def __post_init__(self) -> None:
        if not self.models:
            raise OptionError("--models names no LoRA: give the files to merge")
        _check_ratios(self.models, self.ratios or ())
        if self.save_to is None and not self.targets:
            raise OptionError("--save_to is missing: give the file to write the merged LoRA to")
        if self.save_to is not None and self.targets and self.flux_model is None:
            raise OptionError("--save_to is given without --flux_model: give the model to merge into")
        typed_outputs = [getattr(self, name) for name in FLUX_OUTPUTS.values()]
        outputs = [real_path(path) for path in typed_outputs if path]
        if len(set(outputs)) < len(outputs):
            names = ", ".join(f"--{name}" for name in FLUX_OUTPUTS.values())
            raise OptionError(f"{names} are the same file: give others")

    @property
    def targets(self) -> dict[str, Path]:
        models = {name: getattr(self, name) for name in FLUX_OUTPUTS}
        return {name: path for name, path in models.items() if path is not None}


class WholeMergeOptions(Options):
    """Options of `networks/sdxl_merge_lora.py`."""

    save_precision: str | None = option(
        "type of the numbers to write; default: as the checkpoint", choices=PRECISIONS
    )
    precision: str = option(
        "type of a merged LoRA if --save_precision is not given; float is computed in any case",
        default="float",
        choices=PRECISIONS,
    )
    sd_model: Path | None = option(
        "checkpoint to merge into, a single file; without: into one LoRA", place="there"
    )
    save_to: Path = option(
        "file to write: the checkpoint, or the merged LoRA",
        place="safetensors",
        spares=("models", "sd_model"),
        required=True,
    )
    models: tuple[Path, ...] = option(
        "LoRA files to merge, of any dialect", nargs="+", place="there", required=True
    )
    ratios: tuple[float, ...] = option("strength of each file of --models", nargs="+", required=True)
    lora_rounding: str = lora_rounding_option(needs="sd_model")
    no_metadata: bool = option(ONLY_NEEDED)
    concat: bool = option(EXACT_SUM, excludes="sd_model", hint=OF_LORAS)
    family: str | None = option(
        "the model that the LoRAs are for, if one LoRA is written and neither their metadata nor their names "
        "and sizes say it",
        choices=OF_STABLE_DIFFUSION,
        excludes="sd_model",
        hint=OF_LORAS,
    )
    shuffle = NO_SHUFFLE
    lbws = unsupported(
        "strengths of single blocks. Leave it out, and give one strength for each file to --ratios",
        "strengths of single blocks",
        nargs="*",
    )

    def __post_init__(self) -> None:
        _check_ratios(self.models, self.ratios)


def _check_ratios(models: Sequence[Path], ratios: Sequence[float]) -> None:
    """Raise OptionError if there is not one strength for each LoRA."""
    if len(models) != len(ratios):
        raise OptionError(
            f"--ratios has {len(ratios)} numbers for {len(models)} files of --models: give one for each, in "
            "the same order"
        )
    multipliers_for(models, ratios, "--ratios")


class FluxConvertOptions(Options):
    """Options of `networks/convert_flux_lora.py`."""

    src: str = option(f"dialect to read: {' or '.join(DIALECTS)}", default="ai-toolkit", one_of=DIALECTS)
    dst: str = option(f"dialect to write: {' or '.join(DIALECTS)}", default="sd-scripts", one_of=DIALECTS)
    src_path: Path | None = option("LoRA file to read", place="there")
    dst_path: Path | None = option("safetensors file to write", place="safetensors", spares="src_path")

    def __post_init__(self) -> None:
        if self.src == self.dst:
            raise OptionError(f"--src and --dst are both {self.src}: give two dialects")
        if self.src_path is None or self.dst_path is None:
            raise OptionError("--src_path and --dst_path are both needed: the LoRA and the file to write")


class ComfyConvertOptions(Options):
    """Options of `networks/convert_hunyuan_image_lora_to_comfy.py`, and more for Z-Image's."""

    src_path: Path = option("LoRA file to read", positional=True, place="there")
    dst_path: Path = option(
        "safetensors file to write", positional=True, place="safetensors", spares="src_path"
    )
    reverse: bool = option("from ComfyUI's names to ours")


class ZImageConvertOptions(ComfyConvertOptions):
    """Options of `networks/convert_z_image_lora_to_comfy.py`."""

    lokr_rank: int | None = option(
        f"rank of the plain LoRAs that take the place of {_UNJOINABLE} for queries, keys and values, which "
        "cannot be joined; more loses less",
        least=1,
        excludes="reverse",
        hint="the way back leaves them as they are",
    )
