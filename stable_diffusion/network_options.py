"""Options of LoRAs, ControlNets and LLLites, and of CLIP and VGG16 that steer. Standard library only."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.media.options import EDGE_THRESHOLDS
from modules.options import Options, option
from networks.formats.kohya import OTHER_MODULES
from networks.kinds.composing import BY_MODULE
from networks.use_options import lora_rounding_option, multipliers_for

UNSUPPORTED_MODULES = {"networks.boft": "BOFT", "networks.control_net_lllite": "a ControlNet-LLLite"}
# names that users of sd-scripts pass; all are treated alike, because the file shows its own kind
KNOWN_MODULES = (
    *BY_MODULE,
    "networks.lora_fa",
    "networks.dylora",
    *(name for name in OTHER_MODULES if name not in UNSUPPORTED_MODULES),
    "lycoris",
    "lycoris.kohya",
)
VGG_LAYER, VGG_LAYERS = 20, 30  # the default: after conv4_2 and its ReLU; the last one is a pooling layer


@dataclass(frozen=True)
class ControlSpec:
    """File, strength and active steps of one ControlNet or ControlNet-LLLite."""

    path: Path
    # edges of the guide image are drawn: where the gray image changes by more than the second number, or by
    # more than the first next to such an edge; None: it is taken unchanged
    canny: tuple[int, int] | None
    multiplier: float
    ratio: float  # active in steps i of n (from 0) with i / n <= ratio


_MODELS = ("control_net_models", "control_net_lllite_models")


class ControlOptions(Options, title="ControlNet"):
    """Files and settings of ControlNets or ControlNet-LLLites, in the order of their guide images."""

    control_net_models: tuple[Path, ...] | None = option(
        "ControlNets: files, or folders in the layout of diffusers. Of several, one acts in each step, in "
        "turn, with Stable Diffusion 1.x and 2.x; with XL the mean of all acts",
        excludes="control_net_lllite_models",
        often=True,
    )
    control_net_lllite_models: tuple[Path, ...] | None = option(
        "files of ControlNet-LLLite, for Stable Diffusion XL"
    )
    control_net_preps: tuple[str, ...] | None = option(
        "how the guide image of each model is prepared: none, or canny_63_191 (its edges, found with "
        "these two thresholds)",
        needs=_MODELS,
    )
    control_net_multipliers: tuple[float, ...] | None = option(
        "strength of each model; 1 if not given",
        flags=("--control_net_multipliers", "--control_net_weights"),
        needs=_MODELS,
    )
    control_net_ratios: tuple[float, ...] | None = option(
        "fraction of the steps, from the first, in which each model acts: 0.5 is the first half; 1 if "
        "not given",
        minimum=0,
        maximum=1,
        needs=_MODELS,
    )

    def __post_init__(self) -> None:
        models = len(self.control_net_models or self.control_net_lllite_models or ())
        for name in ("control_net_preps", "control_net_multipliers", "control_net_ratios"):
            count = len(getattr(self, name) or ())
            if count and count != models:
                raise OptionError(
                    f"--{name} has {_count_words(count, 'value')} for {_count_words(models, 'model')} of "
                    f"{self.flag}: pass one for each model, in the same order, or omit the option"
                )
        for text in self.control_net_preps or ():
            read_preparation(text)

    @property
    def flag(self) -> str:
        """Option that selects the control networks, for messages."""
        return "--control_net_lllite_models" if self.control_net_lllite_models else "--control_net_models"

    @property
    def specs(self) -> tuple[ControlSpec, ...]:
        """Path, preprocessor, strength and step fraction of each ControlNet, with defaults filled in."""
        paths = self.control_net_models or self.control_net_lllite_models or ()
        count = len(paths)
        return tuple(
            ControlSpec(path, read_preparation(preparation), multiplier, ratio)
            for path, preparation, multiplier, ratio in zip(
                paths,
                self.control_net_preps or ("none",) * count,
                self.control_net_multipliers or (1.0,) * count,
                self.control_net_ratios or (1.0,) * count,
                strict=True,
            )
        )


def read_preparation(text: str) -> tuple[int, int] | None:
    """Parse a --control_net_preps value: None or Canny's thresholds; raise OptionError for others."""
    if text == "none":
        return None
    match = re.fullmatch(r"canny(?:_(\d{1,5})(?:_(\d{1,5}))?)?", text)
    if match is None:
        raise OptionError(
            f"--control_net_preps {text}: only none and canny_LOW_HIGH, such as canny_63_191, are known. "
            "Prepare the guide image with another program, and give none"
        )
    low, high = EDGE_THRESHOLDS
    return int(match[1] or low), int(match[2] or high)


