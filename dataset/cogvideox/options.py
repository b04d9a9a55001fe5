"""Options of prepare_dataset.py. Standard library only."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most, check_seed

SIDES = (256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536)  # of the form; pixels
FRAMES = 49  # of the form, for preparing
MAX_TOKENS = 226  # of CogVideoX's text encoder
DTYPES = ("fp32", "fp16", "bf16")
MOST_THREADS = 1024
LONGEST_SIDE = 16_384  # pixels
MOST_FRAMES = 100_000


@dataclass(frozen=True)
class ClipSourceOptions:
    """Where clips and captions are."""

    data_root: Path
    dataset_file: Path | None
    caption_column: str | None
    video_column: str | None
    id_token: str | None

    def __post_init__(self) -> None:
        if self.id_token is not None and len(self.id_token.splitlines()) > 1:
            raise OptionError("--id_token has several lines; a prompt is one line")


@dataclass(frozen=True)
class ShapeOptions:
    """Which frames of a clip are taken, and what becomes of them."""

    height_buckets: tuple[int, ...]
    width_buckets: tuple[int, ...]
    frame_buckets: tuple[int, ...]
    max_num_frames: int
    target_fps: int
    random_flip: float | None  # None: never
    video_reshape_mode: str | None  # None: resize, whatever becomes of the proportions
    seed: int

    def __post_init__(self) -> None:
        for option, sides in (
            ("--height_buckets", self.height_buckets),
            ("--width_buckets", self.width_buckets),
        ):
            for side in sides:
                check_at_least(option, side, 16, "pixels")
                check_at_most(option, side, LONGEST_SIDE, "pixels")
                if side % 2:
                    raise OptionError(f"{option} {side}: give even numbers; the videos have colours by twos")
        counts = [("--frame_buckets", frames) for frames in self.frame_buckets]
        for option, frames in [*counts, ("--max_num_frames", self.max_num_frames)]:
            check_at_least(option, frames, 1, "frames")
            check_at_most(option, frames, MOST_FRAMES, "frames")
        check_at_least("--target_fps", self.target_fps, 1, "frames a second")
        check_at_most("--target_fps", self.target_fps, 1000, "frames a second")
        check_at_least("--random_flip", self.random_flip, 0, "a share of the clips, from 0 to 1")
        check_at_most("--random_flip", self.random_flip, 1, "a share of the clips, from 0 to 1")
        check_seed("--seed", self.seed)


@dataclass(frozen=True)
class EncodingOptions:
    """Which models encode, and how."""

    model_id: str | None
    save_latents_and_embeddings: bool
    save_image_latents: bool
    max_sequence_length: int
    dtype: str
    use_slicing: bool
    use_tiling: bool
    batch_size: int
    device: str | None  # None: CUDA or MPS if there is one, else the CPU
    pin_memory: bool

    def __post_init__(self) -> None:
        if self.save_image_latents and not self.save_latents_and_embeddings:
            raise OptionError("--save_image_latents needs --save_latents_and_embeddings: add that")
        if self.save_latents_and_embeddings and self.model_id is None:
            raise OptionError(
                "--model_id is missing: its VAE and text encoder compute what --save_latents_and_embeddings "
                "saves"
            )
        check_at_least("--batch_size", self.batch_size, 1, "clips to encode at once")
        check_at_most("--batch_size", self.batch_size, 1024, "clips to encode at once")
        check_at_least("--max_sequence_length", self.max_sequence_length, 1, "tokens")
        check_at_most("--max_sequence_length", self.max_sequence_length, 4096, "tokens")


@dataclass(frozen=True)
class WorkerOptions:
    """How many threads do what."""

    num_decode_threads: int
    dataloader_num_workers: int
    num_artifact_workers: int

    def __post_init__(self) -> None:
        for option, count, least in (
            ("--num_decode_threads", self.num_decode_threads, 0),
            ("--dataloader_num_workers", self.dataloader_num_workers, 0),
            ("--num_artifact_workers", self.num_artifact_workers, 1),
        ):
            check_at_least(option, count, least, "threads")
            check_at_most(option, count, MOST_THREADS, "threads")


@dataclass(frozen=True)
class PrepareOptions:
    """Options of prepare_dataset.py."""

    source: ClipSourceOptions
    shape: ShapeOptions
    encoding: EncodingOptions
    workers: WorkerOptions
    output_dir: Path

    def __post_init__(self) -> None:
        if self.output_dir.resolve() == self.source.data_root.resolve():
            raise OptionError(
                f"--output_dir {self.output_dir} is --data_root: its lists would be written over. Give "
                "another folder."
            )


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `PrepareOptions`."""
    group = parser.add_argument_group("clips and captions")
    group.add_argument("--data_root", type=str, required=True, help="folder that the paths of clips are in")
    group.add_argument(
        "--dataset_file",
        type=str,
        default=None,
        help="CSV, data.jsonl or another table with a row for each clip; default: prompt.txt and "
        "videos.txt in --data_root, a line for each clip",
    )
    group.add_argument(
        "--caption_column",
        type=str,
        default=None,
        help="column of captions (caption or prompt), or the list of captions in --data_root (prompt.txt)",
    )
    group.add_argument(
        "--video_column",
        type=str,
        default=None,
        help="column of clips (video), or the list of clips in --data_root (videos.txt)",
    )
    group.add_argument("--id_token", type=str, default=None, help="word to put in front of every caption")
    _add_shape_arguments(parser)
    _add_encoding_arguments(parser)
    group = parser.add_argument_group("output and threads")
    group.add_argument("--output_dir", type=str, required=True, help="folder for what is prepared")
    group.add_argument(
        "--num_decode_threads",
        type=int,
        default=0,
        help="threads that decode one clip (%(default)s: FFmpeg's choice)",
    )
    group.add_argument(
        "--dataloader_num_workers",
        type=int,
        default=0,
        help="clips to read at a time, ahead of the encoder (0 and 1: one)",
    )
    group.add_argument(
        "--num_artifact_workers", type=int, default=4, help="threads that write files (%(default)s)"
    )


