"""The image guides' command line for FLUX.1 and Chroma, in the words of flux_generate_image.py.

Standard library only.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flux.options import CHROMA, DEFAULT_GUIDANCE, FLUX
from modules.errors import OptionError
from modules.integers import round_up
from modules.minimal_options import MAX_SIDE, MinimalLoraOptions
from modules.option_values import option_argv
from modules.options import Options, option
from modules.script_options import parse_options

SIZE_STEP = 16


class FluxModelOptions(MinimalLoraOptions, title="model"):
    """The files of flux_minimal_inference.py, and how they compute."""

    ckpt_path: Path = option("transformer checkpoint", required=True)
    model_type: str = option("the file says it too", default=FLUX, choices=(FLUX, CHROMA))
    clip_l: Path | None = option("CLIP-L text encoder; Chroma has none")
    t5xxl: Path | None = option("T5-XXL text encoder")
    ae: Path | None = option("autoencoder")
    apply_t5_attn_mask: bool = option("leave padding out of attention; always for Chroma")
    dtype: str = option("dtype of what has no option of its own", default="bfloat16")
    clip_l_dtype: str | None = option("dtype of the CLIP-L")
    ae_dtype: str | None = option("dtype of the autoencoder")
    t5xxl_dtype: str | None = option("dtype of the T5, fp8 too")
    flux_dtype: str | None = option("dtype of the transformer, fp8 too")

    def __post_init__(self) -> None:
        if is_fp8(self.ae_dtype):
            raise OptionError(f"--ae_dtype {self.ae_dtype}: the autoencoder computes in 16 or 32 bits")
        super().__post_init__()
        _ = self.text_dtype

    @property
    def base_dtype(self) -> str:
        """Compute dtype: --dtype, or bfloat16 if --dtype has 8 bits."""
        return "bfloat16" if is_fp8(self.dtype) else self.dtype

    @property
    def dit_dtype(self) -> str:
        """Return the transformer's compute dtype: --flux_dtype unless it has 8 bits."""
        named = None if is_fp8(self.flux_dtype) else self.flux_dtype
        return named or self.base_dtype

    @property
    def text_dtype(self) -> str:
        """Return the text encoders' dtype; raise OptionError if they differ."""
        named = (self.clip_l_dtype, self.t5xxl_dtype)
        dtypes = {name for name in named if name is not None and not is_fp8(name)}
        if len(dtypes) > 1:
            raise OptionError(
                f"--clip_l_dtype {self.clip_l_dtype} and --t5xxl_dtype {self.t5xxl_dtype}: both encoders "
                "compute in one dtype. Pass the same; T5 may be in fp8"
            )
        return dtypes.pop() if dtypes else self.base_dtype


class FluxImageOptions(Options, title="what to make"):
    """The image that flux_minimal_inference.py generates."""

    prompt: str = option("what the image shows", default="A photo of a cat")
    output_dir: Path = option("output folder", default=Path())
    seed: int | None = option("default: a random one")
    steps: int | None = option("default: 4 for schnell, 50 for others")
    guidance: float = option("guidance that FLUX.1 dev takes as an input", default=DEFAULT_GUIDANCE)
    negative_prompt: str | None = option("what to avoid")
    cfg_scale: float = option("guidance by the negative prompt; 1 turns it off", default=1.0)
    width: int = option(
        "in pixels; rounded up to a multiple of 16", default=1360, minimum=1, maximum=MAX_SIDE
    )
    height: int = option(
        "in pixels; rounded up to a multiple of 16", default=768, minimum=1, maximum=MAX_SIDE
    )
    interactive: bool = option(
        "ask for prompts; their options (--w --h --s --d --g --c --n --m) hold for later ones"
    )

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width in pixels, rounded up to multiples of 16."""
        return round_up_side(self.height), round_up_side(self.width)


class FluxMinimalOptions(Options):
    """Options of flux_minimal_inference.py."""

    model: FluxModelOptions
    image: FluxImageOptions


def read_minimal(description: str | None, argv: Sequence[str] | None) -> FluxMinimalOptions:
    """Read the command line. Raises OptionError for options that are not supported."""
    (options,) = parse_options(description, argv, FluxMinimalOptions)
    return options


def is_fp8(dtype: str | None) -> bool:
    """Return whether a dtype's name is an 8-bit type."""
    return dtype is not None and "8" in dtype and "16" not in dtype


def round_up_side(side: int) -> int:
    """Return an edge length in pixels, rounded up to a multiple of 16."""
    return round_up(side, SIZE_STEP)


# options of flux_generate_image.py -> as they are typed here
TYPED = {
    "--dit": "--ckpt_path",
    "--save_path": "--output_dir",
    "--embedded_cfg_scale": "--guidance",
    "--guidance_scale": "--cfg_scale",
    "--infer_steps": "--steps",
    "--image_size": "--height and --width,",
}


def generation_argv(options: FluxMinimalOptions) -> list[str]:
    """Translate the options of flux_minimal_inference.py to the command line of flux_generate_image.py."""
    model, image = options.model, options.image
    values = {
        "--dit": model.ckpt_path,
        "--model_type": model.model_type,
        "--save_path": image.output_dir,
        "--embedded_cfg_scale": image.guidance,
        "--guidance_scale": image.cfg_scale,
        "--dit_dtype": model.dit_dtype,
        "--text_encoder_dtype": model.text_dtype,
        "--vae_dtype": model.ae_dtype or model.base_dtype,
        "--clip_l": model.clip_l,
        "--t5xxl": model.t5xxl,
        "--ae": model.ae,
        "--seed": image.seed,
        "--infer_steps": image.steps,
        "--negative_prompt": image.negative_prompt,
        "--prompt": None if image.interactive else image.prompt,
        "--fp8": is_fp8(model.flux_dtype or model.dtype),
        "--fp8_t5": is_fp8(model.t5xxl_dtype or model.dtype),
        "--apply_t5_attn_mask": model.apply_t5_attn_mask,
        "--interactive": image.interactive,
        "--image_size": image.size,
        **model.lora_options,
    }
    return option_argv(values)


NO_NEGATIVE = "-"  # in a line: no negative prompt


def negative(text: str) -> str:
    """Return a negative prompt; the word for no negative prompt in the guides becomes ""."""
    return "" if text == NO_NEGATIVE else text


def line_sizes(text: str) -> int:
    """Parse the width or height in a prompt line and round it up to a valid size.

    Raises ValueError if it is not an integer.
    """
    return round_up_side(int(text))


# letters of a line whose values are read otherwise than in flux_generate_image.py: key, how, may be empty
LINE_CHARACTERS: Mapping[str, tuple[str, Any, bool]] = {
    "w": ("video_size_width", line_sizes, False),
    "h": ("video_size_height", line_sizes, False),
    "c": ("guidance_scale", float, False),
    "n": ("negative_prompt", negative, True),
    "m": ("lora_strengths", str, True),
}
