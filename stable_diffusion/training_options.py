"""Options of the scripts that train Stable Diffusion and cache for it. Standard library only."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.option_values import Placeholder, option_argv
from modules.options import CHANGEABLE, FREE, HABIT, IDENTITY, SAMPLES_ONLY, Options, not_needed, option
from modules.speed_options import BASE_FORMS
from protocols.new_tokens import MAX_VECTORS, WordOptionNames, WordToLearn, find_error
from stable_diffusion.sampling_options import SAMPLERS

CKPT = "--pretrained_model_name_or_path"
# messages about checkpoints name gen_img.py's option; the trainers' option is shown instead
SHOWN_AS = {"--ckpt": CKPT}
WEIGHTS = "--controlnet_model_name_or_path"  # the ControlNet to start from
SHOWN_AS_CONTROL_NET = {**SHOWN_AS, "--control_net_models": WEIGHTS}
CKPT_HELP = "checkpoint: a single file, a folder in the layout of diffusers, or owner/name of the hub"
VAE_HELP = "another VAE than that of the checkpoint: a single file, or a folder in the layout of diffusers"
TOKENIZERS_HELP = (
    "folder with openai_clip-vit-large-patch14 and laion_CLIP-ViT-bigG-14-laion2B-39B-b160k or "
    "stabilityai_stable-diffusion-2, the files of the tokenizers"
)
DEFAULT_SAMPLER = "ddim"  # default of known trainers
STEPS, GUIDANCE_SCALE = 30, 7.5  # defaults for images, as in the samples of known trainers
CHUNK = 75  # tokens that a text encoder reads at once
_NO_SUCH_SETTING = "a ControlNet is a copy of the U-Net's first half, and has no such setting. Omit it"
# options of textual inversion, by what they say of the new word
_WORD_FLAGS = WordOptionNames(
    word="--token_string",
    count="--num_vectors_per_token",
    init_word="--init_word",
    weights="--weights",
    rate="--learning_rate",
    without_captions="--use_object_template",
)
LARGEST_RATE = 1000.0  # the same limit as for --learning_rate
# for rates of text encoders that are trained on request
IF_TRAINED: Mapping[str, Callable[[Any], bool]] = {
    "text encoders learn with --train_text_encoder": lambda options: options.train_text_encoder
}


class VariedNoiseOptions(Options, title="noise"):
    """Options that modify the noise added to latents during training."""

    noise_offset: float | None = option(
        "add a random number times this to each channel of the noise, for darker and lighter images; "
        "0.05 is common",
        minimum=0,
        maximum=10,
        hint="0.05 is usual",
    )
    noise_offset_random_strength: bool = option(
        "draw the share of --noise_offset for each batch, from 0 to 1", needs="noise_offset"
    )
    adaptive_noise_scale: float | None = option(
        "add this times the mean of each channel of the latents to --noise_offset",
        minimum=-10,
        maximum=10,
        needs="noise_offset",
        hint="0.005 is usual",
    )
    multires_noise_iterations: int | None = option(
        "levels of coarser noise that are added (pyramid noise); 6 to 10 are common",
        minimum=0,
        maximum=100,
        hint="6 to 10 are usual",
    )
    multires_noise_discount: float = option(
        "factor on each coarser level",
        default=0.3,
        minimum=0,
        maximum=1,
        hint="0.1 to 0.8 are usual",
        acts_if={
            "there is no --multires_noise_iterations": lambda options: bool(options.multires_noise_iterations)
        },
    )


class LossWeightOptions(Options, title="loss"):
    """Factors on each timestep's loss by its signal-to-noise ratio (SNR); several factors multiply."""

    min_snr_gamma: float | None = option(
        "limit the weight of nearly clean samples: their SNR counts as this at most; 5 is common",
        minimum=0,
        hint="5 is usual",
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        "weight the loss of v as that of the noise would be; for models that predict v"
    )
    v_pred_like_loss: float | None = option(
        "add this times the loss that a model of v would have; for models that predict noise",
        minimum=0,
        hint="0.1 to 1 are usual",
    )
    debiased_estimation_loss: bool = option("weight the losses by 1 / sqrt(SNR), of v by 1 / (SNR + 1)")

    @property
    def has_any(self) -> bool:
        """Whether any loss factor is set."""
        return bool(
            self.min_snr_gamma
            or self.scale_v_pred_loss_like_noise_pred
            or self.v_pred_like_loss
            or self.debiased_estimation_loss
        )


