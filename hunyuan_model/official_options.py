"""The command line of the released HunyuanVideo, in the words of hv_generate_video.py. Standard library only.

Source: the README of the release and its table of options.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import OptionError
from modules.option_values import check_at_least, check_at_most
from modules.options import read_options
from modules.parser import Parser, add_unsupported, refuse_unsupported

logger = logging.getLogger(__name__)

NEGATIVE_PROMPT = (  # of the release, where guidance is on and no other is given
    "Aerial view, aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad "
    "teeth, bad eyes, bad limbs, distortion"
)
RELEASE = Path("hunyuan-video-t2v-720p")  # the folder of transformer and VAE below --model-base
SIZE_STEP = 16
# what the model was trained for: height, width; 129 frames each
SIZES = {
    "540p": ((544, 960), (960, 544), (624, 832), (832, 624), (720, 720)),
    "720p": ((720, 1280), (1280, 720), (1104, 832), (832, 1104), (960, 960)),
}
# options that describe the released networks, which our loader reads from the files: option -> their value
DESCRIPTIONS = {
    "--model": "HYVideo-T/2-cfgdistill",
    "--latent-channels": "16",
    "--rope-theta": "256",
    "--vae": "884-16c-hy",
    "--load-key": "module",
    "--text-encoder": "llm",
    "--text-encoder-2": "clipL",
    "--tokenizer": "llm",
    "--tokenizer-2": "clipL",
    "--text-states-dim": "4096",
    "--text-states-dim-2": "768",
    "--text-len": "256",
    "--text-len-2": "77",
    "--prompt-template": "dit-llm-encode",
    "--prompt-template-video": "dit-llm-encode-video",
    "--denoise-type": "flow",
    "--flow-solver": "euler",
    "--seed-type": "auto",
}
PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class OfficialOptions:
    """Options of the released sample_video.py."""

    prompt: str
    video_size: tuple[int, ...]  # height and width, or one number for both
    video_length: int
    infer_steps: int
    embedded_cfg_scale: float
    cfg_scale: float
    neg_prompt: str | None
    flow_shift: float
    seed: int | None
    num_videos: int
    batch_size: int
    use_cpu_offload: bool
    use_fp8: bool
    model_base: Path
    dit_weight: Path | None
    model_resolution: str | None
    precision: str
    vae_precision: str
    text_encoder_precision: str
    text_encoder_precision_2: str
    hidden_state_skip_layer: int
    apply_final_norm: bool
    reproduce: bool
    save_path: Path
    save_path_suffix: str
    post: tuple[str, ...] | None
    ulysses_degree: int
    ring_degree: int

    def __post_init__(self) -> None:
        for option, degree in (
            ("--ulysses-degree", self.ulysses_degree),
            ("--ring-degree", self.ring_degree),
        ):
            if degree != 1:
                raise OptionError(
                    f"{option} {degree}: one video is not spread over several GPUs here. Leave it out"
                )
        if len(self.video_size) > 2:
            raise OptionError("--video-size: give a height and a width, or one number for a square")
        for side in self.video_size:
            check_at_least("--video-size", side, SIZE_STEP, "height and width in pixels")
            check_at_most("--video-size", side, 16384, "height and width in pixels")
        if self.video_length < 1 or (self.video_length - 1) % 4:
            nearest = max(round((self.video_length - 1) / 4), 0) * 4 + 1
            raise OptionError(f"--video-length {self.video_length}: it must be 4n + 1, such as {nearest}")
        if self.batch_size != 1:
            raise OptionError(
                f"--batch-size {self.batch_size}: videos are made one after the other. Give --num-videos"
            )
        check_at_least("--num-videos", self.num_videos, 1, "how many videos to make")
        check_at_most("--num-videos", self.num_videos, 10_000, "how many videos to make")
        if self.text_encoder_precision != self.text_encoder_precision_2:
            raise OptionError(
                f"--text-encoder-precision {self.text_encoder_precision} and --text-encoder-precision-2 "
                f"{self.text_encoder_precision_2}: both encoders compute in one dtype, give the same"
            )

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width, rounded up to what the model takes."""
        height, width = self.video_size if len(self.video_size) == 2 else self.video_size * 2
        return -(-height // SIZE_STEP) * SIZE_STEP, -(-width // SIZE_STEP) * SIZE_STEP

    @property
    def folder(self) -> Path:
        """Return where videos are written to."""
        return Path(f"{self.save_path}_{self.save_path_suffix}") if self.save_path_suffix else self.save_path


def read_official(description: str | None, argv: Sequence[str] | None) -> OfficialOptions:
    """Read the released command line. Raises OptionError for what does not work here."""
    parser = Parser(description=description)
    _add_video_arguments(parser)
    _add_model_arguments(parser)
    _add_output_arguments(parser)
    args = parser.parse_args(argv)
    refuse_unsupported(parser, args)
    options = read_options(OfficialOptions, args)
    _warn_of_size(options)
    return options


def generation_words(options: OfficialOptions) -> list[str]:
    """Return the same command as options of hv_generate_video.py."""
    base = options.model_base
    height, width = options.size
    pairs: dict[str, Any] = {
        "--prompt": options.prompt,
        "--video_length": options.video_length,
        "--infer_steps": options.infer_steps,
        "--embedded_cfg_scale": options.embedded_cfg_scale,
        "--guidance_scale": options.cfg_scale,
        "--flow_shift": options.flow_shift,
        "--num_videos": options.num_videos,
        "--dit": options.dit_weight or base / RELEASE / "transformers" / "mp_rank_00_model_states.pt",
        "--vae": base / RELEASE / "vae" / "pytorch_model.pt",
        "--text_encoder1": base / "text_encoder",
        "--text_encoder2": base / "text_encoder_2",
        "--vae_dtype": options.vae_precision,
        "--text_encoder_dtype": options.text_encoder_precision,
        "--hidden_state_skip_layer": options.hidden_state_skip_layer,
        "--save_path": options.folder,
    }
    if options.cfg_scale != 1:
        pairs["--negative_prompt"] = NEGATIVE_PROMPT if options.neg_prompt is None else options.neg_prompt
    if options.seed is not None:
        pairs["--seed"] = options.seed
    # joined: a prompt may begin with a dash
    words = [f"{option}={value}" for option, value in pairs.items()]
    words += ["--video_size", str(height), str(width)]
    words += [f"--post={text}" for text in options.post or ()]
    words += ["--blocks_to_swap=auto"] if options.use_cpu_offload else []
    switches = {
        "--fp8": options.use_fp8,
        "--apply_final_norm": options.apply_final_norm,
        "--reproduce": options.reproduce,
    }
    return words + [switch for switch, is_on in switches.items() if is_on]


def _warn_of_size(options: OfficialOptions) -> None:
    height, width = options.size
    if options.neg_prompt is not None and options.cfg_scale == 1:
        logger.warning("--neg-prompt is ignored because --cfg-scale is 1, which means no guidance")
    trained = [size for sizes in SIZES.values() for size in sizes]
    if (height, width) not in trained:
        nearest = min(trained, key=lambda size: abs(size[0] - height) + abs(size[1] - width))
        logger.warning(
            "--video-size %d %d (height width) is none of the sizes that the model was trained for. Nearest: "
            "%d %d",
            height,
            width,
            *nearest,
        )
    elif options.model_resolution and (height, width) not in SIZES[options.model_resolution]:
        other = next(name for name, sizes in SIZES.items() if (height, width) in sizes)
        logger.warning(
            "--video-size %d %d is a size of --model-resolution %s, not of %s",
            height,
            width,
            other,
            options.model_resolution,
        )


def _add_video_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to make")
    group.add_argument("--prompt", type=str, required=True, help="what the video should show")
    group.add_argument("--neg-prompt", type=str, default=None, help="what to avoid, with --cfg-scale above 1")
    group.add_argument(
        "--video-size",
        type=int,
        nargs="+",
        default=[720, 1280],
        help="height and width, or one number for a square; rounded up to multiples of 16",
    )
    group.add_argument("--video-length", type=int, default=129, help="number of frames, 4n + 1")
    group.add_argument("--infer-steps", type=int, default=50, help="number of denoising steps")
    group.add_argument(
        "--embedded-cfg-scale", type=float, default=6.0, help="guidance that the model takes as an input"
    )
    group.add_argument(
        "--cfg-scale", type=float, default=1.0, help="classifier-free guidance; 1 turns it off"
    )
    group.add_argument("--flow-shift", type=float, default=7.0, help="time shift of the schedule")
    group.add_argument(
        "--flow-reverse",
        action="store_true",
        help="from noise to video: always so here, accepted for the commands of the release",
    )
    group.add_argument("--seed", type=int, default=None, help="default: a random one for each video")
    group.add_argument("--num-videos", type=int, default=1, help="how many, with seed, seed + 1, ...")
    group.add_argument("--batch-size", type=int, default=1, help="only 1: videos are made one by one")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model-base",
        type=str,
        default=os.environ.get("MODEL_BASE", "ckpts"),
        help="folder of the release; default: ckpts, or the environment variable MODEL_BASE",
    )
    group.add_argument(
        "--dit-weight", type=str, default=None, help="transformer checkpoint; default: in --model-base"
    )
    group.add_argument(
        "--model-resolution",
        type=str,
        default=None,
        choices=list(SIZES),
        help="warn of a --video-size that is not for it; default: of one that is for none",
    )
    for name in ("precision", "vae-precision", "text-encoder-precision", "text-encoder-precision-2"):
        group.add_argument(
            f"--{name}",
            type=str,
            default="bf16" if name == "precision" else "fp16",
            choices=PRECISIONS,
            help="dtype that the network computes in",
        )
    group.add_argument(
        "--hidden-state-skip-layer",
        type=int,
        default=2,
        help="number of the language model's last layers to skip; the state before them is used",
    )
    group.add_argument(
        "--apply-final-norm", action="store_true", help="apply the final norm to that state too"
    )
    group.add_argument("--reproduce", action="store_true", help="use only deterministic algorithms")
    group.add_argument(
        "--use-cpu-offload", action="store_true", help="swap as many blocks to host memory as it takes"
    )
    group.add_argument("--use-fp8", action="store_true", help="keep the transformer's weights in 8 bits")
    group.add_argument("--vae-tiling", action="store_true", help="always so here")
    for degree in ("--ulysses-degree", "--ring-degree"):
        group.add_argument(degree, type=int, default=1, help="only 1")
    reason = "the files of the model say it"
    for option, value in DESCRIPTIONS.items():
        add_unsupported(group, option, type=str, default=value, reason=reason, help=f"only {value}")
    later = "the released schedule is used"
    add_unsupported(group, "--use-linear-quadratic-schedule", action="store_true", reason=later)
    add_unsupported(group, "--linear-schedule-end", type=int, default=25, reason=later)
    add_unsupported(
        group,
        "--disable-autocast",
        action="store_true",
        reason="the network computes in --precision without autocast; leave it out",
    )


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--save-path", type=str, default="./results", help="output folder")
    group.add_argument("--save-path-suffix", type=str, default="", help="added to the folder's name")
    group.add_argument(
        "--post",
        type=str,
        action="append",
        default=None,
        metavar="TOOL ...",
        help="not of the release: a tool that frames go through before they are written, as of "
        "hv_generate_video.py",
    )
    add_unsupported(group, "--name-suffix", type=str, default="", reason="the release does not use it either")