def check_control(
    options: ControlOptions,
    guides: tuple[Path, ...] | None,
    uses_deep_shrink: bool,
    guidance_option: str | None = None,
) -> None:
    """Check the options of ControlNets and the guide images, which ControlNets, CLIP or VGG16 may use.

    Args:
        options: Options of ControlNets.
        guides: Value of --guide_image_path.
        uses_deep_shrink: Whether --ds_depth_1 is given.
        guidance_option: Option by which CLIP or VGG16 guides with these images; None if neither does.

    Raises:
        OptionError: If guide images are missing, or the options cannot be combined.
    """
    if guidance_option is not None:
        _check_guidance(options, guides, guidance_option)
        return
    if not options.specs:
        if guides:
            raise OptionError(
                "--guide_image_path needs --control_net_models, --control_net_lllite_models, "
                "--clip_image_guidance_scale or --vgg16_guidance_scale, which use the images. A mask of "
                "regions goes to --mask_path"
            )
        return
    if not guides:
        raise OptionError(
            f"{options.flag} needs --guide_image_path: an image for each model, or a folder of them"
        )
    if uses_deep_shrink and options.control_net_lllite_models:
        raise OptionError(
            f"--ds_depth_1 (Deep Shrink) and {options.flag} do not work together, as the sizes of features "
            "differ: omit one of them, or use ControlNets"
        )


def _check_guidance(options: ControlOptions, guides: tuple[Path, ...] | None, guidance_option: str) -> None:
    """Raise OptionError if CLIP or VGG16 has no images to guide with, or ControlNets take them too."""
    if options.specs:
        raise OptionError(
            f"{guidance_option} and {options.flag} both take the images of --guide_image_path: omit one "
            "of them"
        )
    if not guides:
        raise OptionError(f"{guidance_option} needs --guide_image_path: an image, or a folder of them")


_SCALE_HINT = "0 is none, about 100 is usual"
_CLIP_SCALES = ("clip_guidance_scale", "clip_image_guidance_scale")


class GuideOptions(Options, title="guidance by other networks"):
    """Strengths of image guidance by CLIP and VGG16 (0: off), and the files of these networks."""

    clip_guidance_scale: float = option(
        "how strongly CLIP steers the image toward the prompt, or toward the text of --c; about 100",
        default=0.0,
        minimum=0,
        hint=_SCALE_HINT,
    )
    clip_image_guidance_scale: float = option(
        "how strongly CLIP steers the image toward that of --guide_image_path; about 100",
        default=0.0,
        minimum=0,
        hint=_SCALE_HINT,
    )
    clip_guidance_model: Path | None = option(
        "CLIP for them, with both towers: the folder or file of a release in Hugging Face's layout; default: "
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K of the hub (0.6 GB)",
        needs=_CLIP_SCALES,
    )
    vgg16_guidance_scale: float = option(
        "how strongly VGG16 steers the image toward that of --guide_image_path; about 100",
        default=0.0,
        minimum=0,
        hint=_SCALE_HINT,
    )
    vgg16_guidance_layer: int = option(
        f"layer of VGG16 whose features are compared, 1 to {VGG_LAYERS}: 20 is that of conv4_2",
        default=VGG_LAYER,
        minimum=1,
        maximum=VGG_LAYERS,
        needs="vgg16_guidance_scale",
    )
    vgg16_guidance_model: Path | None = option(
        "VGG16 for it: torchvision's vgg16-397923af.pth, or a safetensors of it; default: timm/vgg16.tv_in1k "
        "of the hub, which is the same (0.6 GB)",
        needs="vgg16_guidance_scale",
    )

    @property
    def uses_clip(self) -> bool:
        """Whether CLIP guides the images."""
        return self.clip_guidance_scale > 0 or self.clip_image_guidance_scale > 0

    @property
    def image_option(self) -> str | None:
        """The first of the given options that requires a guide image; None without one."""
        scales = ("clip_image_guidance_scale", "vgg16_guidance_scale")
        return next((f"--{name}" for name in scales if getattr(self, name) > 0), None)


