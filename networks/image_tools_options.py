"""Options of the LoRA tools of image families: extract, merge, convert. Standard library only."""

import argparse
import logging
import math
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.output_files import check_output_file, refuse_replacing
from modules.parser import add_unsupported
from networks.options import multipliers_for, require_files

logger = logging.getLogger(__name__)
PRECISIONS = ("float", "fp16", "bf16")
DIALECTS = ("sd-scripts", "ai-toolkit")


@dataclass(frozen=True)
class ExtractOptions:
    """Options of `networks/flux_extract_lora.py`."""

    save_precision: str | None  # None: float
    model_org: Path
    model_tuned: Path
    mem_eff_safe_open: bool
    save_to: Path
    dim: int
    device: str | None
    clamp_quantile: float
    no_metadata: bool

    def __post_init__(self) -> None:
        require_files("--model_org", [self.model_org])
        require_files("--model_tuned", [self.model_tuned])
        _check_rank("--dim", self.dim)
        _check_quantile(self.clamp_quantile)
        check_output_file("--save_to", self.save_to)
        refuse_replacing("--save_to", self.save_to, [self.model_org, self.model_tuned])
        if self.mem_eff_safe_open:
            logger.info("--mem_eff_safe_open changes nothing: models are always read tensor by tensor")


@dataclass(frozen=True)
class WholeExtractOptions:
    """Options of `networks/extract_lora_from_models.py`."""

    v2: bool
    v_parameterization: bool
    sdxl: bool
    load_precision: str | None
    save_precision: str | None  # None: float
    model_org: Path
    model_tuned: Path
    load_original_model_to: str | None
    load_tuned_model_to: str | None
    save_to: Path
    dim: int
    conv_dim: int | None  # rank for convolutions; None: they get none
    device: str | None
    clamp_quantile: float
    min_diff: float
    no_metadata: bool

    def __post_init__(self) -> None:
        require_files("--model_org", [self.model_org])
        require_files("--model_tuned", [self.model_tuned])
        _check_rank("--dim", self.dim)
        if self.conv_dim is not None:
            _check_rank("--conv_dim", self.conv_dim)
        _check_quantile(self.clamp_quantile)
        if not 0 <= self.min_diff < math.inf:
            raise OptionError(f"--min_diff {self.min_diff:g}: give 0 or more")
        check_output_file("--save_to", self.save_to)
        refuse_replacing("--save_to", self.save_to, [self.model_org, self.model_tuned])
        for option in ("v2", "v_parameterization", "sdxl"):
            if getattr(self, option):
                logger.info("--%s changes nothing: the files say what they are", option)
        for option in ("load_precision", "load_original_model_to", "load_tuned_model_to"):
            if getattr(self, option) is not None:
                logger.info("--%s changes nothing: models are read tensor by tensor", option)


def _check_rank(option: str, rank: int) -> None:
    if rank < 1:
        raise OptionError(f"{option} {rank}: the rank must be at least 1")


def _check_quantile(share: float) -> None:
    if not 0.5 < share <= 1:
        raise OptionError(f"--clamp_quantile {share:g}: give a share above 0.5, at most 1 (no limit)")


@dataclass(frozen=True)
class FluxMergeOptions:
    """Options of `networks/flux_merge_lora.py`."""

    save_precision: str | None  # None: into models, as these are; into a LoRA, --precision
    precision: str
    flux_model: Path | None
    clip_l: Path | None
    t5xxl: Path | None
    mem_eff_load_save: bool
    loading_device: str
    working_device: str
    save_to: Path | None
    clip_l_save_to: Path | None
    t5xxl_save_to: Path | None
    models: tuple[Path, ...] | None
    ratios: tuple[float, ...] | None
    no_metadata: bool
    concat: bool
    shuffle: bool
    diffusers: bool

    def __post_init__(self) -> None:
        for option, value in (("--precision", self.precision), ("--save_precision", self.save_precision)):
            if value is not None and value not in PRECISIONS:
                raise OptionError(f"{option} {value}: give one of {', '.join(PRECISIONS)}")
        if not self.models:
            raise OptionError("--models names no LoRA: give the files to merge")
        require_files("--models", self.models)
        if len(self.models) != len(self.ratios or ()):
            raise OptionError(
                f"--ratios has {len(self.ratios or ())} numbers for {len(self.models)} files of --models: "
                "give one for each, in the same order"
            )
        multipliers_for(self.models, self.ratios or (), "--ratios")
        for option, path in self.targets.items():
            require_files(option, [path])
        self._check_outputs()
        if self.into_models and (self.concat or self.shuffle):
            raise OptionError("--concat and --shuffle are for merging LoRAs into one: leave out the models")
        for option, is_given in (
            (
                "--mem_eff_load_save: models are always read and written tensor by tensor",
                self.mem_eff_load_save,
            ),
            ("--diffusers: names of diffusers are recognised by themselves", self.diffusers),
            ("--shuffle: the merged LoRA is exact, in whatever order its ranks are", self.shuffle),
        ):
            if is_given:
                name, _, why = option.partition(": ")
                logger.info("%s changes nothing: %s", name, why)

    def _check_outputs(self) -> None:
        pairs = {
            "--save_to": ("--flux_model", self.save_to, self.flux_model),
            "--clip_l_save_to": ("--clip_l", self.clip_l_save_to, self.clip_l),
            "--t5xxl_save_to": ("--t5xxl", self.t5xxl_save_to, self.t5xxl),
        }
        if not self.into_models and self.save_to is None:
            raise OptionError("--save_to is missing: give the file to write the merged LoRA to")
        for option, (source, output, model) in pairs.items():
            if model is not None and output is None:
                raise OptionError(f"{option} is missing: give the file to write the merged {source} to")
            if output is None:
                continue
            if model is None and (self.into_models or option != "--save_to"):
                raise OptionError(f"{option} is given without {source}: give the model to merge into")
            check_output_file(option, output)
            refuse_replacing(option, output, [*(self.models or ()), *self.targets.values()])
        outputs = [output.resolve() for _, output, _ in pairs.values() if output is not None]
        if len(set(outputs)) < len(outputs):
            raise OptionError(
                "--save_to, --clip_l_save_to and --t5xxl_save_to are the same file: give others"
            )

    @property
    def targets(self) -> dict[str, Path]:
        """The models to merge into, by their options."""
        given = {"--flux_model": self.flux_model, "--clip_l": self.clip_l, "--t5xxl": self.t5xxl}
        return {option: path for option, path in given.items() if path is not None}

    @property
    def into_models(self) -> bool:
        return bool(self.targets)


