"""Options of how texts become conditions. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.option_values import check_at_least

NORMALIZE_MODES = ("original", "none", "abs")


@dataclass(frozen=True)
class TextOptions:
    """How texts become conditions."""

    clip_skip: int | None  # None: the kind's own
    max_embeddings_multiples: int | None  # chunks of 75 tokens at most; None: one
    emb_normalize_mode: str
    textual_inversion_embeddings: tuple[Path, ...] | None
    XTI_embeddings: tuple[Path, ...] | None
    clip_vision_strength: float | None

    def __post_init__(self) -> None:
        check_at_least("--clip_skip", self.clip_skip, 1, "1 is the last layer of the text encoder")
        check_at_least(
            "--max_embeddings_multiples", self.max_embeddings_multiples, 1, "the number of 75 tokens each"
        )


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `TextOptions`."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--clip_skip",
        type=int,
        help="which layer of the text encoder counts, from the end: 1 is the last one; usually 1 for Stable "
        "Diffusion 1.x, 1 for 2.x, which is loaded without OpenCLIP's last layer, as it was trained, 2 for "
        "XL",
    )
    group.add_argument(
        "--max_embeddings_multiples",
        type=int,
        help="how long a prompt may be, in chunks of 75 tokens; usually 1, the rest is cut off",
    )
    group.add_argument(
        "--emb_normalize_mode",
        choices=NORMALIZE_MODES,
        default="original",
        help="what weights such as (cat:1.3) leave unchanged: original: the mean of the embeddings, abs: the "
        "mean of their absolute values, none: nothing",
    )
    group.add_argument(
        "--textual_inversion_embeddings",
        nargs="*",
        help="files of textual inversion; the name of a file, without its ending, is the word for it",
    )
    group.add_argument(
        "--clip_vision_strength",
        type=float,
        help="Stable Diffusion XL with --image_path: the picture, seen by CLIP, stands in place of the "
        "prompt's pooled state, times this",
    )
    group.add_argument(
        "--XTI_embeddings",
        nargs="*",
        help="files of extended textual inversion (P+), for Stable Diffusion 1.x and 2.x: a word has another "
        "vector for each cross-attention layer of the U-Net",
    )
