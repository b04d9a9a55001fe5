"""Options of guidance by other networks than the U-Net: CLIP and VGG16. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most

VGG_LAYER, VGG_LAYERS = 20, 30  # the default: after conv4_2 and its ReLU; the last one is a pooling
_CLIP_FILES = "a whole CLIP with its config.json, such as that of laion/CLIP-ViT-B-32-laion2B-s34B-b79K"


@dataclass(frozen=True)
class GuideOptions:
    """How strongly CLIP and VGG16 steer pictures, and where these networks are. A scale of 0 is none."""

    clip_guidance_scale: float  # towards the text
    clip_image_guidance_scale: float  # towards the guide picture
    clip_guidance_model: Path | None
    vgg16_guidance_scale: float  # towards the guide picture
    vgg16_guidance_layer: int  # as torchvision counts the layers of `features`
    vgg16_guidance_model: Path | None

    def __post_init__(self) -> None:
        for name in ("clip_guidance_scale", "clip_image_guidance_scale", "vgg16_guidance_scale"):
            check_at_least(f"--{name}", getattr(self, name), 0, "0 is none, begin with about 100")
        check_at_least("--vgg16_guidance_layer", self.vgg16_guidance_layer, 1, "usually 20")
        check_at_most("--vgg16_guidance_layer", self.vgg16_guidance_layer, VGG_LAYERS, "usually 20")
        clip, vgg = ("clip_guidance_scale", "clip_image_guidance_scale"), ("vgg16_guidance_scale",)
        for name, scales, usual, needed in (
            ("clip_guidance_model", clip, None, _CLIP_FILES),
            ("vgg16_guidance_model", vgg, None, "torchvision's vgg16-397923af.pth"),
            ("vgg16_guidance_layer", vgg, VGG_LAYER, None),
        ):
            value, given = getattr(self, name), [f"--{scale}" for scale in scales if getattr(self, scale)]
            if given and value is None:
                raise OptionError(f"{' and '.join(given)} needs --{name}: {needed}. Nothing is downloaded")
            if value != usual and not given:
                raise OptionError(f"--{name} does nothing without --{' or --'.join(scales)}")

    @property
    def uses_clip(self) -> bool:
        """Whether CLIP steers."""
        return self.clip_guidance_scale > 0 or self.clip_image_guidance_scale > 0

    @property
    def picture_option(self) -> str | None:
        """The first option that needs a guide picture; None: none does."""
        scales = ("clip_image_guidance_scale", "vgg16_guidance_scale")
        return next((f"--{name}" for name in scales if getattr(self, name) > 0), None)


def add_guide_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `GuideOptions`."""
    group = parser.add_argument_group("guidance by other networks")
    group.add_argument(
        "--clip_guidance_scale",
        type=float,
        default=0.0,
        help="how strongly CLIP steers the picture towards the prompt, or towards the text of --c; about 100",
    )
    group.add_argument(
        "--clip_image_guidance_scale",
        type=float,
        default=0.0,
        help="how strongly CLIP steers the picture towards that of --guide_image_path; about 100",
    )
    group.add_argument(
        "--clip_guidance_model",
        help="CLIP for them, with both towers: the folder or file of a release in Hugging Face's layout",
    )
    group.add_argument(
        "--vgg16_guidance_scale",
        type=float,
        default=0.0,
        help="how strongly VGG16 steers the picture towards that of --guide_image_path; about 100",
    )
    group.add_argument(
        "--vgg16_guidance_layer",
        type=int,
        default=VGG_LAYER,
        help=f"layer of VGG16 whose features are compared, 1 to {VGG_LAYERS}: 20 is that of conv4_2",
    )
    group.add_argument(
        "--vgg16_guidance_model",
        help="VGG16 for it: torchvision's vgg16-397923af.pth, or a safetensors of it",
    )
