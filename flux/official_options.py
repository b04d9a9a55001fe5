"""The image guides' command line for FLUX.1 and Chroma, in the words of flux_generate_image.py.

Standard library only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux.options import CHROMA, FLUX, USUAL_GUIDANCE
from modules.errors import OptionError
from modules.minimal_options import (
    add_lora_arguments,
    add_offload_argument,
    check_side,
    lora_words,
    option_words,
    read_minimal_options,
    read_strengths,
)
from modules.parser import Parser

SIZE_STEP = 16
STEPS_ARE_THE_MODELS = "default: 4 for schnell, 50 for others"


@dataclass(frozen=True)
class FluxMinimalOptions:
    """Options of flux_minimal_inference.py."""

    ckpt_path: Path
    model_type: str
    clip_l: Path | None
    t5xxl: Path | None
    ae: Path | None
    apply_t5_attn_mask: bool
    prompt: str
    output_dir: Path
    dtype: str
    clip_l_dtype: str | None
    ae_dtype: str | None
    t5xxl_dtype: str | None
    flux_dtype: str | None
    seed: int | None
    steps: int | None
    guidance: float
    negative_prompt: str | None
    cfg_scale: float
    lora_weights: tuple[str, ...]
    width: int
    height: int
    interactive: bool

    def __post_init__(self) -> None:
        for option, side in (("--width", self.width), ("--height", self.height)):
            check_side(option, side, least=1)
        if is_fp8(self.ae_dtype):
            raise OptionError(f"--ae_dtype {self.ae_dtype}: the autoencoder computes in 16 or 32 bits")
        _ = self.loras, self.text_dtype

    @property
    def loras(self) -> list[tuple[str, float]]:
        """Return path and strength of each LoRA, given as `path` or `path;strength`."""
        return read_strengths(self.lora_weights)

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width, rounded up to whole tokens."""
        return round_up(self.height), round_up(self.width)

    @property
    def base_dtype(self) -> str:
        """Return the dtype to compute in; that of --dtype, unless that is of 8 bits."""
        return "bfloat16" if is_fp8(self.dtype) else self.dtype

    @property
    def dit_dtype(self) -> str:
        """Return the dtype that the transformer computes in."""
        named = None if is_fp8(self.flux_dtype) else self.flux_dtype
        return named or self.base_dtype

    @property
    def text_dtype(self) -> str:
        """Return the dtype of the text encoders. Raises OptionError if they differ."""
        named = (self.clip_l_dtype, self.t5xxl_dtype)
        given = {name for name in named if name is not None and not is_fp8(name)}
        if len(given) > 1:
            raise OptionError(
                f"--clip_l_dtype {self.clip_l_dtype} and --t5xxl_dtype {self.t5xxl_dtype}: both encoders "
                "compute in one dtype. Give the same; T5 may be in fp8"
            )
        return given.pop() if given else self.base_dtype


def is_fp8(dtype: str | None) -> bool:
    """Return whether a dtype, as the guides write it, has 8 bits."""
    return dtype is not None and "8" in dtype and "16" not in dtype


