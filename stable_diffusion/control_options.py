"""Options of ControlNets and ControlNet-LLLite. Standard library only."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError

LOW, HIGH = 63, 191  # thresholds of "canny" alone


@dataclass(frozen=True)
class CannyThresholds:
    """Edges are where the grey image changes by more than `high`, and by more than `low` next to such."""

    low: int
    high: int


@dataclass(frozen=True)
class ControlUse:
    """How one ControlNet or ControlNet-LLLite is used."""

    path: Path
    canny: CannyThresholds | None  # edges of the guide image are drawn; None: it is taken as it is
    multiplier: float
    ratio: float  # it acts in steps i of n (from 0) with i / n <= ratio


@dataclass(frozen=True)
class ControlOptions:
    """ControlNets or ControlNet-LLLites, in the order of their guide pictures."""

    control_net_models: tuple[Path, ...] | None
    control_net_lllite_models: tuple[Path, ...] | None
    control_net_preps: tuple[str, ...] | None  # None: none
    control_net_multipliers: tuple[float, ...] | None  # None: 1 each
    control_net_ratios: tuple[float, ...] | None  # None: 1 each

    def __post_init__(self) -> None:
        if self.control_net_models and self.control_net_lllite_models:
            raise OptionError(
                "--control_net_models and --control_net_lllite_models do not work together: give one of them"
            )
        models = len(self.control_net_models or self.control_net_lllite_models or ())
        for name in ("control_net_preps", "control_net_multipliers", "control_net_ratios"):
            count = len(getattr(self, name) or ())
            if count and not models:
                raise OptionError(f"--{name} needs --control_net_models or --control_net_lllite_models")
            if count and count != models:
                raise OptionError(
                    f"--{name} has {_count(count, 'value')} for {_count(models, 'model')} of {self.option}: "
                    "give one for each model, in the same order, or leave the option out"
                )
        for text in self.control_net_preps or ():
            read_preparation(text)
        for ratio in self.control_net_ratios or ():
            if not 0 <= ratio <= 1:
                raise OptionError(f"--control_net_ratios {ratio}: give a share of the steps from 0 to 1")

    @property
    def option(self) -> str:
        """The option that names the models."""
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
            f"{compared_by} and {options.option} both take the pictures of --guide_image_path: leave one of "
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
            f"{options.option} needs --guide_image_path: a picture for each model, or a folder of them"
        )
    if shrinks and options.control_net_lllite_models:
        raise OptionError(
            f"--ds_depth_1 (Deep Shrink) and {options.option} do not work together, as the sizes of features "
            "differ: leave one of them out, or take ControlNets"
        )


def add_control_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `ControlOptions`."""
    group = parser.add_argument_group("ControlNet")
    group.add_argument(
        "--control_net_models",
        nargs="*",
        help="ControlNets: files, or folders in the layout of diffusers. Of several, one acts in each step, "
        "in turn, with Stable Diffusion 1.x and 2.x; with XL the mean of all acts",
    )
    group.add_argument(
        "--control_net_lllite_models", nargs="*", help="files of ControlNet-LLLite, for Stable Diffusion XL"
    )
    group.add_argument(
        "--control_net_preps",
        nargs="*",
        help="how the guide picture of each model is prepared: none, or canny_63_191 (its edges, found with "
        "these two thresholds)",
    )
    group.add_argument(
        *("--control_net_multipliers", "--control_net_weights"),
        dest="control_net_multipliers",
        nargs="*",
        type=float,
        help="strength of each model; 1 if not given",
    )
    group.add_argument(
        "--control_net_ratios",
        nargs="*",
        type=float,
        help="share of the steps, from the first, in which each model acts: 0.5 is the first half; 1 if not "
        "given",
    )


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"
