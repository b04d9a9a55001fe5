"""Files of a Wan run, each checked against its option, and what the options choose in the family's words.

A whole release (--ckpt_dir) is a folder; names of transformer files tell task and expert.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from modules.checkpoints.dits import DitHeader
from modules.checkpoints.model_files import read_once, require_file
from modules.contract.data import LatentSpec
from modules.contract.rules import HIGH_NOISE, LOW_NOISE, expert_of_file
from modules.devices import choose_compute_dtype
from modules.errors import CheckpointError, OptionError
from modules.text_files import parse_json, read_text
from networks.names.video import WAN
from wan.checkpoints import check_alike, check_task, read_dit_header
from wan.configs import RELEASES, TASKS, WAN_2_1, WAN_2_2, VaeRelease, WanConfig, WanTask
from wan.encoder_checkpoints import read_clip, read_t5
from wan.options import MOST_TIMESTEP, WanGenerationOptions, WanLatentCachingOptions, WanTrainingOptions
from wan.t5 import TOKENIZER
from wan.vae_checkpoints import check_latents, read_vae


@dataclass(frozen=True)
class WanFiles:
    """Paths as the options give them.

    The properties return an existing path, or raise OptionError or CheckpointError naming the option.
    """

    dit: Path | None = None  # the low-noise expert's, or the only one
    vae: Path | None = None
    t5: Path | None = None
    t5_tokenizer: Path | None = None
    clip: Path | None = None
    dit_high_noise: Path | None = None

    @property
    def dit_path(self) -> Path:
        return require_file(self.dit, "--dit", "the transformer checkpoint")

    @property
    def has_dit(self) -> bool:
        """Whether a transformer is given."""
        return self.dit is not None or self.dit_high_noise is not None

    @property
    def dits(self) -> tuple[Path, ...]:
        """Transformers that are given, the one for little noise first; --dit must be unless the other is."""
        if self.dit_high_noise is None:
            return (self.dit_path,)
        high = require_file(self.dit_high_noise, "--dit_high_noise", "the transformer for much noise")
        return (high,) if self.dit is None else (self.dit_path, high)

    def check_dits(self, task: WanTask) -> None:
        """Raise OptionError or CheckpointError if a transformer is missing, or does not fit --task."""
        both = {"--dit": self.dit, "--dit_high_noise": self.dit_high_noise}
        paths = {option: path for option, path in both.items() if path in self.dits}
        headers = {option: read_once(path, read_dit_header) for option, path in paths.items()}
        for option, path in paths.items():
            check_task(headers[option], task, path, option)
        check_alike(headers, paths)

    @property
    def vae_path(self) -> Path:
        return require_file(self.vae, "--vae", "the VAE converts between pixels and latents")

    @property
    def t5_path(self) -> Path:
        return require_file(self.t5, "--t5", "the umT5 text encoder encodes the prompts")

    @property
    def clip_path(self) -> Path:
        return require_file(self.clip, "--clip", "the task is conditioned on image features")

    def dit_header(self) -> DitHeader[WanConfig]:
        """Read variant, dialect and dtype of the first transformer file; those of experts are alike."""
        return read_once(self.dits[0], read_dit_header)

    def check_encoders(self, *needed: str) -> None:
        """Check the files of encoders that are given or needed ("vae", "t5", "clip"). Loads nothing.

        Raises OptionError if a needed one is not given, CheckpointError if a file is missing or another kind
        of network.
        """
        if self.vae is not None or "vae" in needed:
            read_once(self.vae_path, read_vae)
        if self.t5 is not None or "t5" in needed:
            read_once(self.t5_path, read_t5)
        if self.clip is not None or "clip" in needed:
            read_once(self.clip_path, read_clip)

    def vae_release(self) -> VaeRelease | None:
        """Return which VAE is given; None if none is. Raises CheckpointError if the file is no VAE of Wan."""
        if self.vae is None:
            return None
        return RELEASES[read_once(self.vae_path, read_vae).config.latent_channels]

    def check_vae(self, latent: LatentSpec, needed_by: str) -> None:
        """Raise CheckpointError if a VAE is given that is not that of the model's latents.

        needed_by: the model in words, for the message: "--task ti2v-5B".
        """
        if self.vae is not None:
            check_latents(read_once(self.vae_path, read_vae).config, latent, self.vae_path, needed_by)

    def check_tokenizer(self) -> None:
        """Raise CheckpointError if --t5_tokenizer is given and names no tokenizer."""
        if self.t5_tokenizer is not None:
            TOKENIZER.files.check_given(self.t5_tokenizer)


logger = logging.getLogger(__name__)

# The file names of the official releases, beside that of the VAE
OFFICIAL = {
    "t5": "models_t5_umt5-xxl-enc-bf16.pth",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "t5_tokenizer": "google/umt5-xxl",
}
OFFICIAL_EXPERTS = {"dit": "low_noise_model", "dit_high_noise": "high_noise_model"}
OFFICIAL_DIT = (
    "diffusion_pytorch_model*.safetensors"  # of releases with one transformer, in the folder itself
)

# The folders of a pipeline of diffusers, where the *second* transformer is for little noise.
# Source: diffusers' WanPipeline, `boundary_ratio`
PIPELINE_INDEX = "model_index.json"
PIPELINE = {"vae": "vae", "t5": "text_encoder", "clip": "image_encoder", "t5_tokenizer": "tokenizer"}
PIPELINE_DIT = {"dit": "transformer"}
_OPTIONS = {LOW_NOISE: "dit", HIGH_NOISE: "dit_high_noise"}
PIPELINE_EXPERTS = {_OPTIONS[expert]: folder for folder, expert in WAN.experts}


@dataclass(frozen=True)
class Release:
    """Files of a folder, and the boundary of its experts as a timestep; None: it says nothing."""

    files: WanFiles
    boundary: float | None = None


def read_release(folder: Path, latent: LatentSpec) -> Release:
    """Find the parts of an official release, or of a pipeline of diffusers. Loads nothing.

    latent: of the model; it decides which VAE fits.
    Raises OptionError if the folder is missing, CheckpointError if its index cannot be read.
    """
    if not folder.is_dir():
        raise OptionError(f"--ckpt_dir {folder}: no such folder. Give that of the official release")
    index = folder / PIPELINE_INDEX
    if index.exists():
        has_experts = (folder / PIPELINE_EXPERTS["dit"]).is_dir()
        dits = PIPELINE_EXPERTS if has_experts else PIPELINE_DIT
        return Release(_there(folder, PIPELINE | dits), _read_boundary(index) if has_experts else None)
    parts = {**OFFICIAL, "vae": RELEASES[latent.channels].file, **OFFICIAL_EXPERTS}
    found = _there(folder, parts)
    if found.dit is None and found.dit_high_noise is None and any(folder.glob(OFFICIAL_DIT)):
        found = replace(found, dit=folder)
    return Release(found)


def add_release(given: WanFiles, release: WanFiles) -> WanFiles:
    """Return the files that options give; those that are not given come from a release.

    Its transformers are taken together: if --dit is given, that for much noise is not taken either, as --dit
    alone means one transformer for all noise levels.
    """
    kept = {"dit", "dit_high_noise"} if given.dit is not None else set[str]()
    for name in ("dit", "dit_high_noise"):
        if name not in kept and getattr(given, name) is None and getattr(release, name) is not None:
            logger.info("--%s is %s, from --ckpt_dir", name, getattr(release, name))
    added = {
        each.name: getattr(release, each.name)
        for each in fields(WanFiles)
        if getattr(given, each.name) is None and each.name not in kept
    }
    return replace(given, **added)


def check_names(dit: Path | None, dit_high_noise: Path | None) -> None:
    """Compare the names of the transformers with their options.

    Raises OptionError if both say that they were swapped: nobody wants that, and the videos would be noise.
    Warns if one of them does, as a name is only a hint.
    """
    named = {
        option: (path, expert_of_file(path, dict(WAN.experts)), meant)
        for option, path, meant in (
            ("--dit", dit, LOW_NOISE),
            ("--dit_high_noise", dit_high_noise, HIGH_NOISE),
        )
        if path is not None
    }
    wrong = [option for option, (_, name, meant) in named.items() if name not in {None, meant}]
    if len(wrong) > 1:
        raise OptionError(
            f"--dit {dit} is named as the transformer for much noise, and --dit_high_noise {dit_high_noise} "
            "as the one for little noise: swap the two"
        )
    for option in wrong:
        path, name, meant = named[option]
        use = "all noise levels" if len(named) == 1 and meant == LOW_NOISE else f"{_words(meant)} noise"
        logger.warning(
            "%s %s is used for %s, but its name says that it is for %s noise", option, path, use, _words(name)
        )
    if dit is not None and dit == dit_high_noise:
        logger.warning("--dit and --dit_high_noise are the same file: %s does all steps", dit)


def _words(expert: str | None) -> str:
    return "much" if expert == HIGH_NOISE else "little"


def _there(folder: Path, parts: Mapping[str, str]) -> WanFiles:
    return WanFiles(**{key: folder / name for key, name in parts.items() if (folder / name).exists()})


def _read_boundary(index: Path) -> float | None:
    """Return `boundary_ratio` of a pipeline's index as a timestep."""
    try:
        ratio = parse_json(read_text(index)).get("boundary_ratio")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"--ckpt_dir: {index} cannot be read ({error}). Download it again.", index
        ) from error
    if ratio is None:
        return None
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
        raise CheckpointError(
            f"--ckpt_dir: boundary_ratio in {index} is {ratio!r}, not a share of noise such as 0.875. "
            "Download it again, or give --timestep_boundary and the files with --dit and --dit_high_noise.",
            index,
        )
    return float(ratio) * MOST_TIMESTEP


