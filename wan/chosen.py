"""Choices of the options, in the words of `wan.family.Wan`: files, tasks, boundaries, dtypes."""

import logging
from collections.abc import Mapping
from typing import Any

import torch

from modules.contract.data import LatentSpec
from modules.devices import choose_compute_dtype
from modules.errors import OptionError
from wan.configs import TASKS, WanTask
from wan.files import WanFiles
from wan.options import WanGenerationOptions, WanLatentCachingOptions, WanTrainingOptions
from wan.releases import add_release, check_names, read_release
from wan.vae_releases import WAN_2_1, WAN_2_2

logger = logging.getLogger(__name__)


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
