"""Files of a Wan run, each checked against its option, and settings that follow from options.

A whole release (--ckpt_dir) is a folder; the names of its transformer files give task and expert.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch

from checkpoints.dits import DitFormat, DitHeader
from checkpoints.model_files import read_once, require_file
from encoders.files import TransformerFiles
from modules.devices import select_compute_dtype
from modules.errors import CheckpointError, OptionError
from modules.paths import explain_missing
from modules.speed_options import text_form
from modules.text_files import parse_json, read_text
from protocols.data import LatentSpec
from protocols.families import HIGH_NOISE, LOW_NOISE
from protocols.family import TextEncoder
from protocols.rules import infer_expert_from_path
from wan.checkpoints import FORMAT, add_vace_header, check_task, read_dit_header
from wan.checkpoints import identify as identify  # files.py has it in every family's folder
from wan.configs import BERNINI, RELEASES, TASKS, VACE, WAN_2_1, WAN_2_2, WanConfig, WanTask
from wan.names import WAN
from wan.options import (
    MAX_TIMESTEP,
    ONE_FRAME,
    WanGenerationOptions,
    WanLatentCachingOptions,
    WanModelOptions,
    WanTrainingOptions,
)
from wan.spec import LATENT_SPECS
from wan.vae import WanVae, load_vae
from wan.vae_checkpoints import check_latents, read_vae


@dataclass(frozen=True)
class WanFiles(TransformerFiles):
    """Files of a run: one or two transformers, umT5, the VAE of the task's latents, and CLIP."""

    # `dit` is the only transformer, or the low-noise expert
    t5: Path | None = None
    t5_tokenizer: Path | None = None
    clip: Path | None = None
    dit_high_noise: Path | None = None
    vace: Path | None = None  # blocks of VACE next to `dit`
    vace_high_noise: Path | None = None
    vae_cache_cpu: bool = False
    t5_form: str | None = None
    sentence: str = ""  # of Bernini, in front of captions
    task: WanTask = TASKS["t2v-14B"]

    format: ClassVar[DitFormat[Any, Any]] = FORMAT

    @property
    def dits(self) -> tuple[Path, ...]:
        """Transformer files, low noise first. --dit is required if the file for high noise is missing."""
        if self.dit_high_noise is None:
            return (self.dit_path,)
        high = require_file(self.dit_high_noise, "--dit_high_noise", "the transformer for high noise")
        return (high,) if self.dit is None else (self.dit_path, high)

    def check_dits(self) -> None:
        """Raise OptionError or CheckpointError if a transformer is missing, or does not fit --task."""
        experts = {"--dit": self.dit, "--dit_high_noise": self.dit_high_noise}
        paths = {option: path for option, path in experts.items() if path in self.dits}
        headers = {option: self.dit_header(path) for option, path in paths.items()}
        for option, path in paths.items():
            check_task(headers[option], self.task, path, option)
        if len(headers) < 2:
            return
        first, second = headers  # options of the two transformers
        config = headers[first].config
        second_config = headers[second].config
        if second_config != config:
            raise CheckpointError(
                f"{second} {paths[second]} belongs to a different model than {first} {paths[first]}:\n"
                f"  it has {_name_size(second_config)}, the other has {_name_size(config)}.\n"
                "  Pass two transformers of the same model.",
                paths[second],
            )

    @property
    def t5_path(self) -> Path:
        """Path of umT5. Raises OptionError if --t5 is missing."""
        return require_file(self.t5, "--t5", "the umT5 text encoder encodes the prompts")

    @property
    def clip_path(self) -> Path:
        """Path of the image encoder. Raises OptionError if --clip is missing."""
        return require_file(self.clip, "--clip", "the task is conditioned on image features")

    def find_vace(self, dit: Path) -> Path | None:
        """Return the separate file of VACE's blocks for a transformer's file; None if there is none."""
        path, option = self.vace, "--vace"
        if dit == self.dit_high_noise and dit != self.dit:
            path, option = self.vace_high_noise, "--vace_high_noise"
        return None if path is None else require_file(path, option, "it has the blocks of VACE")

    def dit_header(self, dit: Path | None = None) -> DitHeader[WanConfig]:
        """Read variant, dialect and dtype of a transformer file; a separate file may contain VACE's blocks.

        `dit` is the file; None for the first one, because all experts have the same dimensions.
        """
        dit = self.dits[0] if dit is None else dit
        header = read_once(dit, read_dit_header)
        vace = self.find_vace(dit)
        return header if vace is None else read_once(vace, add_vace_header, header, dit)

    def compute_dtype(self) -> torch.dtype | None:
        """Return --dit_dtype, else the dtype of the first transformer file; None without a file."""
        dit = self.dit or self.dit_high_noise
        return None if dit is None else self.dit_dtype or self.dit_header().compute_dtype

    def encoder_dtype(self, chosen: torch.dtype | None, default: torch.dtype | None = None) -> torch.dtype:
        """Return `chosen`, else the transformer's dtype, else `default`, else the files' default dtype."""
        return chosen or self.compute_dtype() or default or self.default_text_dtype

    def text_encoders(self) -> list[TextEncoder]:
        """Return umT5, whose weights are read when it is loaded."""
        from wan.t5 import WanTextEncoder  # only with texts

        encoder = WanTextEncoder(self.t5_path, self.t5_tokenizer, self.t5_form)
        encoder.sentence = self.sentence
        return [encoder]

    def load_vae(self, device: torch.device) -> WanVae:
        """Load the VAE with the options for its cache and tiles."""
        dtype = self.encoder_dtype(self.vae_dtype)
        return load_vae(self.vae_path, device, dtype, self.vae_cache_cpu, tile=self.vae_tile)

    def check_vae(self) -> None:
        """Raise CheckpointError if the VAE does not produce the task's latents."""
        config = read_once(self.vae_path, read_vae).config
        check_latents(config, LATENT_SPECS[self.task.kind], self.vae_path, f"--task {self.task.name}")

    def check_texts(self, config: Any, needed: bool) -> None:
        """Check umT5 and its tokenizer if they are given, and umT5 also if it is needed."""
        if self.t5 is not None or needed:
            from encoders.t5_network import read_t5  # only with texts
            from wan.t5 import UMT5

            read_once(self.t5_path, read_t5, UMT5)
        if self.t5_tokenizer is not None:
            from wan.t5 import TOKENIZER  # only with texts

            TOKENIZER.files.check_option_value(self.t5_tokenizer)

    def check(self, needed: Collection[str] = ()) -> None:
        """Check the files that are given or needed ("dit", "vae", "texts", "clip"). Loads nothing."""
        if self.dit or self.dit_high_noise or "dit" in needed:
            self.check_dits()
        super().check(needed)
        if self.clip is not None or ("clip" in needed and self.task.uses_clip_features):
            from wan.clip import read_clip  # only for images

            read_once(self.clip_path, read_clip)