@dataclass(frozen=True)
class WholeMergeOptions:
    """Options of `networks/sdxl_merge_lora.py`."""

    save_precision: str | None  # None: into a checkpoint, as it is; into a LoRA, --precision
    precision: str
    sd_model: Path | None
    save_to: Path
    models: tuple[Path, ...]
    ratios: tuple[float, ...]
    concat: bool
    shuffle: bool
    no_metadata: bool

    def __post_init__(self) -> None:
        require_files("--models", self.models)
        if len(self.models) != len(self.ratios):
            raise OptionError(
                f"--ratios has {len(self.ratios)} numbers for {len(self.models)} files of --models: give one "
                "for each, in the same order"
            )
        multipliers_for(self.models, self.ratios, "--ratios")
        if self.sd_model is not None:
            require_files("--sd_model", [self.sd_model])
            if self.concat or self.shuffle:
                raise OptionError(
                    "--concat and --shuffle are for merging LoRAs into one: leave out --sd_model"
                )
        check_output_file("--save_to", self.save_to)
        refuse_replacing(
            "--save_to", self.save_to, [*self.models, *([] if self.sd_model is None else [self.sd_model])]
        )
        if self.shuffle:
            logger.info(
                "--shuffle changes nothing: the merged LoRA is exact, in whatever order its ranks are"
            )


@dataclass(frozen=True)
class FluxConvertOptions:
    """Options of `networks/convert_flux_lora.py`."""

    src: str
    dst: str
    src_path: Path | None
    dst_path: Path | None

    def __post_init__(self) -> None:
        for option, value in (("--src", self.src), ("--dst", self.dst)):
            if value not in DIALECTS:
                raise OptionError(f"{option} {value}: give {' or '.join(DIALECTS)}")
        if self.src == self.dst:
            raise OptionError(f"--src and --dst are both {self.src}: give two dialects")
        if self.src_path is None or self.dst_path is None:
            raise OptionError("--src_path and --dst_path are both needed: the LoRA and the file to write")
        require_files("--src_path", [self.src_path])
        check_output_file("--dst_path", self.dst_path)
        refuse_replacing("--dst_path", self.dst_path, [self.src_path])


@dataclass(frozen=True)
class ComfyConvertOptions:
    """Options of `networks/convert_hunyuan_image_lora_to_comfy.py`."""

    src_path: Path
    dst_path: Path
    reverse: bool

    def __post_init__(self) -> None:
        require_files("SRC", [self.src_path])
        check_output_file("DST", self.dst_path)
        refuse_replacing("DST", self.dst_path, [self.src_path])