class StableDiffusionTrainingOptions(Options, title="Stable Diffusion"):
    """Stable Diffusion options of the training scripts, in addition to those shared by all model families."""

    # resume compares its name
    ckpt: Path | None = option(name="pretrained_model_name_or_path", facts=FREE)
    vae: Path | None = option(name="vae", facts=FREE)
    tokenizer_cache_dir: Path | None = option(name="tokenizer_cache_dir", facts=FREE)
    mixed_precision: str = option(name="mixed_precision", default="no", facts=FREE)
    resolution: str | None = option(name="resolution", facts=FREE)
    v_parameterization: bool = option(
        "the model predicts v; not needed if the checkpoint says it", facts=IDENTITY
    )
    max_token_length: int | None = option(
        "tokens of a caption that are read, in chunks of 75; default: 75",
        choices=(75, 150, 225),
        facts=IDENTITY,
    )
    zero_terminal_snr: bool = option(
        "train the last timestep on pure noise; for models that predict v", facts=HABIT
    )
    sample_sampler: str = option(
        "sampler for samples, as gen_img.py --sampler",
        default=DEFAULT_SAMPLER,
        choices=SAMPLERS,
        facts={**FREE, **SAMPLES_ONLY},
    )
    varied_noise: VariedNoiseOptions = option(facts=HABIT)
    loss_weights: LossWeightOptions = option(facts=HABIT)
    no_half_vae = not_needed("the VAE always computes in float32.", "VAE in float32")

    @property
    def num_chunks(self) -> int:
        """Number of 75-token chunks to which captions are padded or cut."""
        return (self.max_token_length or CHUNK) // CHUNK

    # set for full training only

    @property
    def is_full(self) -> bool:
        """Whether the script trains all weights; true only for full fine-tuning."""
        return False

    @property
    def learns_in_bf16(self) -> bool:
        """Whether trained weights are stored in bf16; only full fine-tuning has an option for it."""
        return False

    @property
    def text_rates(self) -> Mapping[str, float | None]:
        """Return the learning rate of each trained text encoder by name; None means --learning_rate."""
        return {}

    @property
    def block_rates(self) -> tuple[float, ...]:
        """Return the learning rate of each U-Net block; () if all blocks use --learning_rate."""
        return ()

    @property
    def text_steps(self) -> int | None:
        """Return the number of steps during which text encoders are trained; None for all steps."""
        return None

    @property
    def pads_captions(self) -> bool:
        """Whether captions are padded to whole 75-token chunks."""
        return True


class LatentCachingOptions(Options, title="Stable Diffusion"):
    """Stable Diffusion options of latent caching scripts, in addition to those shared by all families."""

    ckpt: Path | None = option(CKPT_HELP, name="pretrained_model_name_or_path", flags=("--ckpt",), often=True)
    vae: Path | None = option(VAE_HELP, often=True)


class TextCachingOptions(Options, title="Stable Diffusion"):
    """Stable Diffusion options of text caching scripts, in addition to those shared by all families."""

    ckpt: Path = option(
        CKPT_HELP, name="pretrained_model_name_or_path", flags=("--ckpt",), often=True, required=True
    )
    tokenizer_cache_dir: Path | None = option(TOKENIZERS_HELP)
    max_token_length: int | None = option(
        "tokens of a caption that are read, in chunks of 75; default: 75", choices=(75, 150, 225)
    )
    text_encoder_dtype: str | None = option("dtype of the text encoders; default: float32")

    @property
    def num_chunks(self) -> int:
        """Number of 75-token chunks to which captions are padded or cut."""
        return (self.max_token_length or CHUNK) // CHUNK