def _name_size(config: WanConfig) -> str:
    return f"{config.num_layers} blocks of width {config.dim} and {config.in_dim} input channels"


logger = logging.getLogger(__name__)

# Names of the files in official releases, except the VAE
OFFICIAL = {
    "t5": "models_t5_umt5-xxl-enc-bf16.pth",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "t5_tokenizer": "google/umt5-xxl",
}
OFFICIAL_EXPERTS = {"dit": "low_noise_model", "dit_high_noise": "high_noise_model"}
OFFICIAL_DIT = (
    # files of releases with a single transformer, in the folder itself
    "diffusion_pytorch_model*.safetensors"
)

# Folders of a diffusers pipeline, whose *second* transformer is for low noise.
# Source: diffusers' WanPipeline, `boundary_ratio`
PIPELINE_INDEX = "model_index.json"
PIPELINE = {"vae": "vae", "t5": "text_encoder", "clip": "image_encoder", "t5_tokenizer": "tokenizer"}
PIPELINE_DIT = {"dit": "transformer"}
_OPTION_BY_EXPERT = {LOW_NOISE: "dit", HIGH_NOISE: "dit_high_noise"}
PIPELINE_EXPERTS = {_OPTION_BY_EXPERT[expert]: folder for folder, expert in WAN.experts}


