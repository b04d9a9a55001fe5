"""All options of gen_img.py; those of the checkpoint, prompts, text encoding and files are declared here."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.console_options import ConsoleOptions
from modules.errors import OptionError
from modules.option_values import check_path, check_seed
from modules.options import Options, option
from modules.script_options import parse_options
from stable_diffusion import sampling_options
from stable_diffusion.network_options import AddedNetworkOptions, ControlOptions, GuideOptions, check_control

_SPEED = "precision, speed and memory"


class ModelOptions(Options, title="model"):
    """Options that select the checkpoint, its VAE and its precision."""

    ckpt: Path = option("checkpoint: a single file, or a folder in the layout of diffusers", required=True)
    vae: Path | None = option(
        "another VAE: a single file, or a folder in the layout of diffusers", often=True
    )
    tokenizer_cache_dir: Path | None = option(
        "folder with openai_clip-vit-large-patch14 and laion_CLIP-ViT-bigG-14-laion2B-39B-b160k, the files "
        "of the tokenizers"
    )
    # kind of the checkpoint according to the user; compared with the file's tensors
    sdxl: bool = option(
        "the checkpoint is Stable Diffusion XL; read from the file if not given",
        excludes=("v1", "v2"),
        often=True,
    )
    v1: bool = option(
        "the checkpoint is Stable Diffusion 1.x; read from the file if not given", excludes="v2"
    )
    v2: bool = option("the checkpoint is Stable Diffusion 2.x; read from the file if not given")
    v_parameterization: bool = option(
        "the model predicts velocity (v-prediction), as Stable Diffusion 2.x of 768 pixels does"
    )
    fp16: bool = option("compute in float16; else in float32", title=_SPEED, excludes="bf16", often=True)
    bf16: bool = option("compute in bfloat16; else in float32", title=_SPEED, often=True)
    no_half_vae: bool = option("the VAE computes in float32", title=_SPEED, ignored_without=("fp16", "bf16"))
    vae_slices: int | None = option(
        "the VAE works in this many bands, to save memory", title=_SPEED, minimum=1
    )
    vae_batch_size: float | None = option(
        "images that the VAE takes at once; below 1: this fraction of --batch_size; usually all",
        title=_SPEED,
        above=0,
        hint="of images, or a share of the batch below 1, such as 0.5",
    )
    xformers: bool = option("attention by the package xformers", title=_SPEED, often=True)
    sdpa: bool = option(
        "attention by torch itself, which is common",
        title=_SPEED,
        excludes=("xformers", "diffusers_xformers"),
        often=True,
    )
    diffusers_xformers: bool = option("attention by the package xformers, in the VAE too", title=_SPEED)
    opt_channels_last: bool = option("keep channels last in memory, faster on some GPUs", title=_SPEED)


_IMAGES = "input images"
_IMAGE: Mapping[str, Any] = {"place": "there", "hint": "an image or a folder of images"}


class ImageInputOptions(Options, title="prompts", must_give=True):
    """Options for the sources of prompts, input images and seeds."""

    prompt: str | None = option(
        "what to show; may end in options, such as 'a cat --n ugly --w 512 --h 768 --d 7'", often=True
    )
    from_file: Path | None = option(
        "text file with such a prompt on each line; # begins a comment",
        place="file",
        hint="a text file",
        excludes=("prompt", "from_module", "interactive"),
        often=True,
    )
    from_module: str | None = option(
        "Python module, or a .py file, whose get_prompter makes prompts; its code runs, so use it only if "
        "you trust it"
    )
    prompter_module_args: str | None = option(
        "a text for the module of --from_module, which finds it in its options", needs="from_module"
    )
    interactive: bool = option(
        "ask for prompts; Ctrl-C drops the current one, quit ends",
        excludes=("prompt", "from_module", "n_iter", "shuffle_prompts", "iter_same_seed"),
        often=True,
    )
    no_preview: bool = option(
        "with --interactive: do not open images in a viewer",
        needs="interactive",
        hint="no other mode shows images",
    )
    images_per_prompt: int = option(
        "images of each prompt, with different seeds", default=1, minimum=1, often=True
    )
    n_iter: int = option("how many times all prompts are made", default=1, minimum=1)
    shuffle_prompts: bool = option(
        "go through the prompts in another order in each round",
        excludes="from_module",
        hint="the module decides which prompt is next",
    )
    batch_size: int = option("images that are made at once", default=1, minimum=1, often=True)
    seed: int | None = option(
        "seed of a single image; the seeds of several images are drawn from it; random if not given",
        often=True,
    )
    iter_same_seed: bool = option("all prompts of a round have the same seeds: only the prompt differs")
    image_path: Path | None = option(
        "image to image: an image, or a folder whose images are used in turn. Without a prompt, those "
        "in the metadata of the images are used",
        title=_IMAGES,
        **_IMAGE,
        often=True,
    )
    mask_path: Path | None = option(
        "an image, or a folder of them. With --image_path, inpainting: white is repainted. For prompts "
        "with AND: red, green and blue are the regions of the first three parts and of their LoRAs",
        **_IMAGE,
        flags=("--mask_path", "--mask_image"),
        title=_IMAGES,
        often=True,
    )
    guide_image_path: tuple[Path, ...] | None = option(
        "images, or folders of them, for ControlNets or ControlNet-LLLites: one for each of them, then "
        "one for each for the next image, and so on. For guidance by CLIP or VGG16: one for each image",
        **_IMAGE,
        title=_IMAGES,
        often=True,
    )

    def __post_init__(self) -> None:
        sources = (self.prompt, self.from_file, self.from_module, self.image_path)
        if not self.interactive and all(source is None for source in sources):
            raise OptionError(
                "There is no prompt: pass --prompt, --from_file, --from_module or --interactive, or "
                "--image_path with images whose metadata contains their prompts"
            )
        check_seed("--seed", self.seed)
        if self.from_module is not None and self.from_module.endswith(".py"):
            check_path("--from_module", Path(self.from_module), "file", "a Python file, or a module's name")


class ImageOutputOptions(Options, title="output"):
    """Options for the folder and file names of generated images."""

    outdir: Path = option(
        "output folder; created if missing", default=Path("outputs"), place="new folder", often=True
    )
    sequential_file_name: bool = option(
        "number the files: im_000001.png and so on, after those that exist",
        excludes="use_original_file_name",
    )
    use_original_file_name: bool = option("image to image: name files like the input images")


class TextOptions(Options, title="text"):
    """Options for encoding prompts."""

    clip_skip: int | None = option(
        "layer of the text encoder whose states are used, from the end: 1 is the last one; usually 1 for "
        "Stable Diffusion 1.x, 1 for 2.x, which is loaded without OpenCLIP's last layer, as it was trained, "
        "2 for XL",
        minimum=1,
        often=True,
    )
    max_embeddings_multiples: int | None = option(
        "how long a prompt may be, in chunks of 75 tokens; usually 1, the rest is cut off", minimum=1
    )
    emb_normalize_mode: str = option(
        "what weights such as (cat:1.3) leave unchanged: original: the mean of the embeddings, abs: the mean "
        "of their absolute values, none: nothing",
        default="original",
        choices=("original", "none", "abs"),
    )
    textual_inversion_embeddings: tuple[Path, ...] | None = option(
        "files of textual inversion; the name of a file, without its ending, is the word for it"
    )
    clip_vision_strength: float | None = option(
        "Stable Diffusion XL with --image_path: the image as CLIP sees it, times this number, replaces "
        "the prompt's pooled state"
    )
    XTI_embeddings: tuple[Path, ...] | None = option(
        "files of extended textual inversion (P+), for Stable Diffusion 1.x and 2.x: a word has another "
        "vector for each cross-attention layer of the U-Net"
    )


class GenImgOptions(Options, title="run"):
    """All options of gen_img.py."""

    model: ModelOptions
    prompts: ImageInputOptions
    sampling: sampling_options.SamplingOptions
    output: ImageOutputOptions
    text: TextOptions
    networks: AddedNetworkOptions
    control: ControlOptions
    guides: GuideOptions
    highres: sampling_options.HighresOptions
    deep_shrink: sampling_options.DeepShrinkOptions
    gradual_latent: sampling_options.GradualLatentOptions
    console: ConsoleOptions
    device: str | None = option("cuda, cuda:1, mps or cpu; default: the best available")

    def __post_init__(self) -> None:
        """Raise OptionError if options exclude each other or lack required ones."""
        # Raise OptionError for options that need --image_path or --mask_path, or exclude them
        has_images = self.prompts.image_path is not None
        if self.text.clip_vision_strength is not None and not has_images:
            raise OptionError("--clip_vision_strength needs --image_path, the image that CLIP sees")
        if self.output.use_original_file_name and not has_images:
            raise OptionError("--use_original_file_name needs --image_path, whose names are used")
        if self.highres.highres_fix_scale is not None and has_images:
            raise OptionError(
                "--highres_fix_scale makes images from text in two stages, --image_path makes them from an "
                "image. Omit one"
            )
        if self.networks.network_regional_mask_max_color_codes is not None and not self.prompts.mask_path:
            raise OptionError(
                "--network_regional_mask_max_color_codes needs --mask_path, whose colors it explains"
            )
        self._check_control()
        self._check_sampling()

    def _check_control(self) -> None:
        """Raise OptionError for ControlNet, CLIP or VGG16 options that cannot be combined."""
        check_control(
            self.control,
            self.prompts.guide_image_path,
            uses_deep_shrink=self.deep_shrink.ds_depth_1 is not None,
            guidance_option=self.guides.image_option,
        )
        if self.text.XTI_embeddings and self.control.specs:
            raise OptionError(
                f"--XTI_embeddings and {self.control.flag} do not work together: a ControlNet takes one "
                "text for all of its layers. Omit one of them"
            )
        if self.guides.image_option is not None and self.highres.highres_fix_disable_control_net:
            raise OptionError(
                f"--highres_fix_disable_control_net with {self.guides.image_option}: there are no "
                "ControlNets to omit. Omit it"
            )

    def _check_sampling(self) -> None:
        """Raise OptionError for a number of steps or a Gradual Latent that the sampler does not support."""
        sampler = self.sampling.sampler
        if self.highres.highres_fix_scale is not None:
            sampling_options.check_sampler_steps(
                "--highres_fix_steps", sampler, self.highres.highres_fix_steps
            )
        elif self.prompts.image_path is None:  # an input image's --strength skips some of the steps
            sampling_options.check_sampler_steps("--steps", sampler, self.sampling.steps)
        is_gradual = self.gradual_latent.gradual_latent_timesteps is not None
        if is_gradual and not sampler.endswith("euler_a"):
            raise OptionError(
                f"--gradual_latent_timesteps with --sampler {sampler}: Gradual Latent works "
                "with --sampler euler_a only"
            )


def read_gen_img(description: str | None, argv: Sequence[str] | None) -> GenImgOptions:
    """Parse a command line of gen_img.py; raise OptionError if options contradict each other."""
    options: GenImgOptions
    (options,) = parse_options(description, argv, GenImgOptions)
    return options