def round_up(side: int) -> int:
    """Return the next multiple of 16."""
    return -(-side // SIZE_STEP) * SIZE_STEP


def read_minimal(description: str | None, argv: Sequence[str] | None) -> FluxMinimalOptions:
    """Read the command line. Raises OptionError for what does not work here."""
    parser = Parser(description=description)
    _add_model_arguments(parser)
    _add_picture_arguments(parser)
    return read_minimal_options(parser, FluxMinimalOptions, argv)


def generation_words(options: FluxMinimalOptions) -> list[str]:
    """Return the same command as options of flux_generate_image.py."""
    height, width = options.size
    values = {
        "--dit": options.ckpt_path,
        "--model_type": options.model_type,
        "--save_path": options.output_dir,
        "--embedded_cfg_scale": options.guidance,
        "--guidance_scale": options.cfg_scale,
        "--dit_dtype": options.dit_dtype,
        "--text_encoder_dtype": options.text_dtype,
        "--vae_dtype": options.ae_dtype or options.base_dtype,
        "--clip_l": options.clip_l,
        "--t5xxl": options.t5xxl,
        "--ae": options.ae,
        "--seed": options.seed,
        "--infer_steps": options.steps,
        "--negative_prompt": options.negative_prompt,
        "--prompt": None if options.interactive else options.prompt,
    }
    switches = {
        "--fp8": is_fp8(options.flux_dtype or options.dtype),
        "--fp8_t5": is_fp8(options.t5xxl_dtype or options.dtype),
        "--apply_t5_attn_mask": options.apply_t5_attn_mask,
        "--interactive": options.interactive,
    }
    size = ["--image_size", str(height), str(width)]
    return [*option_words(values, switches), *size, *lora_words(options.loras)]


def _add_model_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--ckpt_path", type=str, required=True, help="transformer checkpoint")
    group.add_argument(
        "--model_type", type=str, default=FLUX, choices=[FLUX, CHROMA], help="the file says it too"
    )
    group.add_argument("--clip_l", type=str, default=None, help="CLIP-L text encoder; Chroma has none")
    group.add_argument("--t5xxl", type=str, default=None, help="T5-XXL text encoder")
    group.add_argument("--ae", type=str, default=None, help="autoencoder")
    group.add_argument(
        "--apply_t5_attn_mask", action="store_true", help="leave padding out of attention; always for Chroma"
    )
    group.add_argument("--dtype", type=str, default="bfloat16", help="dtype of what has no option of its own")
    for name, what in (
        ("clip_l", "CLIP-L"),
        ("ae", "autoencoder"),
        ("t5xxl", "T5, fp8 too"),
        ("flux", "transformer, fp8 too"),
    ):
        group.add_argument(f"--{name}_dtype", type=str, default=None, help=f"dtype of the {what}")
    add_offload_argument(group)
    add_lora_arguments(group)


def _add_picture_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("what to make")
    group.add_argument("--prompt", type=str, default="A photo of a cat", help="what the picture shows")
    group.add_argument("--output_dir", type=str, default=".", help="output folder")
    group.add_argument("--seed", type=int, default=None, help="default: a random one")
    group.add_argument("--steps", type=int, default=None, help=STEPS_ARE_THE_MODELS)
    group.add_argument(
        "--guidance", type=float, default=USUAL_GUIDANCE, help="guidance that FLUX.1 dev takes as an input"
    )
    group.add_argument("--negative_prompt", type=str, default=None, help="what to avoid")
    group.add_argument(
        "--cfg_scale", type=float, default=1.0, help="guidance by the negative prompt; 1 turns it off"
    )
    for side, usual in (("width", 1360), ("height", 768)):
        group.add_argument(
            f"--{side}", type=int, default=usual, help="in pixels; rounded up to a multiple of 16"
        )
    group.add_argument(
        "--interactive",
        action="store_true",
        help="ask for prompts; their options (--w --h --s --d --g --c --n --m) hold for later ones",
    )


NO_NEGATIVE = "-"  # in a line: no negative prompt


def negative(text: str) -> str:
    """Return the negative prompt that a line asks for."""
    return "" if text == NO_NEGATIVE else text


def line_sizes(text: str) -> int:
    """Return a side of a line in pixels, rounded up. Raises ValueError if it is no whole number."""
    return round_up(int(text))


# letters of a line whose values are read otherwise than in flux_generate_image.py: key, how
LINE_LETTERS: Mapping[str, tuple[str, Any]] = {
    "w": ("video_size_width", line_sizes),
    "h": ("video_size_height", line_sizes),
    "c": ("guidance_scale", float),
    "n": ("negative_prompt", negative),
    "m": ("lora_strengths", str),
}