class WanRelease(NamedTuple):
    """Files in a release's folder, by field name of `WanFiles`, and the timestep that divides its experts."""

    files: dict[str, Path]  # by the names of `WanFiles`
    # timestep at which the experts change; None if the release does not state it
    boundary: float | None = None


def read_release(folder: Path, latent: LatentSpec) -> WanRelease:
    """Find the files of an official release or a diffusers pipeline in its folder, without reading weights.

    Args:
        folder: Folder of the release.
        latent: Latent space of the model, which decides which VAE to look for.

    Raises:
        OptionError: If the folder is missing.
        CheckpointError: If its index cannot be read.
    """
    if not folder.is_dir():
        raise OptionError(
            f"--ckpt_dir {folder}: no such folder.{explain_missing(folder)} Pass the folder of the "
            "official release"
        )
    index = folder / PIPELINE_INDEX
    if index.exists():
        if (folder / PIPELINE_EXPERTS["dit"]).is_dir():
            files = _find_existing(folder, PIPELINE | PIPELINE_EXPERTS)
            return WanRelease(files, _read_boundary(index))
        return WanRelease(_find_existing(folder, PIPELINE | PIPELINE_DIT))
    names = {**OFFICIAL, "vae": RELEASES[latent.channels].file, **OFFICIAL_EXPERTS}
    files = _find_existing(folder, names)
    has_experts = not files.keys().isdisjoint(OFFICIAL_EXPERTS)
    if not has_experts and any(folder.glob(OFFICIAL_DIT)):
        files["dit"] = folder  # the transformer is in several files of this folder
    return WanRelease(files)


def _read_boundary(index: Path) -> float | None:
    """Return the timestep that divides the experts; None if the pipeline's index does not record it."""
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
            f"--ckpt_dir: boundary_ratio in {index} is {ratio!r}, not a noise level such as 0.875. "
            "Download it again, or pass --timestep_boundary and the files with --dit and "
            "--dit_high_noise.",
            index,
        )
    return float(ratio) * MAX_TIMESTEP


def add_release(files: WanFiles, release: Mapping[str, Path]) -> WanFiles:
    """Add the files of a release whose options are not given.

    If --dit is given, the release's transformer for high noise is not used either, because --dit alone means
    one transformer for all noise levels.
    """
    names_in_use = {name for name in release if getattr(files, name) is not None}
    if files.dit is not None:
        names_in_use.add("dit_high_noise")
    added: dict[str, Any] = {name: path for name, path in release.items() if name not in names_in_use}
    for name in sorted(added.keys() & OFFICIAL_EXPERTS.keys()):
        logger.info("--%s is %s, from --ckpt_dir", name, added[name])
    return replace(files, **added)


def check_expert_file_names(dit: Path | None, dit_high_noise: Path | None) -> None:
    """Compare the names of the transformer files with their options.

    A name is only a hint: if one of the two contradicts its option, a warning is logged.

    Raises:
        OptionError: If both names say that the files were swapped.
    """
    files = {LOW_NOISE: dit, HIGH_NOISE: dit_high_noise}
    experts = dict(WAN.experts)
    # expert for which a file is given -> the other one, which its name suggests
    misnamed: dict[str, str] = {}
    for expert, path in files.items():
        named_expert = None if path is None else infer_expert_from_path(path, experts)
        if named_expert not in (None, expert):
            misnamed[expert] = named_expert
    if len(misnamed) > 1:
        raise OptionError(
            f"--dit {dit} is named as the transformer for high noise, and --dit_high_noise {dit_high_noise} "
            "as the one for low noise: swap the two"
        )
    for expert, named_expert in misnamed.items():
        is_alone = expert == LOW_NOISE and dit_high_noise is None
        use = "all noise levels" if is_alone else f"{_name_noise(expert)} noise"
        logger.warning(
            "--%s %s is used for %s, but its name says that it is for %s noise",
            _OPTION_BY_EXPERT[expert],
            files[expert],
            use,
            _name_noise(named_expert),
        )
    if dit is not None and dit == dit_high_noise:
        logger.warning("--dit and --dit_high_noise are the same file: %s runs all steps", dit)


