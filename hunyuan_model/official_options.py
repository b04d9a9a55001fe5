"""Translate the released HunyuanVideo's options to those of hv_generate_video.py. Standard library only.

Source: the README of the release and its table of options.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.integers import round_up
from modules.option_values import HEIGHT_WIDTH, option_argv
from modules.options import Options, Rejection, option, unsupported
from modules.script_options import parse_options

logger = logging.getLogger(__name__)

NEGATIVE_PROMPT = (  # the release's default if guidance is on
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad "
    "teeth, bad eyes, bad limbs, distortion"
)
RELEASE = Path("hunyuan-video-t2v-720p")  # the folder of transformer and VAE below --model-base
SIZE_STEP = 16
# trained sizes: height, width; 129 frames each
SIZES = {
    "540p": ((544, 960), (960, 544), (624, 832), (832, 624), (720, 720)),
    "720p": ((720, 1280), (1280, 720), (1104, 832), (832, 1104), (960, 960)),
}
_FILES_SAY = "the files of the model say it"
_SCHEDULE = "the released schedule is used"
PRECISIONS = ("bf16", "fp16", "fp32")


def _precision(default: str = "fp16") -> Any:
    return option("dtype that the network computes in", default=default, choices=PRECISIONS)


def _only(value: str | int, reason: str = _FILES_SAY) -> Rejection:
    return unsupported(reason, f"only {value}", type=type(value), default=value)


class OfficialVideoOptions(Options, title="what to make", dashed=True):
    """Options for videos, as in the released sample_video.py."""

    prompt: str = option("what the video should show", required=True)
    neg_prompt: str | None = option("what to avoid, with --cfg-scale above 1")
    video_size: tuple[int, ...] = option(
        "height and width, or one number for a square; rounded up to multiples of 16",
        default=(720, 1280),
        nargs="+",
        metavar=HEIGHT_WIDTH,
        minimum=SIZE_STEP,
        maximum=16384,
        hint="height and width in pixels",
    )
    video_length: int = option("number of frames, 4n + 1", default=129)
    infer_steps: int = option("number of denoising steps", default=50)
    embedded_cfg_scale: float = option("guidance that the model takes as an input", default=6.0)
    cfg_scale: float = option("classifier-free guidance; 1 turns it off", default=1.0)
    flow_shift: float = option("time shift of the schedule", default=7.0)
    flow_reverse: bool = option(
        "from noise to video: always so here, accepted for the commands of the release"
    )
    seed: int | None = option("default: a random one for each video")
    num_videos: int = option("how many, with seed, seed + 1, ...", default=1, minimum=1, maximum=10_000)

    def __post_init__(self) -> None:
        if len(self.video_size) > 2:
            raise OptionError("--video-size: pass a height and a width, or one number for a square")
        if self.video_length < 1 or (self.video_length - 1) % 4:
            nearest = max(round((self.video_length - 1) / 4), 0) * 4 + 1
            raise OptionError(f"--video-length {self.video_length}: it must be 4n + 1, such as {nearest}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, rounded up to multiples of 16."""
        height, width = self.video_size if len(self.video_size) == 2 else self.video_size * 2
        return round_up(height, SIZE_STEP), round_up(width, SIZE_STEP)


class OfficialModelOptions(Options, title="model", dashed=True):
    """Options for the released model files, their dtypes and their memory use."""

    model_base: Path = option(
        "folder of the release; default: ckpts, or the environment variable MODEL_BASE", default=Path("ckpts")
    )
    dit_weight: Path | None = option("transformer checkpoint; default: in --model-base")
    model_resolution: str | None = option(
        "warn of a --video-size that is not for it; default: of one that is for none", choices=tuple(SIZES)
    )
    precision: str = _precision("bf16")
    vae_precision: str = _precision()
    text_encoder_precision: str = _precision()
    text_encoder_precision_2: str = _precision()
    hidden_state_skip_layer: int = option(
        "number of the language model's last layers to skip; the state before them is used", default=2
    )
    apply_final_norm: bool = option("apply the final norm to that state too")
    reproduce: bool = option("use only deterministic algorithms")
    use_cpu_offload: bool = option("swap as many blocks to host memory as it takes")
    use_fp8: bool = option("keep the transformer's weights in 8 bits")
    vae_tiling: bool = option("always so here")
    ulysses_degree: int = option(
        "times --ring-degree: the processes that share the tokens of a video, --context_parallel of "
        "hv_generate_video.py; start as many with torchrun",
        default=1,
        minimum=1,
    )
    ring_degree: int = option("as --ulysses-degree: tokens are exchanged in one way", default=1, minimum=1)
    # options that describe the released networks (our loader reads the files), and others with one value
    model = _only("HYVideo-T/2-cfgdistill")
    latent_channels = _only("16")
    rope_theta = _only("256")
    vae = _only("884-16c-hy")
    load_key = _only("module")
    text_encoder = _only("llm")
    text_encoder_2 = _only("clipL")
    tokenizer = _only("llm")
    tokenizer_2 = _only("clipL")
    text_states_dim = _only("4096")
    text_states_dim_2 = _only("768")
    text_len = _only("256")
    text_len_2 = _only("77")
    prompt_template = _only("dit-llm-encode")
    prompt_template_video = _only("dit-llm-encode-video")
    denoise_type = _only("flow")
    flow_solver = _only("euler")
    seed_type = _only("auto")
    batch_size = _only(1, "videos are made one after the other. Pass --num-videos")
    linear_schedule_end = _only(25, _SCHEDULE)
    use_linear_quadratic_schedule = unsupported(_SCHEDULE)
    disable_autocast = unsupported("the network computes in --precision without autocast; omit it")
    name_suffix = unsupported("the release does not use it either", default="")

    def __post_init__(self) -> None:
        if self.text_encoder_precision != self.text_encoder_precision_2:
            raise OptionError(
                f"--text-encoder-precision {self.text_encoder_precision} and --text-encoder-precision-2 "
                f"{self.text_encoder_precision_2}: both encoders compute in one dtype, pass the same"
            )


