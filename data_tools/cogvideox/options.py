"""Options of prepare_dataset.py. Standard library only."""

from pathlib import Path

from modules.errors import OptionError
from modules.options import Options, option
from modules.text_files import real_path

SIDES = (256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536)  # pixels; defaults
FRAMES = 49  # default number of frames
MAX_TOKENS = 226  # of CogVideoX's text encoder
DTYPES = ("fp32", "fp16", "bf16")
MAX_THREADS = 1024
LONGEST_SIDE = 16_384  # pixels
MAX_FRAMES = 100_000


class ClipSourceOptions(Options, title="clips and captions"):
    """Which clips and captions are prepared, and the files or columns that contain them."""

    data_root: Path = option("folder that the paths of clips are in", required=True)
    dataset_file: Path | None = option(
        "CSV, data.jsonl or another table with a row for each clip; default: prompt.txt and "
        "videos.txt in --data_root, a line for each clip"
    )
    caption_column: str | None = option(
        "column of captions (caption or prompt), or the list of captions in --data_root (prompt.txt)"
    )
    video_column: str | None = option(
        "column of clips (video), or the list of clips in --data_root (videos.txt)"
    )
    id_token: str | None = option("word to put in front of every caption")

    def __post_init__(self) -> None:
        if self.id_token is not None and len(self.id_token.splitlines()) > 1:
            raise OptionError("--id_token has several lines; a prompt is one line")


class ShapeOptions(Options, title="frames and sizes"):
    """Which frames of a clip are used, and at which size."""

    height_buckets: tuple[int, ...] = option(
        "heights in pixels; a clip gets the nearest size",
        default=SIDES,
        nargs="+",
        minimum=16,
        maximum=LONGEST_SIDE,
    )
    width_buckets: tuple[int, ...] = option(
        "widths in pixels; a clip gets the nearest size",
        default=SIDES,
        nargs="+",
        minimum=16,
        maximum=LONGEST_SIDE,
    )
    frame_buckets: tuple[int, ...] = option(
        "numbers of frames; a clip gets the nearest one that it has",
        default=(FRAMES,),
        nargs="+",
        minimum=1,
        maximum=MAX_FRAMES,
    )
    max_num_frames: int = option("most frames of a clip", default=FRAMES, minimum=1, maximum=MAX_FRAMES)
    target_fps: int = option(
        "frames a second of the clips that are written", default=8, minimum=1, maximum=1000
    )
    random_flip: float | None = option(
        "fraction of clips to mirror, left to right, from 0 to 1; default: none", minimum=0, maximum=1
    )
    video_reshape_mode: str | None = option(
        "resize until a clip covers its size, and cut out the center or a random part (none: as "
        "random); default: resize without cutting, which changes the proportions",
        choices=("center", "random", "none"),
    )
    seed: int = option(
        "seed of names, flips and random parts; a run with the same seed continues the last one",
        default=42,
        minimum=-(2**63),
        below=2**64,
    )

    def __post_init__(self) -> None:
        for name in ("height_buckets", "width_buckets"):
            for side in getattr(self, name):
                if side % 2:
                    raise OptionError(f"--{name} {side}: use even numbers; the videos have colors by twos")


class EncodingOptions(Options, title="encoding"):
    """Options for encoding: which model, with which dtype, tiling and batch size."""

    model_id: str | None = option(
        "folder of a diffusers pipeline, or its name on the hub: of Wan, HunyuanVideo or CogVideoX, "
        "with vae, text_encoder and tokenizer"
    )
    save_latents_and_embeddings: bool = option(
        "also save the VAE's moments of each clip, and the text encoder's output for its caption",
        needs="model_id",
        hint="its VAE and text encoder compute them",
    )
    save_image_latents: bool = option(
        "also save the moments of first frames alone", needs="save_latents_and_embeddings"
    )
    max_sequence_length: int = option(
        "tokens of a caption for CogVideoX; the text encoders of Wan and HunyuanVideo have their own numbers",
        default=MAX_TOKENS,
        minimum=1,
        maximum=4096,
    )
    dtype: str = option(
        "dtype in which the VAE computes and its moments are saved; also for CogVideoX's text encoder, "
        "while other encoders keep the dtype that they are cached with",
        default="fp32",
        choices=DTYPES,
    )
    use_slicing: bool = option("encode the clips of a batch one by one")
    use_tiling: bool = option("encode large frames in tiles: less memory")
    batch_size: int = option("clips or captions per batch", default=1, minimum=1, maximum=1024)
    device: str | None = option("cuda, cuda:1, mps or cpu; default: the best one available")
    pin_memory: bool = option("copy frames to a GPU through pinned memory: faster")


class WorkerOptions(Options):
    """Number of threads for each stage of the preparation."""

    num_decode_threads: int = option(
        "threads that decode one clip; 0: FFmpeg's choice", default=0, minimum=0, maximum=MAX_THREADS
    )
    dataloader_num_workers: int = option(
        "clips to read at a time, ahead of the encoder (0 and 1: one)",
        default=0,
        minimum=0,
        maximum=MAX_THREADS,
    )
    num_artifact_workers: int = option("threads that write files", default=4, minimum=1, maximum=MAX_THREADS)


class PrepareOptions(Options, title="output and threads"):
    """Output folder and number of threads of the preparation."""

    source: ClipSourceOptions
    shape: ShapeOptions
    encoding: EncodingOptions
    output_dir: Path = option("folder for the prepared data", required=True)
    workers: WorkerOptions

    def __post_init__(self) -> None:
        if real_path(self.output_dir) == real_path(self.source.data_root):
            raise OptionError(
                f"--output_dir {self.output_dir} is --data_root: its lists would be written over. Pass "
                "another folder."
            )