def _name_noise(expert: str | None) -> str:
    return "high" if expert == HIGH_NOISE else "low"


def _find_existing(folder: Path, parts: Mapping[str, str]) -> dict[str, Path]:
    return {key: folder / name for key, name in parts.items() if (folder / name).exists()}


ModelOptions = TypeVar("ModelOptions", WanTrainingOptions, WanGenerationOptions)


def resolve_task(options: ModelOptions) -> ModelOptions:
    """Return the options with Bernini's task if no --task is given and a file shows that it is Bernini-R.

    Its tensors are those of text to video: what decided is logged, and what contradicts causes a warning.
    """
    task = TASKS[options.task]
    if task.model_kind != "t2v":
        return options
    from wan.bernini import find_sign  # only for files with these tensors

    paths = [path for path in (options.dit, options.experts.dit_high_noise) if path is not None]
    release = options.ckpt_dir if isinstance(options, WanGenerationOptions) else None
    if not paths and release is not None and (release / PIPELINE_DIT["dit"]).is_dir():
        paths.append(release / PIPELINE_DIT["dit"])
    if not paths:
        return options
    path = next(filter(find_sign, paths), paths[0])
    sign = find_sign(path)
    if task.kind == BERNINI:
        if sign:
            logger.info("%s is Bernini-R: %s", path, sign)
        else:
            logger.warning(
                "%s is used as Bernini-R because --task %s says so; nothing in its name or its folder does. "
                "Text-to-video files of Wan have the same tensors, and would ignore or garble sources",
                path,
                task.name,
            )
        return options
    if not sign:
        return options
    if options.task == WanModelOptions().task:  # the default
        is_small = read_once(path, read_dit_header).config.dim == TASKS["bernini-1.3B"].dim
        name = "bernini-1.3B" if is_small else "bernini-14B"
        logger.info("--task is %s: %s is Bernini-R, %s", name, path, sign)
        return replace(options, task=name)
    logger.warning(
        "%s is Bernini-R (%s), but --task %s uses it as plain Wan, without sources, which may not help its "
        "edits. Pass --task bernini-14B or bernini-1.3B",
        path,
        sign,
        task.name,
    )
    return options


def select_files(options: WanTrainingOptions | WanGenerationOptions) -> WanFiles:
    """Return the files that the options name and the task uses.

    Raises OptionError if file names show that the two transformers were swapped.
    """
    text = options.text
    high = options.experts.dit_high_noise
    check_expert_file_names(options.dit, high)
    clip = options.clip
    if clip is not None and TASKS[options.task].version != "2.1":
        logger.warning("--clip %s is ignored because --task %s takes no image features", clip, options.task)
        clip = None
    files = WanFiles(
        options.dit,
        select_compute_dtype(options.dit_dtype, "--dit_dtype", None),
        t5=text.t5,
        t5_tokenizer=text.t5_tokenizer,
        clip=clip,
        dit_high_noise=high,
        vace=options.vace,
        vace_high_noise=options.vace_high_noise,
        vae_cache_cpu=options.vae_cache_cpu,
        t5_form=text_form(text),
        task=TASKS[options.task],
    )
    return files.add_vae(options.vae)


