"""FLUX 3 Image Klein, base and distilled, described for the shared loops."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from encoders import pictures
from flux_2.versions import VERSIONS
from flux_3 import options as flux_3_options
from flux_3.configs import DIT, LATENT, MODALITY_BLOCK_LISTS, NOISE, RELEASE, TEXT_LENGTH_MULTIPLE
from flux_3.files import SAMPLE_DIT_OPTION, TEXT_STATES_KEY, Flux3Files
from flux_3.names import LORA
from flux_3.options import NAME, SHIFT, SIDE
from modules.errors import CacheError, OptionError
from modules.media.buckets import Size
from modules.media.pixels import byte_clips
from modules.options import NO_OPTIONS
from protocols.data import (
    CONTROL,
    Batch,
    Conditions,
    LatentSpec,
    MediaEncoders,
    SamplingDefaults,
    name_text_and_mask,
)
from protocols.families import list_same_latents
from protocols.family import Abilities, DitSpec, Family, NoiseSpec
from protocols.few_steps import FewSteps
from protocols.requests import Box, Prepared, Request
from protocols.rules import ModelRelease, ReferenceRules
from protocols.steps import NO_OVERRIDES, Overrides

logger = logging.getLogger(__name__)

TEXT_CACHING_SCRIPT, LATENT_CACHING_SCRIPT = "flux_3_cache_text_encoder_outputs.py", "flux_3_cache_latents.py"
MAX_REFERENCES = 10  # as released
BASE = pictures.image_defaults(
    flux_3_options.STEPS, flux_3_options.GUIDANCE, SIDE, flow_shift=SHIFT, sized_by_images=True
)
DISTILLED = replace(
    BASE, steps=flux_3_options.DISTILLED_STEPS, guidance_scale=flux_3_options.DISTILLED_GUIDANCE
)


@dataclass(frozen=True)
class Flux3(pictures.ImageModelFamily):
    """Description of FLUX 3 for one run, built by the `family_for_...` functions below."""

    files: Flux3Files
    options: Any = NO_OPTIONS  # set only in training

    noise_dtype: torch.dtype | None = torch.float32  # whatever the transformer's, as released
    draws_latents: ClassVar[bool] = False
    few_steps: ClassVar = FewSteps("base (flux-3-image-klein-base)", also="it", adapter="")
    abilities: ClassVar = Abilities(detects_few_steps=True, sampling_dit_option=SAMPLE_DIT_OPTION)
    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=RELEASE, init=False)
    text_keys: frozenset[str] = field(default=frozenset({TEXT_STATES_KEY}), init=False)
    display_name: str = field(default=NAME, init=False)
    name: str = field(default="flux_3", init=False)
    cache_tag: str = field(default="f3", init=False)
    model_metadata: ClassVar = {
        "architecture": "Flux.3-klein",
        "resolution": f"{SIDE}x{SIDE}",
        "implementation": "https://github.com/black-forest-labs/flux-3-image-klein",
        "model_type": "flux_3",
    }

    @property
    def is_distilled(self) -> bool:
        """Return whether the transformer is distilled, which its tensors show."""
        return self.files.dit is not None and self.files.dit_header().config.is_flow_map

    def few_steps_evidence(self) -> str | None:
        """Return why the transformer counts as distilled, for messages; None if it does not."""
        if not self.is_distilled:
            return None
        return f"{self.files.dit_path} takes the time that a step jumps to"

    @property
    def defaults(self) -> SamplingDefaults:
        """Return the default size, steps and guidance of base or of the distilled model."""
        return DISTILLED if self.is_distilled else BASE

    @property
    def same_latents(self) -> frozenset[str]:
        """Return the names of all models that use FLUX.2's autoencoder: its releases, and this model."""
        return list_same_latents(self.name) | {version.name for version in VERSIONS.values()}

    @property
    def references(self) -> ReferenceRules:
        """Return how many reference images the model takes, and which networks use them."""
        return ReferenceRules(max_references=MAX_REFERENCES)

    # the network

    def block_counts(self) -> tuple[int, ...]:
        """Return the number of blocks per modality, and the number of joint blocks."""
        config = self.files.dit_header().config
        return (*[config.mode_blocks] * len(MODALITY_BLOCK_LISTS), config.joint_blocks)

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return a training batch's text states and reference latents.

        Raises CacheError if states are from another encoder, or lack the padding of the model's training.
        """
        batch.check({TEXT_STATES_KEY: TEXT_CACHING_SCRIPT}, "the transformer")
        config = self.files.dit_header().config
        remedy = f"{TEXT_CACHING_SCRIPT} and Qwen3-VL (4B)"
        batch.check_widths({TEXT_STATES_KEY: config.text_dim}, self.files.dit_path, remedy)
        for states in batch.tensors[TEXT_STATES_KEY]:
            if len(states) % TEXT_LENGTH_MULTIPLE:
                raise CacheError(
                    f"{batch.keys[0]}: {TEXT_STATES_KEY} in its cache has {len(states)} tokens, not a "
                    f"multiple of {TEXT_LENGTH_MULTIPLE}. The transformer was trained with texts padded "
                    f"to such a length. Cache again with {remedy}."
                )
        references = pictures.get_references(batch, LATENT.channels, 1, LATENT_CACHING_SCRIPT)
        return {TEXT_STATES_KEY: batch.tensors[TEXT_STATES_KEY], **references}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, B C 1 H W float32.

        The distilled transformer predicts the mean velocity up to the end of the step, which it reads from
        `overrides.step_position`.

        `cond` contains:
            ctx_vec: States of the language model, T D for each sample.
            latents_control_0, ...: Clean latents of references, B C 1 h w each, if there are any.
        """
        next_timesteps = None
        if dit.config.is_flow_map:  # type: ignore[union-attr]
            assert overrides.step_position is not None, "trainings of the distilled model are refused"
            next_timesteps = torch.full_like(timesteps.float(), overrides.step_position.next_timestep)
        # text states and mask, by the names of the network's arguments
        name_inputs = partial(name_text_and_mask, argument="text", name=TEXT_STATES_KEY, device=noisy.device)
        velocity: Tensor = dit(
            noisy,
            timesteps.float(),
            **name_inputs(cond),
            next_timesteps=next_timesteps,
            overrides=overrides.rename_nag(name_inputs),
            references=pictures.references_in(cond, noisy.device),
        )
        return velocity

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request; without a size, the first reference image determines it.

        A single reference is put on a canvas of whole tokens, and the result is cropped to its region.
        Raises OptionError for a solver other than Euler's with the distilled model.
        """
        if self.is_distilled:
            request = self._drop_guidance_scale(request)
        request = self.keep_media(request, self.display_name)
        has_size = None not in (request.width, request.height)
        if not request.control_images or has_size:
            return self.resolve_image(request, SHIFT, "")
        (width, height), region = self._measure_reference(request.control_images)
        if request.width is not None or request.height is not None:
            region = None  # the result is not as large as the canvas, so nothing is cropped
        sized = replace(request, width=request.width or width, height=request.height or height)
        return replace(self.resolve_image(sized, SHIFT, ""), visible_region=region)

    def _drop_guidance_scale(self, request: Request) -> Request:
        """Drop the guidance scale, which a distilled model does not use, from the request."""
        if request.solver not in (None, "euler"):
            raise OptionError(
                f"--sample_solver {request.solver} with {self.files.dit_path}: the distilled model predicts "
                "the mean velocity of each step, which only Euler's method uses unchanged. Pass "
                "--sample_solver vanilla, or omit it"
            )
        if request.guidance_scale in (None, flux_3_options.DISTILLED_GUIDANCE):
            return request
        logger.warning(
            "the guidance scale %g is ignored: %s is distilled, so its guidance is built in",
            request.guidance_scale,
            self.files.dit_path,
        )
        return replace(request, guidance_scale=None)

    def _measure_reference(self, images: Sequence[Path]) -> tuple[Size, Box | None]:
        """Return the first reference's size and its region on the canvas, or None if it fills the canvas."""
        from flux_3.references import fit_image_canvas, fit_one_of_several  # only with reference images

        step = LATENT.pixel_step
        if len(images) > 1:
            return fit_one_of_several(images[0], step).bucket, None
        canvas = fit_image_canvas(images[0], step)
        fills_canvas = canvas.image == canvas.size
        return canvas.size, None if fills_canvas else Box(*canvas.corner, *canvas.image)

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the references as `latents_control_0`, ..., each 1 C 1 h w: their posteriors' means."""
        from flux_3.references import read_on_canvas, read_one_of_several  # only with reference images

        paths = prepared.request.control_images
        read = read_on_canvas if len(paths) == 1 else read_one_of_several
        conditions: dict[str, Tensor | list[Tensor]] = {}
        for number, path in enumerate(paths):
            frames = read(path, LATENT.pixel_step)
            conditions[f"{CONTROL}_{number}"] = encoders.vae.encode(byte_clips(frames))
        return {0: conditions}


