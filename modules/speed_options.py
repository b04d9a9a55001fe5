"""Options of transformer and VAE: attention, fp8 weights, block swap, compilation, tiles, and --plan.

Training has one flag for each back end of attention and other names for fp8 than generation.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.option_values import Placeholder, format_number
from modules.options import HABIT, Options, option, option_name

VAE_TILE = 256  # pixels, as for --vae_tiling in musubi-tuner
MIN_TILE, MAX_TILE, TILE_STEP = 32, 16384, 16
AE_HELP = "FLUX's autoencoder (also --vae)"
# settings of `VaeOptions` where FLUX's autoencoder is the VAE
AE: Mapping[str, Any] = {"vae": {"flags": ("--ae",)}}


class VaeOptions(Options):
    """File of the VAE, the dtype it computes in, and the size of its tiles."""

    vae: Path | None = option("VAE checkpoint", often=True)
    vae_dtype: str | None = option("dtype of the VAE", often=True)
    vae_spatial_tile_sample_min_size: int | None = option("edge of a tile in pixels; implies tiling")
    vae_tiling: bool = option(f"encode and decode in tiles of {VAE_TILE} pixels: less memory")

    def __post_init__(self) -> None:
        size = self.vae_spatial_tile_sample_min_size
        if size is not None and (not MIN_TILE <= size <= MAX_TILE or size % TILE_STEP):
            raise OptionError(
                f"--vae_spatial_tile_sample_min_size {format_number(size)}: use a multiple of {TILE_STEP}, "
                f"at least {MIN_TILE} and at most {MAX_TILE}"
            )

    @property
    def tile(self) -> int | None:
        """Edge of a VAE tile in pixels; None for no tiling. A size implies tiling."""
        if self.vae_spatial_tile_sample_min_size is not None:
            return self.vae_spatial_tile_sample_min_size
        return VAE_TILE if self.vae_tiling else None

    def command_options(self) -> dict[str, Any]:
        """Return the VAE's options for a printed command."""
        return {"--vae": self.vae or Placeholder("VAE_FILE")}


def fp8_text_option(name: str, what: str) -> Any:
    """Return the field `in_fp8` of a family's options: a switch with flag `name` to keep `what` in fp8."""
    return option(f"keep {what}", name=name, excludes="text_encoder_form")


def text_form(options: Any) -> str | None:
    """Return a text encoder's storage format: fp8 by the family's flag, else --text_encoder_form or None."""
    return "fp8" if options.in_fp8 else options.text_encoder_form


def text_form_option() -> Any:
    """Return the field `text_encoder_form` of a family's options; see `text_form`."""
    return option(
        "storage format of the text encoder's linear layers: fp8, int8 (rotated; same size, closer to "
        "16 bits) or nf4 (half the size, less exact)",
        choices=("fp8", "int8", "nf4"),
    )


class TextEncoderOptions(Options):
    """The text encoder that reads prompts, and how it runs. Families declare its file and its fp8 option."""

    text_encoder: Path | None = option("text encoder: file or folder", often=True)
    text_encoder_tokenizer: Path | None = option(
        "its tokenizer: folder or file; default: in or next to the encoder's folder, else from the hub"
    )
    text_encoder_dtype: str | None = option(
        "dtype that the encoder computes in; default: bfloat16, but float32 with a float32 transformer"
    )
    in_fp8: bool = fp8_text_option(
        "fp8_text_encoder",
        "the encoder's linear layers in fp8: half the memory, slightly different states",
    )
    text_encoder_form: str | None = text_form_option()
    text_encoder_cpu: bool = option("run the text encoder on the CPU")

    def command_options(self, stand_in: str) -> dict[str, Any]:
        """Return options for a printed command that encodes prompts with the same text encoder.

        `stand_in` replaces a file that is not given.
        """
        fp8 = next(option_name(field) for field in dataclasses.fields(self) if field.name == "in_fp8")
        return {
            "--text_encoder": self.text_encoder or Placeholder(stand_in),
            "--text_encoder_tokenizer": self.text_encoder_tokenizer,
            f"--{fp8}": self.in_fp8,
            "--text_encoder_form": self.text_encoder_form,
        }


def take_ae(args: argparse.Namespace) -> None:
    """Use the value of --ae for --vae.

    Raises:
        OptionError: If both are given and differ.
    """
    if args.ae is not None and args.vae not in (None, args.ae):
        raise OptionError(f"--ae {args.ae} and --vae {args.vae} name two autoencoders: pass one of them")
    args.vae = args.ae if args.vae is None else args.vae


def dit_dtype_option() -> Any:
    """Return the option field --dit_dtype, which `modules.devices.select_compute_dtype` reads."""
    return option("dtype that the transformer computes in; default: the file's", facts=HABIT, often=True)


def reject_for_full(dit_dtype: str | None) -> None:
    """Raise OptionError if --dit_dtype is set while all weights of a transformer are trained."""
    if dit_dtype is not None:
        raise OptionError(
            "--dit_dtype: trained weights are kept in float32, or in bfloat16 with --full_bf16; omit it"
        )