class OfficialOptions(Options, title="output", dashed=True):
    """Options of the released sample_video.py."""

    video: OfficialVideoOptions
    model: OfficialModelOptions
    save_path: Path = option("output folder", default=Path("./results"))
    save_path_suffix: str = option("added to the folder's name", default="")
    post: tuple[str, ...] | None = option(
        "not of the release: a tool that frames go through before they are written, as of "
        "hv_generate_video.py",
        action="append",
        nargs=None,
        metavar="TOOL ...",
    )

    @property
    def folder(self) -> Path:
        """Output folder, with the suffix appended to its name."""
        return Path(f"{self.save_path}_{self.save_path_suffix}") if self.save_path_suffix else self.save_path


def read_official(description: str | None, argv: Sequence[str] | None) -> OfficialOptions:
    """Read the released command line. Raises OptionError for options that are not supported."""
    base = os.environ.get("MODEL_BASE", "ckpts")
    options: OfficialOptions
    (options,) = parse_options(description, argv, OfficialOptions, defaults={"model-base": base})
    video = options.video
    if video.neg_prompt is not None and video.cfg_scale == 1:
        logger.warning("--neg-prompt is ignored because --cfg-scale is 1, which means no guidance")
    # Warn about a size (height, width) for which the model, or its `resolution`, was not trained
    resolution = options.model.model_resolution
    height, width = video.size
    trained = [size for sizes in SIZES.values() for size in sizes]
    if (height, width) not in trained:
        # nearest by the sum of both differences
        nearest_height, nearest_width = min(
            trained, key=lambda other: abs(other[0] - height) + abs(other[1] - width)
        )
        logger.warning(
            "--video-size %d %d (height width) is not one of the sizes that the model was trained for. "
            "The nearest is %d %d",
            height,
            width,
            nearest_height,
            nearest_width,
        )
    elif resolution and (height, width) not in SIZES[resolution]:
        other_resolution = next(name for name, sizes in SIZES.items() if (height, width) in sizes)
        logger.warning(
            "--video-size %d %d is a size of --model-resolution %s, not of %s",
            height,
            width,
            other_resolution,
            resolution,
        )
    return options


# options of hv_generate_video.py -> spelling in this script
TYPED = {
    "--video_size": "--video-size",
    "--video_length": "--video-length",
    "--infer_steps": "--infer-steps",
    "--embedded_cfg_scale": "--embedded-cfg-scale",
    "--guidance_scale": "--cfg-scale",
    "--flow_shift": "--flow-shift",
    "--num_videos": "--num-videos",
    "--dit": "--dit-weight",
    "--save_path": "--save-path",
    "--fp8": "--use-fp8",
}


def generation_argv(options: OfficialOptions) -> list[str]:
    """Translate the released command line to the options of hv_generate_video.py."""
    video = options.video
    model = options.model
    base = model.model_base
    values: dict[str, Any] = {
        "--prompt": video.prompt,
        "--video_length": video.video_length,
        "--infer_steps": video.infer_steps,
        "--embedded_cfg_scale": video.embedded_cfg_scale,
        "--guidance_scale": video.cfg_scale,
        "--flow_shift": video.flow_shift,
        "--num_videos": video.num_videos,
        "--dit": model.dit_weight or base / RELEASE / "transformers" / "mp_rank_00_model_states.pt",
        "--vae": base / RELEASE / "vae" / "pytorch_model.pt",
        "--text_encoder1": base / "text_encoder",
        "--text_encoder2": base / "text_encoder_2",
        "--vae_dtype": model.vae_precision,
        "--text_encoder_dtype": model.text_encoder_precision,
        "--hidden_state_skip_layer": model.hidden_state_skip_layer,
        "--save_path": options.folder,
        "--seed": video.seed,
        "--video_size": video.size,
        "--context_parallel": model.ulysses_degree * model.ring_degree,
        "--blocks_to_swap=auto": model.use_cpu_offload,
        "--fp8": model.use_fp8,
        "--apply_final_norm": model.apply_final_norm,
        "--reproduce": model.reproduce,
    }
    argv = option_argv(values)
    # at scale 1, a negative prompt has no effect
    if video.cfg_scale != 1:
        negative = NEGATIVE_PROMPT if video.neg_prompt is None else video.neg_prompt
        argv.append(f"--negative_prompt={negative}")
    for text in options.post or ():
        argv.append(f"--post={text}")
    return argv
