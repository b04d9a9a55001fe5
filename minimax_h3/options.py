"""MiniMax-H3's own options for caching, training and generation. Standard library only."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from modules.errors import OptionError
from modules.options import (
    FREE,
    HABIT,
    OF_DECODING,
    OF_REQUEST,
    Options,
    not_needed,
    of_request,
    option,
    unsupported,
)
from modules.speed_options import TextEncoderOptions, VaeOptions, dit_dtype_option, fp8_text_option

T = TypeVar("T")

NAME = "MiniMax-H3"
FPS = 24.0  # of all clips
SIZE = (1344, 768)  # height and width where nothing is said, as in the known tuner
FRAMES, LEAST_FRAMES, MOST_FRAMES = 124, 124, 345  # 5 to 15 seconds
STEPS = 30
MOST_SHIFT = 1000.0
_FRAMES = "clips from a first and last frame are not built yet. Leave it out, to make one of the prompt alone"
_REFERENCES = "clips from references are not built yet. Leave it out, to make one of the prompt alone"
_ATTENTION = "the text encoder computes attention with PyTorch's own kernels"
_FP4 = "files in nvfp4 are not read, so that no such products are needed. Give the bf16 file"
_TEXTS = "prompts are encoded each time. Give the text encoder to --text_encoder"
_PLACES = "places in time of a picture are not built yet. Leave it out, and give --video_length 1"
_BANDS = "frames are written as they are decoded. Leave it out"
_TRAJECTORY = "latents of single steps are not written. Give --preview_latent_every to see them"
_WAITING = "layers of the text encoder that do not fit on the device wait in host memory by themselves."
_LAYOUT = (
    "order of the rows of fused queries, keys and values in --dit. Shards of the release have them "
    "interleaved by head, single files stacked; default: by the file's name"
)


class H3TextOptions(TextEncoderOptions):
    """Path of the text encoder, and how it runs."""

    text_encoder: Path | None = option("Qwen3-VL (32B) text encoder: file, first shard or folder", often=True)
    text_encoder_tokenizer: Path | None = option(
        "its tokenizer, MiniMax-H3's own: folder or file; default: in or next to the encoder's folder, else "
        "from the hub",
        flags=("--tokenizer",),
        often=True,
    )
    in_fp8: bool = fp8_text_option(
        "fp8_vl", "the linear layers of Qwen3-VL in fp8: half the memory, slightly different states"
    )


class H3VaeOptions(Options):
    """The autoencoders of pictures and of sound."""

    file: VaeOptions = option(
        facts=OF_DECODING,
        settings={"vae": {"help": "VAE of pictures: file or folder", "flags": ("--video_vae",)}},
    )
    audio_vae: Path | None = option("VAE of sound: file or folder", facts=OF_DECODING, often=True)


class H3ModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option(  # resume compares its name
        "transformer: file, first shard or folder", flags=("--model",), facts=FREE, often=True
    )
    dit_dtype: str | None = dit_dtype_option()
    h3_qkv_layout: str | None = option(_LAYOUT, choices=("stacked", "interleaved"), facts=HABIT)
    vae: H3VaeOptions = option(facts=FREE)
    text: H3TextOptions = option(facts=FREE)


class H3GenerationOptions(H3ModelOptions, title=NAME):
    """Options of minimax_h3_generate_video.py besides the shared ones."""

    task: str = option(
        "what a clip is made from: t2va, a text",
        default="t2va",
        choices=("t2va",),
        refused={"fl2va": _FRAMES, "ref2va": _REFERENCES},
        facts=OF_REQUEST,
        often=True,
    )
    height: int | None = option("with --width: the same as --video_size", least=1, facts=OF_REQUEST)
    width: int | None = option("with --height: the same as --video_size", least=1, facts=OF_REQUEST)
    h3_shift_audio: float | None = option(
        "time shift of the sound's schedule (--fsa in a prompt line); 3 for LoRAs of four steps",
        default=3.0,
        above=0,
        most=MOST_SHIFT,
        facts=of_request("h3_shift_audio"),
    )
    allow_experimental_duration: bool = option(
        f"also make clips of less than {LEAST_FRAMES} or more than {MOST_FRAMES} frames, for which the model "
        "was not trained",
        facts=OF_REQUEST,
    )
    text_encoder_attn_mode: str = option(
        "kernels of the text encoder's attention",
        default="sdpa",
        choices=("sdpa", "flash_attention_2", "eager"),
        refused=dict.fromkeys(("flash_attention_2", "eager"), _ATTENTION),
    )
    text_encoder_blocks_to_swap = not_needed(_WAITING, type=int, default=0)
    prune_adaln = unsupported(
        "a file is read as it is, whole or pruned. Give minimax_h3_*_pruned_*.safetensors"
    )
    nvfp4_scaled_mm = unsupported(_FP4)
    text_cache = unsupported(_TEXTS, type=Path)
    first_frame = unsupported(_FRAMES, type=Path)
    last_frame = unsupported(_FRAMES, type=Path)
    keyframe = unsupported(_FRAMES, action="append")
    condition_image = unsupported(_FRAMES, type=Path, action="append")
    reference_jsonl = unsupported(_REFERENCES, type=Path)
    reference_index = unsupported(_REFERENCES, type=int, default=0)
    reference_image = unsupported(_REFERENCES, action="append")
    reference_video = unsupported(_REFERENCES, action="append")
    reference_audio = unsupported(_REFERENCES, action="append")
    reference_image_short_edge = unsupported(_REFERENCES, type=int, default=2048)
    reference_video_short_edge = unsupported(_REFERENCES, type=int, default=768)
    ref = unsupported(_REFERENCES, action="append")
    one_frame_inference = unsupported(
        _PLACES,
        type=str,
    )
    stretch_keep_bands = unsupported(_BANDS, type=int, default=0)
    trajectory_dir = unsupported(_TRAJECTORY, type=Path)
    trajectory_stride = unsupported(
        _TRAJECTORY,
        type=int,
        default=1,
    )
    lora_runtime_attach = not_needed(
        "merging keeps small LoRAs: --lora_rounding rounds 16-bit weights at random where the nearest would "
        "lose them."
    )

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise OptionError("--height and --width: give both")


def settle_generation(shared: T, own_options: H3GenerationOptions) -> tuple[T, H3GenerationOptions]:
    """Put --width and --height into the size of the shared record.

    Raises OptionError if --video_size says another one, or for guidance, which is built into the model.
    """
    options: Any = shared
    request = options.request
    if request.guidance_scale not in (None, 1):
        raise OptionError(
            f"--guidance_scale {request.guidance_scale:g}: the guidance of {NAME} is built in, so that there "
            "is no pass without the prompt. Leave it out"
        )
    if options.guidance.nag.is_on:
        raise OptionError(
            f"--nag_scale {options.guidance.nag.nag_scale:g}: {NAME} has one attention for text, sound and "
            "pictures, and none to the text alone. Leave it out"
        )
    size = request.video_size
    if own_options.height is not None and own_options.width is not None:
        own_size = (own_options.height, own_options.width)
        if size is not None and tuple(size) != own_size:
            raise OptionError(
                f"--height {own_size[0]} --width {own_size[1]} and --video_size {size[0]} {size[1]} differ: "
                "give one of them"
            )
        size = own_size
    request = replace(request, video_size=size or SIZE)
    return replace(options, request=request), own_options