def add_extract_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ExtractOptions`."""
    parser.add_argument("--model_org", required=True, help="the model before fine-tuning: a file or a folder")
    parser.add_argument("--model_tuned", required=True, help="the fine-tuned model")
    parser.add_argument("--mem_eff_safe_open", action="store_true", help="changes nothing: always done")
    _add_extraction_arguments(parser)


def add_whole_extract_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `WholeExtractOptions`."""
    parser.add_argument("--v2", action="store_true", help="changes nothing: the files say what they are")
    parser.add_argument("--v_parameterization", action="store_true", help="changes nothing")
    parser.add_argument("--sdxl", action="store_true", help="changes nothing: the files say what they are")
    parser.add_argument("--load_precision", choices=PRECISIONS, help="changes nothing: float is computed")
    parser.add_argument("--model_org", required=True, help="the checkpoint before fine-tuning: a single file")
    parser.add_argument("--model_tuned", required=True, help="the fine-tuned checkpoint")
    parser.add_argument("--load_original_model_to", help="changes nothing: read tensor by tensor")
    parser.add_argument("--load_tuned_model_to", help="changes nothing: read tensor by tensor")
    parser.add_argument(
        "--conv_dim", type=int, help="rank for residual blocks and convolutions; default: they get no LoRA"
    )
    parser.add_argument(
        "--min_diff",
        type=float,
        default=0.01,
        help="a text encoder of which no value has changed by more gets no LoRA",
    )
    _add_extraction_arguments(parser)


def _add_extraction_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what extracting a LoRA takes, whatever the model is."""
    parser.add_argument(
        "--save_precision", choices=PRECISIONS, help="type of the LoRA's numbers; default: float"
    )
    parser.add_argument("--save_to", required=True, help="LoRA file to write")
    parser.add_argument("--dim", type=int, default=4, help="rank of the LoRA")
    parser.add_argument("--device", help="device that computes; default: CUDA if available, else the CPU")
    parser.add_argument(
        "--clamp_quantile",
        type=float,
        default=0.99,
        help="limit the factors to this quantile of their values; 1: no limit",
    )
    parser.add_argument("--no_metadata", action="store_true", help="write only what loaders need to know")


def add_flux_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `FluxMergeOptions`."""
    types = ", ".join(PRECISIONS)
    parser.add_argument("--save_precision", help=f"type of the numbers to write: {types}; default: as read")
    parser.add_argument(
        "--precision",
        default="float",
        help=f"{types}; type of a merged LoRA if --save_precision is not given",
    )
    parser.add_argument("--flux_model", help="FLUX.1 or Chroma model to merge into, for --save_to")
    parser.add_argument("--clip_l", help="CLIP-L to merge into, for --clip_l_save_to")
    parser.add_argument("--t5xxl", help="T5-XXL to merge into, for --t5xxl_save_to")
    parser.add_argument("--mem_eff_load_save", action="store_true", help="changes nothing: always done")
    parser.add_argument("--loading_device", default="cpu", help="not used: tensors are read one by one")
    parser.add_argument("--working_device", default="cpu", help="device that computes, such as cuda")
    parser.add_argument("--save_to", help="file to write: the model, or the merged LoRA without a model")
    parser.add_argument("--clip_l_save_to", help="file to write the merged CLIP-L to")
    parser.add_argument("--t5xxl_save_to", help="file to write the merged T5-XXL to")
    parser.add_argument("--models", nargs="*", help="LoRA files to merge, of any dialect")
    parser.add_argument("--ratios", type=float, nargs="*", help="strength of each file of --models")
    _add_sum_arguments(parser)
    parser.add_argument("--diffusers", action="store_true", help="changes nothing: names are recognised")


def add_whole_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `WholeMergeOptions`."""
    parser.add_argument(
        "--save_precision",
        choices=PRECISIONS,
        help="type of the numbers to write; default: as the checkpoint",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float",
        help="type of a merged LoRA if --save_precision is not given; float is computed in any case",
    )
    parser.add_argument("--sd_model", help="checkpoint to merge into, a single file; without: into one LoRA")
    parser.add_argument("--save_to", required=True, help="file to write: the checkpoint, or the merged LoRA")
    parser.add_argument("--models", nargs="+", required=True, help="LoRA files to merge, of any dialect")
    parser.add_argument(
        "--ratios", type=float, nargs="+", required=True, help="strength of each file of --models"
    )
    add_unsupported(
        parser,
        "--lbws",
        nargs="*",
        reason="strengths of single blocks. Leave it out, and give one strength for each file to --ratios",
        help="strengths of single blocks",
    )
    _add_sum_arguments(parser)


def _add_sum_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how several LoRAs become one, whatever the model is."""
    parser.add_argument("--no_metadata", action="store_true", help="write only what loaders need to know")
    parser.add_argument(
        "--concat",
        action="store_true",
        help="LoRA into LoRA: add up the ranks, so that the sum is exact; without, the best LoRA of the "
        "first file's rank",
    )
    parser.add_argument("--shuffle", action="store_true", help="changes nothing: the sum is exact anyway")


def add_flux_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `FluxConvertOptions`."""
    parser.add_argument("--src", default="ai-toolkit", help=f"dialect to read: {' or '.join(DIALECTS)}")
    parser.add_argument("--dst", default="sd-scripts", help=f"dialect to write: {' or '.join(DIALECTS)}")
    parser.add_argument("--src_path", help="LoRA file to read")
    parser.add_argument("--dst_path", help="safetensors file to write")


def add_comfy_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ComfyConvertOptions`."""
    parser.add_argument("src_path", help="LoRA file to read")
    parser.add_argument("dst_path", help="safetensors file to write")
    parser.add_argument("--reverse", action="store_true", help="from ComfyUI's names to ours")
