"""Options of previews of what is being made. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.option_values import check_at_least


@dataclass(frozen=True)
class PreviewOptions:
    """When to show what is being made, and how it is decoded for that."""

    preview_latent_every: int | None  # steps, or sections of a video made in several; None: no previews
    preview_vae: Path | None  # TAEHV file; None: a linear map from latents to colours

    def __post_init__(self) -> None:
        check_at_least("--preview_latent_every", self.preview_latent_every, 1, "leave it out for no previews")
        if self.preview_vae is None:
            return
        if not self.preview_vae.exists():
            raise OptionError(
                f"--preview_vae {self.preview_vae}: no such file. Give a TAEHV file, or leave it out for "
                "previews without one"
            )
        if self.preview_latent_every is None:
            raise OptionError(
                f"--preview_vae {self.preview_vae} has no effect by itself: add --preview_latent_every N"
            )


NO_PREVIEW = PreviewOptions(None, None)


def add_preview_arguments(parser: argparse.ArgumentParser, of: str = "previews", where: str = "") -> None:
    """Declare the options of `PreviewOptions`. of: title of their group. where: folder, for the help."""
    group = parser.add_argument_group(of)
    group.add_argument(
        "--preview_latent_every",
        type=int,
        default=None,
        help="every so many steps show the clip as it is expected to become, in latent_preview.mp4 or .png "
        f"in {where or '--save_path'}; counts sections if a clip is made in several (FramePack)",
    )
    group.add_argument(
        "--preview_vae",
        type=str,
        default=None,
        help="small VAE (TAEHV: taew2_1 for Wan, taehv for HunyuanVideo and FramePack) for previews that are "
        "sharp and have all frames; default: blurred colours, at no cost",
    )
