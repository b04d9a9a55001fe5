"""Options of ControlNets, ControlNet-LLLites, and of CLIP and VGG16 that steer. Standard library only."""

import re
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.options import Options, option

LOW, HIGH = 63, 191  # thresholds of "canny" alone
VGG_LAYER, VGG_LAYERS = 20, 30  # the default: after conv4_2 and its ReLU; the last one is a pooling


@dataclass(frozen=True)
class CannyThresholds:
    """Edges: the grey image changes by more than `high`, or by more than `low` next to an edge."""

    low: int
    high: int


@dataclass(frozen=True)
class ControlUse:
    """How one ControlNet or ControlNet-LLLite is used."""

    path: Path
    canny: CannyThresholds | None  # edges of the guide image are drawn; None: it is taken as it is
    multiplier: float
    ratio: float  # it acts in steps i of n (from 0) with i / n <= ratio


_MODELS = ("control_net_models", "control_net_lllite_models")


class ControlOptions(Options, title="ControlNet"):
    """ControlNets or ControlNet-LLLites, in the order of their guide pictures."""

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
        "how the guide picture of each model is prepared: none, or canny_63_191 (its edges, found with these "
        "two thresholds)",
        needs=_MODELS,
    )
    control_net_multipliers: tuple[float, ...] | None = option(
        "strength of each model; 1 if not given",
        flags=("--control_net_multipliers", "--control_net_weights"),
        needs=_MODELS,
    )
    control_net_ratios: tuple[float, ...] | None = option(
        "share of the steps, from the first, in which each model acts: 0.5 is the first half; 1 if not given",
        least=0,
        most=1,
        needs=_MODELS,
    )

    def __post_init__(self) -> None:
        models = len(self.control_net_models or self.control_net_lllite_models or ())
        for name in ("control_net_preps", "control_net_multipliers", "control_net_ratios"):
            count = len(getattr(self, name) or ())
            if count and count != models:
                raise OptionError(
                    f"--{name} has {_count_of(count, 'value')} for {_count_of(models, 'model')} of "
                    f"{self.flag}: give one for each model, in the same order, or leave the option "
                    "out"
                )
        for text in self.control_net_preps or ():
            read_preparation(text)

    @property
    def flag(self) -> str:
        """Return the option that names the models."""
        return "--control_net_lllite_models" if self.control_net_lllite_models else "--control_net_models"

    @property
    def uses(self) -> tuple[ControlUse, ...]:
        """How each model is used, in the order of their guide pictures."""
        paths = self.control_net_models or self.control_net_lllite_models or ()
        count = len(paths)
        return tuple(
            ControlUse(path, read_preparation(preparation), multiplier, ratio)
            for path, preparation, multiplier, ratio in zip(
                paths,
                self.control_net_preps or ("none",) * count,
                self.control_net_multipliers or (1.0,) * count,
                self.control_net_ratios or (1.0,) * count,
                strict=True,
            )
        )


def read_preparation(text: str) -> CannyThresholds | None:
    """Read a value of --control_net_preps. Raises OptionError if it is none that can be prepared here."""
    if text == "none":
        return None
    found = re.fullmatch(r"canny(?:_(\d{1,5})(?:_(\d{1,5}))?)?", text)
    if found is None:
        raise OptionError(
            f"--control_net_preps {text}: only none and canny_LOW_HIGH, such as canny_63_191, are known. "
            "Prepare the guide image with another program, and give none"
        )
    return CannyThresholds(int(found[1] or LOW), int(found[2] or HIGH))


def check_control(
    options: ControlOptions,
    guides: tuple[Path, ...] | None,
    shrinks: bool,
    compared_by: str | None = None,
) -> None:
    """Compare with other options. guides: --guide_image_path. shrinks: whether --ds_depth_1 is given.

    compared_by: the option by which CLIP or VGG16 see the guide pictures. Raises OptionError if pictures are
    missing or the options do not work together.
    """
    if compared_by is not None and options.uses:
        raise OptionError(
            f"{compared_by} and {options.flag} both take the pictures of --guide_image_path: leave one of "
            "them out"
        )
    if compared_by is not None and not guides:
        raise OptionError(f"{compared_by} needs --guide_image_path: a picture, or a folder of them")
    if not options.uses:
        if guides and compared_by is None:
            raise OptionError(
                "--guide_image_path needs --control_net_models, --control_net_lllite_models, "
                "--clip_image_guidance_scale or --vgg16_guidance_scale, which see the pictures. A mask of "
                "regions goes to --mask_path"
            )
        return
    if not guides:
        raise OptionError(
            f"{options.flag} needs --guide_image_path: a picture for each model, or a folder of them"
        )
    if shrinks and options.control_net_lllite_models:
        raise OptionError(
            f"--ds_depth_1 (Deep Shrink) and {options.flag} do not work together, as the sizes of features "
            "differ: leave one of them out, or take ControlNets"
        )


_SCALE_HINT = "0 is none, about 100 is usual; the network is not downloaded"
_CLIP_SCALES = ("clip_guidance_scale", "clip_image_guidance_scale")


class GuideOptions(Options, title="guidance by other networks"):
    """How strongly CLIP and VGG16 steer pictures, and where these networks are. A scale of 0 is none."""

    clip_guidance_scale: float = option(
        "how strongly CLIP steers the picture towards the prompt, or towards the text of --c; about 100",
        default=0.0,
        least=0,
        needs="clip_guidance_model",
        hint=_SCALE_HINT,
    )
    clip_image_guidance_scale: float = option(
        "how strongly CLIP steers the picture towards that of --guide_image_path; about 100",
        default=0.0,
        least=0,
        needs="clip_guidance_model",
        hint=_SCALE_HINT,
    )
    clip_guidance_model: Path | None = option(
        "CLIP for them, with both towers: the folder or file of a release in Hugging Face's layout, such as "
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        needs=_CLIP_SCALES,
    )
    vgg16_guidance_scale: float = option(
        "how strongly VGG16 steers the picture towards that of --guide_image_path; about 100",
        default=0.0,
        least=0,
        needs="vgg16_guidance_model",
        hint=_SCALE_HINT,
    )
    vgg16_guidance_layer: int = option(
        f"layer of VGG16 whose features are compared, 1 to {VGG_LAYERS}: 20 is that of conv4_2",
        default=VGG_LAYER,
        least=1,
        most=VGG_LAYERS,
        needs="vgg16_guidance_scale",
    )
    vgg16_guidance_model: Path | None = option(
        "VGG16 for it: torchvision's vgg16-397923af.pth, or a safetensors of it",
        needs="vgg16_guidance_scale",
    )

    @property
    def uses_clip(self) -> bool:
        """Whether CLIP steers."""
        return self.clip_guidance_scale > 0 or self.clip_image_guidance_scale > 0

    @property
    def picture_option(self) -> str | None:
        """The first option that needs a guide picture; None: none does."""
        scales = ("clip_image_guidance_scale", "vgg16_guidance_scale")
        return next((f"--{name}" for name in scales if getattr(self, name) > 0), None)


def _count_of(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