def caching_options(options: StableDiffusionTrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options, by flag, of the latent and text caching scripts that match a training run."""
    ckpt = options.ckpt or Placeholder("CHECKPOINT")
    texts = {
        CKPT: ckpt,
        "--tokenizer_cache_dir": options.tokenizer_cache_dir,
        "--max_token_length": options.max_token_length,
    }
    return {CKPT: ckpt, "--vae": options.vae}, texts


def _inpainting_options(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, by flag, for an image to repaint and its mask; {} if nothing is repainted."""
    path = sample.get("image_path")
    mask = (sample.get("extra") or {}).get("mask_path")
    if path is None and sample.get("takes_mask"):  # an image of the training, with a mask to be made
        path = sample["example"].image or Placeholder("IMAGE_FILE")
        mask = Placeholder("MASK_FILE")
    return {} if path is None else {"--i2i_path": path, "--strength": 1, "--mask_path": mask}


def generation_options(options: StableDiffusionTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the command-line options, by flag, that generate with the model of a training run.

    Args:
        options: Options of the training run.
        sample: Values of a sample image, by the names of `Request`.
    """
    return {
        "--ckpt": options.ckpt or Placeholder("CHECKPOINT"),
        "--vae": options.vae,
        "--tokenizer_cache_dir": options.tokenizer_cache_dir,
        # like the samples during training; float32 would double the U-Net's size
        "--fp16": options.mixed_precision == "fp16",
        "--bf16": options.mixed_precision == "bf16",
        "--v_parameterization": options.v_parameterization,
        "--zero_terminal_snr": options.zero_terminal_snr,
        "--sampler": None if sample.get("solver") else options.sample_sampler,
        "--max_embeddings_multiples": options.num_chunks if options.num_chunks > 1 else None,
        **_inpainting_options(sample),
    }


def gen_img_options(options: StableDiffusionTrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of gen_img.py, by flag, that generate with the model of a training run.

    Args:
        options: Options of the training run.
        sample: Values of a sample image, by the names of `Request`.
    """
    model = generation_options(options, sample)
    if "--i2i_path" in model:  # for an inpainting model
        model["--image_path"] = model.pop("--i2i_path")
    return {
        **model,
        "--clip_skip": vars(options).get("clip_skip"),  # a field for 1.x and 2.x only
        "--negative_prompt": sample.get("negative_prompt") or None,
        "--W": sample.get("width"),
        "--H": sample.get("height"),
        "--steps": sample.get("steps"),
        "--scale": sample.get("guidance_scale"),
        "--sampler": sample.get("solver") or options.sample_sampler,
        "--seed": sample.get("seed"),
    }


# settings of `training.image_options.control_trainer`
REJECTED: Mapping[str, str] = {
    "network_dim": _NO_SUCH_SETTING,
    "network_dropout": _NO_SUCH_SETTING,
    "network_weights": f"Pass the ControlNet to start from to {WEIGHTS}",
    **{
        switch: f"a ControlNet begins as a copy of the U-Net's weights, and {form.name} rounds them. Omit it"
        for form in BASE_FORMS
        for switch in form.switches
    },
}


def weights_option() -> Any:
    """Declare the option for the ControlNet file to start from."""
    return option(
        "ControlNet to start from: a file, or a folder in diffusers' layout; default: a copy of the U-Net",
        place="there",
        facts=FREE,
        often=True,
    )


def rate_option() -> Any:
    """Declare the option for the learning rate of ControlNet layers that a U-Net does not have."""
    return option(
        "learning rate of the parts that the U-Net does not have: the control image's embedding and "
        "the outputs, which are initialized to zero",
        default=1e-4,
        minimum=0,
        below=1000.0,
        hint="1e-4 is usual",
        facts=CHANGEABLE,
    )


def list_generation_command(
    options: StableDiffusionTrainingOptions,
    flag: str,
    file: Path,
    sample: Mapping[str, Any],
    _: Sequence[str],
) -> list[str]:
    """Return the arguments of gen_img.py, including its name, to use a trained ControlNet or LLLite.

    Args:
        options: Options of the run.
        flag: Option for the file.
        file: The trained file.
        sample: Settings of the image, such as prompt and seed; missing ones are omitted or placeholders.
        _: Ignored; other kinds of networks need it.
    """
    arguments = {
        **gen_img_options(options, sample),
        flag: file,
        "--guide_image_path": sample.get("control_path") or Placeholder("CONTROL_PICTURE"),
        "--control_net_multipliers": (sample.get("extra") or {}).get("control_multiplier"),
        "--prompt": sample.get("prompt") or Placeholder("what it should show"),
        "--outdir": file.parent / "generated",
    }
    return ["gen_img.py", *option_argv(arguments)]


class InversionOptions(Options, title="textual inversion"):
    """Options of textual inversion: the new word, its initial vectors and the captions to train it with."""

    token_string: str | None = option(
        "the new word, as written in captions and sample prompts; it must not be a token of the text "
        "encoders",
        often=True,
        facts=IDENTITY,
    )
    num_vectors_per_token: int = option(
        "number of vectors of the word; each takes up one of the 75 tokens of a caption",
        default=1,
        minimum=1,
        maximum=MAX_VECTORS,
        hint="1 to 8 are usual",
        often=True,
        facts=IDENTITY,
    )
    init_word: str | None = option(
        "existing words whose vectors initialize the new ones, in this order; default: random vectors",
        often=True,
        facts=FREE,
        acts_if={"--weights has the first vectors": lambda options: options.weights is None},
    )
    weights: Path | None = option("file of a textual inversion to continue with", facts=FREE)
    use_object_template: bool = option(
        'learn "a photo of a WORD" and 26 other sentences instead of captions, one drawn for each image',
        facts=IDENTITY,
    )
    use_style_template: bool = option(
        'learn "a painting in the style of WORD" and 18 other sentences instead of captions; ignored '
        "with --use_object_template",
        facts=IDENTITY,
        acts_if={"--use_object_template comes first": lambda options: not options.use_object_template},
    )

    def __post_init__(self) -> None:
        why = "" if self.token_string is None else find_error(self.token_string)
        if why:
            raise OptionError(f"--token_string {self.token_string!r} {why}")

    @property
    def word(self) -> WordToLearn:
        """Return the new word.

        Raises:
            OptionError: If no word is given.
        """
        if self.token_string is None:
            raise OptionError("--token_string is missing. Pass the new word, such as --token_string mycat")
        return WordToLearn(
            self.token_string,
            self.num_vectors_per_token,
            _WORD_FLAGS,
            init_word=self.init_word,
            weights=self.weights,
        )


def text_rate(help: str, acts_if: Mapping[str, Callable[[Any], bool]] | None = None) -> Any:
    """Declare the option for a text encoder's learning rate."""
    return option(
        f"learning rate of {help}; 0 freezes it; default: --learning_rate",
        minimum=0,
        below=LARGEST_RATE,
        hint="1e-6 is usual; 0 freezes it",
        acts_if=acts_if,
        facts=CHANGEABLE,
    )


class FullFineTuningMixin:
    """Options shared by all scripts for full fine-tuning."""

    full_bf16: bool

    @property
    def is_full(self) -> bool:
        """Whether the script trains all weights; always True for full fine-tuning."""
        return True

    @property
    def learns_in_bf16(self) -> bool:
        """Whether weights are trained in bf16 (--full_bf16)."""
        return self.full_bf16


def text_switch(help: str) -> Any:
    """Declare the option that also trains the text encoders."""
    return option(help, facts=IDENTITY, often=True)


def read_block_rates(text: str | None) -> tuple[float, ...]:
    """Return the learning rates in --block_lr.

    Raises:
        OptionError: If they are not learning rates.
    """
    if text is None:
        return ()
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--block_lr {text}: use numbers, separated by commas") from None
    if not all(0 <= rate < LARGEST_RATE for rate in rates):
        raise OptionError(f"--block_lr {text}: learning rates are at least 0 and below {LARGEST_RATE:g}")
    return rates