def family_for_latent_caching(options: flux_3_options.Flux3LatentCachingOptions) -> Flux3:
    """Build the model description for flux_3_cache_latents.py, which needs only the VAE."""
    return Flux3(Flux3Files().add_vae(options.vae.file))


def family_for_text_caching(options: flux_3_options.Flux3TextCachingOptions) -> Flux3:
    """Build the model description for flux_3_cache_text_encoder_outputs.py: only the text encoder."""
    return Flux3(Flux3Files().add_text(options.text))


def family_for_training(options: flux_3_options.Flux3TrainingOptions) -> Flux3:
    """Build the model description for flux_3_train_network.py, which trains base."""
    return Flux3(replace(_make_files(options), needs_distilled=False), options=options)


def family_for_samples(options: flux_3_options.Flux3TrainingOptions) -> Flux3 | None:
    """Build the model description for samples with the model of --distilled_dit; None if it is not given.

    Raises OptionError if the file is a base model.
    """
    if options.distilled_dit is None:
        return None
    files = replace(
        _make_files(options), dit=options.distilled_dit, dit_option=SAMPLE_DIT_OPTION, needs_distilled=True
    )
    files.dit_header()
    return Flux3(files, options=options)


def family_for_generation(options: flux_3_options.Flux3GenerationOptions) -> Flux3:
    """Build the model description for flux_3_generate_image.py."""
    return Flux3(_make_files(options))


def _make_files(
    options: flux_3_options.Flux3TrainingOptions | flux_3_options.Flux3GenerationOptions,
) -> Flux3Files:
    files = Flux3Files().add_dit(options.dit, options.dit_dtype)
    return files.add_vae(options.vae.file).add_text(options.text)


_: type[Family] = Flux3