def _add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("frames and sizes")
    for side in ("height", "width"):
        group.add_argument(
            f"--{side}_buckets",
            type=int,
            nargs="+",
            default=list(SIDES),
            help=f"{side}s in pixels; a clip gets the nearest size",
        )
    group.add_argument(
        "--frame_buckets",
        type=int,
        nargs="+",
        default=[FRAMES],
        help="numbers of frames; a clip gets the nearest one that it has",
    )
    group.add_argument(
        "--max_num_frames", type=int, default=FRAMES, help="most frames of a clip (%(default)s)"
    )
    group.add_argument(
        "--target_fps",
        type=int,
        default=8,
        help="frames a second of the clips that are written (%(default)s)",
    )
    group.add_argument(
        "--random_flip", type=float, default=None, help="share of clips to mirror, left to right, from 0 to 1"
    )
    group.add_argument(
        "--video_reshape_mode",
        type=str,
        default=None,
        choices=["center", "random", "none"],
        help="resize until a clip covers its size, and cut out the centre or a random part (none: as "
        "random); default: resize without cutting, which changes the proportions",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=42,
        help="of names, flips and random parts (%(default)s); a run with the same one continues the last",
    )


def _add_encoding_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("encoding")
    group.add_argument(
        "--model_id",
        type=str,
        default=None,
        help="folder of a diffusers pipeline, or its name on the hub: of Wan, HunyuanVideo or CogVideoX, "
        "with vae, text_encoder and tokenizer",
    )
    group.add_argument(
        "--save_latents_and_embeddings",
        action="store_true",
        help="also save the VAE's moments of each clip, and what the text encoder makes of its caption",
    )
    group.add_argument(
        "--save_image_latents", action="store_true", help="also save the moments of first frames alone"
    )
    group.add_argument(
        "--max_sequence_length",
        type=int,
        default=MAX_TOKENS,
        help="tokens of a caption for CogVideoX (%(default)s); the text encoders of Wan and HunyuanVideo "
        "have their own numbers",
    )
    group.add_argument(
        "--dtype",
        type=str,
        default="fp32",
        choices=DTYPES,
        help="that the VAE computes in and its moments are saved in (%(default)s); also of CogVideoX's text "
        "encoder, while others have the one that they are cached with",
    )
    group.add_argument("--use_slicing", action="store_true", help="encode the clips of a batch one by one")
    group.add_argument("--use_tiling", action="store_true", help="encode large frames in tiles: less memory")
    group.add_argument(
        "--batch_size", type=int, default=1, help="clips or captions to encode at once (%(default)s)"
    )
    group.add_argument(
        "--device", type=str, default=None, help="cuda, cuda:1, mps or cpu; default: the best one available"
    )
    group.add_argument(
        "--pin_memory",
        action="store_true",
        help="copy frames to a GPU through pinned memory: faster",
    )