def files_of(options: WanTrainingOptions | WanGenerationOptions) -> WanFiles:
    """Return the files that are given and that the task takes. Raises OptionError if two were swapped."""
    text, high = options.text, options.experts.dit_high_noise
    check_names(options.dit, high)
    clip = options.clip
    if clip is not None and TASKS[options.task].version != "2.1":
        logger.warning("--clip %s is ignored because --task %s takes no image features", clip, options.task)
        clip = None
    return WanFiles(options.dit, options.vae.vae, text.t5, text.t5_tokenizer, clip, high)


def files_and_boundary(options: WanGenerationOptions, latent: LatentSpec) -> tuple[WanFiles, float | None]:
    """Return the files of a generation, also those of --ckpt_dir, and the boundary of the experts.

    latent: of the task. Raises OptionError if the transformer for little noise is missing.
    """
    files, task, boundary = files_of(options), TASKS[options.task], None
    if options.ckpt_dir is not None:
        release = read_release(options.ckpt_dir, latent)
        files, boundary = add_release(files, release.files), release.boundary
    if files.dit is None and files.dit_high_noise is not None:
        raise OptionError(
            "--dit is missing: --dit_high_noise alone cannot take away the last of the noise. Give the "
            "transformer for little noise"
        )
    if task.boundary is not None and files.dit is not None and files.dit_high_noise is None:
        logger.info(
            "--task %s has two transformers: without --dit_high_noise --dit makes all steps", task.name
        )
    return files, boundary_of(options, task, files, boundary)


