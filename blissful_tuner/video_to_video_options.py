"""Options of videos that start from another video, an image or saved latents. Standard library only."""

import argparse
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.contract.source import IMAGE, LATENTS, SOURCES, VIDEO
from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from modules.parser import add_unsupported

SHARES = ("strength", "v2v_denoise")  # a script has one of them under all spellings
SPELLINGS = ("--strength", "--v2v_denoise", "--denoise_strength")
MOST_NOISE = 10
USUAL_NOISE = "0.01 to 0.05 are usual"
USED_WITH = {  # options that count with some sources only
    "v2v_extra_noise": {VIDEO, LATENTS},
    "v2v_pad_mode": {VIDEO},
    "i2_extra_noise": {IMAGE},
}


@dataclass(frozen=True)
class SourceDefaults:
    """What these options are in one family's script."""

    share: str = "v2v_denoise"  # of SHARES: the name that the script's users know
    denoise: float = 0.5
    pad_mode: str | None = "end"  # None: a short video is refused
    takes_image: bool = True  # whether there is an --i2i_path
    takes_video: bool = True  # whether there is a --video_path


@dataclass(frozen=True)
class SourceOptions:
    """What videos start from instead of noise; a prompt line can override it."""

    video_path: Path | None
    i2i_path: Path | None
    from_latent: Path | None
    strength: float | None  # None: the script has the other of SHARES
    v2v_denoise: float | None
    v2v_noise_mode: str
    v2v_pad_mode: str | None
    v2v_extra_noise: float | None
    i2_extra_noise: float | None
    usual: Mapping[str, Any] = field(metadata={"option": "usual_sources"})  # the script's defaults, by option

    def __post_init__(self) -> None:
        check_one_source({name: getattr(self, name) for name in SOURCES})
        check_share(f"--{self.share}", self.denoise)
        for name in ("v2v_extra_noise", "i2_extra_noise"):
            check_at_least(f"--{name}", getattr(self, name), 0, USUAL_NOISE)
            check_at_most(f"--{name}", getattr(self, name), MOST_NOISE, USUAL_NOISE)

    @property
    def share(self) -> str:
        """The option of `denoise`."""
        return "v2v_denoise" if self.strength is None else "strength"

    @property
    def denoise(self) -> float:
        """How much is made anew, 0..1."""
        share = getattr(self, self.share)
        return 1.0 if share is None else share

    def unused(self, used: Collection[str]) -> dict[str, str]:
        """Return the options that were given for nothing, as text, and what they would be used with.

        used: those of SOURCES that videos start from.
        """
        found = {}
        for name, usual in self.usual.items():
            needed = USED_WITH.get(name, set(SOURCES))
            if getattr(self, name) != usual and not needed & set(used):
                found[f"--{name} {getattr(self, name)}"] = " or ".join(
                    f"--{source}" for source in SOURCES if source in needed
                )
        return found


def check_one_source(paths: Mapping[str, object]) -> None:
    """Raise OptionError if more than one of SOURCES is given."""
    given = [f"--{name} {paths[name]}" for name in SOURCES if paths.get(name)]
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)}: a video starts from one of them. Leave out the others")


def check_share(option: str, share: float) -> None:
    """Raise OptionError if a share does not lie between 0 and 1."""
    if not 0 <= share <= 1:
        raise OptionError(f"{option} {share:g}: give a share of the steps from 0 to 1")


NO_SOURCE = SourceOptions(None, None, None, None, None, "traditional", None, None, None, {})


def add_video_to_video_arguments(parser: argparse.ArgumentParser, defaults: SourceDefaults) -> None:
    """Declare the options of `SourceOptions`, as the script has them."""
    group = parser.add_argument_group("video to video" if defaults.takes_video else "image to image")
    if defaults.takes_video:
        group.add_argument(
            "--video_path",
            type=str,
            default=None,
            help="video, or folder of images, to start from instead of noise",
        )
    else:
        no_video = "this script makes pictures. Give one to --i2i_path"
        add_unsupported(group, "--video_path", type=str, default=None, reason=no_video)
    if defaults.takes_image:
        group.add_argument("--i2i_path", type=str, default=None, help="image to make another image from")
    else:
        add_unsupported(
            group,
            "--i2i_path",
            type=str,
            default=None,
            reason="this model makes single images with --one_frame_inference and --control_image_path",
            help="image to make another image from",
        )
    group.add_argument(
        "--from_latent",
        type=str,
        default=None,
        help="latent file of an earlier run (--output_type latent or both) to start from",
    )
    first = f"--{defaults.share}"
    group.add_argument(
        *(first, *(option for option in SPELLINGS if option != first)),
        dest=defaults.share,
        type=float,
        default=defaults.denoise,
        help="how much is made anew: share of the steps that run; 1 replaces it completely",
    )
    group.add_argument(
        "--v2v_noise_mode",
        "--noise_mode",
        type=str,
        default="traditional",
        choices=["traditional", "direct"],
        help="traditional: the share is one of the steps; direct: it is the noise level of the first step",
    )
    if defaults.takes_video:
        group.add_argument(
            "--v2v_pad_mode",
            type=str,
            default=defaults.pad_mode,
            choices=["front", "end"],
            help="how a video that is too short is filled up: repeat its first or its last frame"
            + ("; default: it is refused" if defaults.pad_mode is None else ""),
        )
    else:
        add_unsupported(group, "--v2v_pad_mode", type=str, default=None, reason=no_video)
    group.add_argument(
        "--v2v_extra_noise",
        "--v2_extra_noise",
        type=float,
        default=None,
        help="noise added to the noisy video, for more change",
    )
    if defaults.takes_image:
        group.add_argument(
            "--i2_extra_noise", type=float, default=None, help="noise added to the noisy image of --i2i_path"
        )
    else:
        parser.set_defaults(i2_extra_noise=None)
    parser.set_defaults(**{name: None for name in SHARES if name != defaults.share})
    names = (defaults.share, "v2v_noise_mode", "v2v_pad_mode", "v2v_extra_noise", "i2_extra_noise")
    parser.set_defaults(usual_sources={name: parser.get_default(name) for name in names})