def _count_words(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _check_count(flag: str, values: Sequence[Any], num_files: int) -> None:
    """Raise OptionError if an option has more values than there are files of --network_weights."""
    if len(values) > num_files:
        raise OptionError(
            f"{flag} has {len(values)} values for {num_files} files of --network_weights: use "
            "at most one for each, in the same order"
        )


class AddedNetworkOptions(Options, title="LoRA and other networks"):
    """LoRAs and similar networks to add, in the order of --network_weights."""

    network_module: tuple[str, ...] | None = option(
        "kinds of the files, such as networks.lora; not needed, because the files contain it",
        needs="network_weights",
    )
    network_weights: tuple[Path, ...] | None = option("LoRA files, any dialect", place="there", often=True)
    network_mul: tuple[float, ...] | None = option(
        "strength of each file; default: 1", needs="network_weights", often=True
    )
    network_args: tuple[str, ...] | None = option(
        "arguments of each module: key=value, several joined by ;. The files say the same",
        needs="network_weights",
    )
    network_show_meta: bool = option("show the metadata of the files", needs="network_weights")
    network_merge: bool = option(
        "fold all networks into the model, which is faster",
        needs="network_weights",
        excludes=("network_merge_n_models", "network_pre_calc"),
    )
    network_merge_n_models: int | None = option(
        "fold the first ones into the model", minimum=1, needs="network_weights"
    )
    network_pre_calc: bool = option(
        "fold the networks in for each batch, which is faster than adding them at each step and still lets "
        "prompts choose strengths (--am)",
        needs="network_weights",
    )
    lora_rounding: str = lora_rounding_option(
        needs=("network_merge", "network_merge_n_models", "network_pre_calc")
    )
    network_regional_mask_max_color_codes: int | None = option(
        "the mask of regions (--mask_path, prompts with AND) has this many regions, each of one color: red "
        "1, green 2, yellow 3, blue 4, magenta 5, cyan 6, white 7; usually red, green and blue are a region "
        "each, and their values weights",
        minimum=1,
        maximum=7,
        excludes=("network_merge", "network_pre_calc"),
        why="networks in regions are added while images are made",
    )

    def __post_init__(self) -> None:
        """Raise OptionError for unsupported modules, and for more values than --network_weights has files."""
        modules = self.network_module or ()
        multipliers = self.network_mul or ()
        for name in modules:
            # Raise OptionError if --network_module names an unsupported kind of network
            description = UNSUPPORTED_MODULES.get(name)
            if description is not None:
                advice = (
                    "--control_net_lllite_models takes it"
                    if "LLLite" in description
                    else "it is not supported"
                )
                raise OptionError(
                    f"--network_module {name} is for {description}: {advice}. Omit --network_module"
                )
            if name not in KNOWN_MODULES and not name.startswith("networks.lora"):
                raise OptionError(
                    f"--network_module {name}: modules of other programs are not supported in gen_img.py. "
                    "Omit "
                    f"--network_module, or pass one of {', '.join(KNOWN_MODULES)}: the files are recognized "
                    "by their tensors"
                )
        num_files = len(self.files)
        if len(modules) > 1 and len(modules) != num_files:
            raise OptionError(
                f"--network_module has {len(modules)} names for {num_files} files of --network_weights: pass "
                "one for each, or omit it"
            )
        _check_count("--network_mul", multipliers, num_files)
        _check_count("--network_args", self.network_args or (), num_files)
        if (self.network_merge_n_models or 0) > num_files:
            raise OptionError(
                f"--network_merge_n_models {self.network_merge_n_models}: there are {num_files} "
                "--network_weights"
            )
        multipliers_for(self.files, multipliers, "--network_mul")  # raises for invalid values

    @property
    def files(self) -> tuple[Path, ...]:
        """Paths of --network_weights; () if the option is not given."""
        return self.network_weights or ()

    @property
    def multipliers(self) -> tuple[float, ...]:
        """Strength of each LoRA file."""
        return multipliers_for(self.files, self.network_mul or (), "--network_mul")

    @property
    def num_merged(self) -> int:
        """Number of LoRA files, in the given order, that are merged into the weights."""
        return len(self.files) if self.network_merge else self.network_merge_n_models or 0

    @property
    def num_adjustable(self) -> int:
        """Number of LoRA files not merged into the weights; a prompt line can change their strengths."""
        return len(self.files) - self.num_merged

    def check_strengths(self, multipliers: Sequence[float]) -> None:
        """Raise OptionError if a prompt has more multipliers than there are adjustable LoRA files."""
        if len(multipliers) > self.num_adjustable > 0:
            merged = (
                f", without the {self.num_merged} that are folded into the model" if self.num_merged else ""
            )
            raise OptionError(
                f"--am has {len(multipliers)} strengths for {self.num_adjustable} networks: pass one for "
                f"each of --network_weights, in the same order{merged}"
            )
        multipliers_for(self.files, multipliers, "--am")