def boundary_of(
    options: WanTrainingOptions | WanGenerationOptions,
    task: WanTask,
    files: WanFiles,
    of_release: float | None = None,
) -> float | None:
    """Return where the high-noise expert begins: as the options say, else a release, else the task.

    Raises OptionError if the task has no high-noise expert.
    """
    if files.dit_high_noise is not None and task.boundary is None:
        raise OptionError(
            f"--dit_high_noise {files.dit_high_noise}: --task {task.name} has one transformer. Leave it out, "
            "or use --task t2v-A14B or i2v-A14B"
        )
    other = options.sample_dit_other if isinstance(options, WanTrainingOptions) else None
    if options.experts.boundary is not None and files.dit_high_noise is None and other is None:
        logger.warning("--timestep_boundary is ignored because there is no --dit_high_noise")
    return options.experts.boundary or of_release or task.boundary


def caching_task(options: WanLatentCachingOptions, files: WanFiles) -> tuple[WanTask, str | None]:
    """Return a task whose latents the given VAE makes, and the kind of image condition that is cached.

    The kind is i2v or flf2v; None for text-to-video caches. Raises OptionError for switches that those
    latents have no use for.
    """
    kind = "i2v" if options.i2v or options.clip is not None else None
    image_kind = "flf2v" if options.flf2v else kind
    release = files.vae_release()
    if release is None:
        logger.info("Sizes are those of %s; for others give --vae", WAN_2_1.about)
    task = TASKS["ti2v-5B" if release is WAN_2_2 else "t2v-14B"]
    if task.kind == "ti2v" and image_kind is not None:
        given = "--clip" if options.clip is not None else "--i2v"
        raise OptionError(
            f"{given}: --vae {options.vae.vae} is {WAN_2_2.about}. That model starts from an image by the "
            f"latents of the clip itself, so nothing else is cached. Leave out {given}"
            f"{' and --flf2v' if options.flf2v else ''}."
        )
    return task, image_kind


def vae_settings(
    options: WanLatentCachingOptions | WanTrainingOptions | WanGenerationOptions,
    default_dtype: torch.dtype | None,
) -> Mapping[str, Any]:
    """Return the fields of `Wan` for the VAE. default_dtype: without --vae_dtype."""
    vae = options.vae
    dtype = choose_compute_dtype(vae.vae_dtype, "--vae_dtype", None) or default_dtype
    return {"vae_dtype": dtype, "vae_cache_cpu": options.vae_cache_cpu, "vae_tile": vae.tile}


def network_settings(options: WanTrainingOptions | WanGenerationOptions) -> Mapping[str, Any]:
    """Return the fields of `Wan` for the transformers and the text encoder."""
    return {
        "dit_dtype": choose_compute_dtype(options.dit_dtype, "--dit_dtype", None),
        "rope": options.rope_func,
        "keep_file_dtypes": options.mixed_precision_transformer,
        "text_as_image_tokens": options.text_as_image_tokens,
        "t5_in_fp8": options.text.fp8_t5,
    }