def files_and_boundary(options: WanGenerationOptions) -> tuple[WanFiles, float | None]:
    """Return the files for generation, including those in --ckpt_dir, and the timestep between the experts.

    Raises OptionError if the transformer for low noise is missing.
    """
    files = select_files(options)
    task = TASKS[options.task]
    boundary = None
    if options.ckpt_dir is not None:
        release = read_release(options.ckpt_dir, LATENT_SPECS[task.kind])
        files = add_release(files, release.files)
        boundary = release.boundary
    if files.dit is None and files.dit_high_noise is not None:
        raise OptionError(
            "--dit is missing: --dit_high_noise alone cannot remove the last noise. Pass the "
            "transformer for low noise"
        )
    if task.boundary is not None and files.dit is not None and files.dit_high_noise is None:
        logger.info(
            "--task %s has two transformers: without --dit_high_noise, --dit runs all steps", task.name
        )
    return files, find_boundary(options, files, boundary)


def find_boundary(
    options: WanTrainingOptions | WanGenerationOptions, files: WanFiles, release_boundary: float | None = None
) -> float | None:
    """Return the lowest timestep at which the high-noise expert is used; None if nothing sets one.

    --timestep_boundary comes first, then `release_boundary`, the boundary in a release's files, then the
    task's default. Raises OptionError if --dit_high_noise is given for a task with one expert.
    """
    task = files.task
    if files.dit_high_noise is not None and task.boundary is None:
        raise OptionError(
            f"--dit_high_noise {files.dit_high_noise}: --task {task.name} has one transformer. Omit it, "
            "or use --task t2v-A14B or i2v-A14B"
        )
    # training of one expert may have the other one only for samples
    sample_dit = options.sample_dit_other if isinstance(options, WanTrainingOptions) else None
    boundary = options.experts.timestep_boundary  # a timestep, or up to 1 a fraction of MAX_TIMESTEP
    if boundary is not None and files.dit_high_noise is None and sample_dit is None:
        logger.warning("--timestep_boundary is ignored because there is no --dit_high_noise")
    if boundary is not None and boundary <= 1:
        boundary *= MAX_TIMESTEP
    return boundary or release_boundary or task.boundary


def caching_files(options: WanLatentCachingOptions) -> tuple[WanFiles, str | None]:
    """Return the files for caching, with a task that fits the VAE, and the kind of condition to cache.

    The kind is i2v, flf2v, vace, bernini or one_frame; None for text-to-video caches. Raises OptionError for
    switches that do not apply to this VAE.
    """
    files = WanFiles(clip=options.clip, vae_cache_cpu=options.vae_cache_cpu).add_vae(options.vae)
    condition_kind = _select_image_kind(options)
    release = None
    if files.vae is not None:
        release = RELEASES[read_once(files.vae_path, read_vae).config.latent_channels]
    if release is None:
        logger.info("Sizes are those of %s; pass --vae for other ones", WAN_2_1.description)
    if release is not WAN_2_2:
        return replace(files, task=TASKS["t2v-14B"]), condition_kind
    if condition_kind in (VACE, BERNINI):
        raise OptionError(
            f"--{condition_kind}: --vae {options.vae.vae} is {WAN_2_2.description}; this model needs that of "
            "Wan2.1"
        )
    if condition_kind is not None:
        switch = "--clip" if options.clip is not None else "--i2v"
        switches = f"{switch} and --flf2v" if options.flf2v else switch
        raise OptionError(
            f"{switch}: --vae {options.vae.vae} is {WAN_2_2.description}. Its model takes the start "
            f"image from the cached clip, so nothing else is cached. Omit {switches}."
        )
    return replace(files, task=TASKS["ti2v-5B"]), None


def _select_image_kind(options: WanLatentCachingOptions) -> str | None:
    """Return the kind of image condition that the caching options select; None for text to video."""
    if options.flf2v:
        return "flf2v"
    if options.vace:
        return VACE
    if options.bernini:
        return BERNINI
    if options.one_frame:
        return ONE_FRAME
    return "i2v" if options.i2v or options.clip is not None else None