TRAINING_FLAGS = {  # mode -> flag of the training scripts; the first given one is used
    "sdpa": "--sdpa",
    "flash": "--flash_attn",
    "sage": "--sage_attn",
    "xformers": "--xformers",
    "flash3": "--flash3",
}
GENERATION_VALUES = {  # value of --attn_mode -> mode
    "flash": "flash",
    "flash2": "flash",
    "flash3": "flash3",
    "torch": "sdpa",
    "sageattn": "sage",
    "xformers": "xformers",
    "sdpa": "sdpa",
}


@dataclass(frozen=True)
class AttentionChoice:
    """The attention kernel and how to use it: settings that models pass to `attend`."""

    mode: str  # a key of `modules.attention.attend.BACKENDS`
    split: bool = False  # compute one sample at a time
    in_float32: bool = False  # compute in float32 for inputs of any dtype


SDPA = AttentionChoice("sdpa")

_SPLIT = "compute attention one sample at a time"


class TrainingAttentionOptions(Options, title="attention"):
    """Options that select the attention kernel for training."""

    sdpa: bool = option("attention by torch itself (the default)", often=True)
    flash_attn: bool = option("FlashAttention 2, from the package flash_attn")
    sage_attn: bool = option("SageAttention: for generation only, it has no backward pass")
    xformers: bool = option("xFormers' memory-efficient attention")
    flash3: bool = option("FlashAttention 3, for Hopper GPUs")
    split_attn: bool = option(_SPLIT)

    @property
    def choice(self) -> AttentionChoice:
        """Settings of the attention kernel whose option is given; sdpa if none is."""
        modes = (mode for mode, flag in TRAINING_FLAGS.items() if getattr(self, flag.removeprefix("--")))
        return AttentionChoice(next(modes, "sdpa"), self.split_attn)


class GenerationAttentionOptions(Options):
    """Attention options of a generation script; some scripts omit --split_attn."""

    attn_mode: str = option(
        "attention back end; torch or sdpa: torch's own kernels; flash or flash2, flash3, sageattn, "
        "xformers: packages",
        default="torch",
        choices=tuple(GENERATION_VALUES),
        refused={"cudnn": "torch takes cuDNN's kernel by itself where it is the best"},
        often=True,
    )
    split_attn: bool = option(_SPLIT)

    @property
    def choice(self) -> AttentionChoice:
        """Settings for `attend` from --attn_mode and --split_attn."""
        return AttentionChoice(GENERATION_VALUES[self.attn_mode], self.split_attn)


def get_attention_flag(mode: str, training: bool) -> str:
    """Return the option (with its value) that selects an attention kernel in training or generation."""
    if training:
        return TRAINING_FLAGS[mode]
    return f"--attn_mode {next(name for name, meant in GENERATION_VALUES.items() if meant == mode)}"


@dataclass(frozen=True)
class Quantization:
    """Storage format of weights in 8 or 4 bits, and the arithmetic of the layers with these weights."""

    # scales of fp8. cast: none; tensor, rows: values are divided by one scale per weight or per row
    kind: str
    float32_scales: bool = False  # scales and quotients in float32 instead of the weight's dtype
    float32_linear: bool = False  # the layers compute in float32
    fp8_matmul: bool = False  # the layers should multiply in 8 bits
    # the 8-bit product, a checkpoints.stored.fp8_products.Product; None: multiply in 16 bits
    product: Callable[..., Any] | None = None
    form: str = "fp8"  # name of its file in checkpoints/stored
    int8_backward: bool = False  # int8 only: gradients are rounded to 8 bits too
    option_name: str = dataclasses.field(default="--fp8_scaled", compare=False)  # for messages


_BASE = (
    "keep the linear layers of the model's blocks in fp8: half the memory of bf16; weights already in fp8 "
    "stay as they are"
)
_SCALED = (
    "first divide each row of a weight by its own scale: much closer to the file's weights than a plain cast"
)
_FAST = (
    "also multiply the linear layers of the blocks in fp8{when}, with a scale for each token: up to twice as "
    "fast, a little less exact; for NVIDIA RTX 40, L4, H100 and later"
)
_UPCAST = "with --fp8_scaled: compute scales and rounding in float32 instead of the file's dtype"


_ONE_FORM = "the weights are kept in one form"
_INT8 = (
    "keep the linear layers of the model's blocks in int8, rotated so that outliers cost nothing (ConvRot), "
    "and multiply them in int8: half the memory of bf16, closer to it than fp8, fast on GPUs without fp8 too"
)
_NF4 = "keep the linear layers of the model's blocks in 4 bits (nf4): a quarter of bf16's memory, less exact"


@dataclass(frozen=True)
class BaseForm:
    """A storage format for frozen weights, such as fp8; its arithmetic is in `checkpoints/stored/`."""

    name: str  # file name in checkpoints/stored
    switches: tuple[str, ...]  # training options that select it; generation has --fp8 for --fp8_base
    rounds_in_one_way: bool = True  # rounding is deterministic, so stored layers equal newly rounded ones


# sorted by size
BASE_FORMS = (
    BaseForm("fp8", ("fp8_base", "fp8_scaled"), rounds_in_one_way=False),
    BaseForm("int8", ("convrot_int8",)),
    BaseForm("nf4", ("nf4_base",)),
)
# generation options that exclude --fp8_scaled: --fp8 rounds to fp8 too, the others do not
TO_OTHER_FORMS = {name for form in BASE_FORMS if form.rounds_in_one_way for name in form.switches}
EXCLUDES_FP8_SCALED = {"fp8", *TO_OTHER_FORMS}
# for advice if fp8 does not save enough memory
SMALL_FORMS = "; in place of fp8 --convrot_int8 is as small, --nf4_base (in generation --nf4) half of it"
SMALLER_WEIGHTS = "fp8 or nf4"  # for messages


class TrainingFp8Options(Options):
    """How training stores the frozen model's weights: as in the file, or in 8 or 4 bits."""

    fp8_base: bool = option(_BASE, often=True)
    fp8_scaled: bool = option(f"with --fp8_base: {_SCALED}", needs="fp8_base", often=True)
    fp8_fast: bool = option(
        "with --fp8_base: " + _FAST.format(when=", both forward and for the gradient of their input"),
        needs="fp8_base",
    )
    upcast_quantization: bool = option(
        _UPCAST, acts_if={"it needs --fp8_base --fp8_scaled": lambda options: options.fp8_scaled}
    )
    convrot_int8: bool = option(_INT8, excludes=("fp8_base", "nf4_base"), hint=_ONE_FORM)
    convrot_int8_bwd: str = option(
        "how the gradients of these layers' inputs are computed: in bf16, or in int8, which is faster "
        "and less exact",
        default="bf16",
        choices=("bf16", "int8"),
        acts_if={"it needs --convrot_int8": lambda options: options.convrot_int8},
    )
    nf4_base: bool = option(_NF4, excludes="fp8_base", hint=_ONE_FORM)

    @property
    def quantization(self) -> Quantization | None:
        """How the frozen model's weights are stored; None to keep the format of the file."""
        if self.convrot_int8:
            narrow = self.convrot_int8_bwd == "int8"
            return Quantization("rows", form="int8", int8_backward=narrow, option_name="--convrot_int8")
        if self.nf4_base:
            return Quantization("blocks", form="nf4", option_name="--nf4_base")
        if not self.fp8_base:
            return None
        kind = "rows" if self.fp8_scaled else "cast"
        return Quantization(kind, float32_scales=self.upcast_quantization, fp8_matmul=self.fp8_fast)

    def say_for_generation(self) -> dict[str, bool]:
        """Return generation's options for the same format, by flag, because the LoRA was trained with it."""
        return {
            "--fp8": self.fp8_base and not self.fp8_scaled,
            "--fp8_scaled": self.fp8_scaled,
            "--fp8_fast": self.fp8_fast,
            "--upcast_quantization": self.fp8_scaled and self.upcast_quantization,
            "--convrot_int8": self.convrot_int8,
            "--nf4": self.nf4_base,
        }


class GenerationFp8Options(Options):
    """How generation stores the model's weights: as in the file, or in 8 or 4 bits."""

    fp8: bool = option(_BASE, often=True)
    fp8_scaled: bool = option(f"the same, but {_SCALED}; replaces --fp8", often=True)
    fp8_fast: bool = option(
        f"with --fp8_scaled or --fp8: {_FAST.format(when='')}", ignored_without=("fp8_scaled", "fp8")
    )
    upcast_linear: bool = option(
        "with --fp8_scaled: compute these layers in float32; slow", needs="fp8_scaled"
    )
    upcast_quantization: bool = option(_UPCAST, ignored_without="fp8_scaled")
    convrot_int8: bool = option(_INT8, excludes=("fp8", "fp8_scaled", "nf4_base"), hint=_ONE_FORM, often=True)
    nf4_base: bool = option(
        _NF4, flags=("--nf4",), excludes=("fp8", "fp8_scaled"), hint=_ONE_FORM, often=True
    )

    @property
    def quantization(self) -> Quantization | None:
        """Return how the weights are quantized; None if they are not. --fp8_scaled replaces --fp8."""
        if self.convrot_int8:
            return Quantization("rows", form="int8", option_name="--convrot_int8")
        if self.nf4_base:
            return Quantization("blocks", form="nf4", option_name="--nf4_base")
        if self.fp8_scaled:
            return Quantization("rows", self.upcast_quantization, self.upcast_linear, self.fp8_fast)
        return Quantization("cast", fp8_matmul=self.fp8_fast) if self.fp8 else None


SLOTS = 2  # slots of a list of blocks on the device: for the block that computes and for the next one
