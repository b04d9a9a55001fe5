"""Qwen-Image-2.1, described for the shared loops."""

import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from encoders import pictures
from modules.errors import OptionError
from modules.flow.schedule import size_shift, stretch_levels
from modules.options import NO_OPTIONS
from protocols.data import (
    CONTROL,
    Batch,
    CacheEntry,
    Conditions,
    LatentSpec,
    MediaBatch,
    MediaEncoders,
    SamplingDefaults,
    name_text_and_mask,
    name_texts,
)
from protocols.family import Abilities, DitSpec, Family, NoiseSource, NoiseSpec
from protocols.requests import Prepared, Request
from protocols.rules import ModelRelease, ReferenceRules
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section
from qwen_image.options import MASK
from qwen_image.references import fill_size
from qwen_image_21 import options as own
from qwen_image_21.caches import (
    LATENTS_AGAIN,
    SLOTS,
    TEXTS_AGAIN,
    add_hashes,
    check_references,
    check_states,
)
from qwen_image_21.configs import DIT, FEW_STEPS, LATENT, NOISE, QWEN_IMAGE_21, count_tokens
from qwen_image_21.files import ENCODER_SETTINGS, KEY, MAX_REFERENCES, QwenImage21Files, find_turbo
from qwen_image_21.names import LORA
from qwen_image_21.options import NAME, SIDE, STEPS
from qwen_image_21.references import add_reference_images, read_edit_reference, read_reference

logger = logging.getLogger(__name__)

SOLVER = "euler-terminal"  # Euler's steps, at the noise levels of the release
TERMINAL = 0.02  # the last noise level above 0. Source: the release's scheduler
DEFAULTS = pictures.image_defaults(STEPS, 1.0, SIDE, extras=(MASK,))
# how far the schedule is shifted, by the number of tokens of an image: exp(mu), mu on a line through these.
# Source: the release's scheduler
SHIFT_AT_FEW_TOKENS, SHIFT_AT_MANY_TOKENS = (256, 0.5), (8192, 0.9)
REFERENCES = ReferenceRules(
    MAX_REFERENCES, step=LATENT.pixel_step, seen_by_text=True, text_sees_vae_input=True
)


@dataclass(frozen=True)
class QwenImage21(pictures.ImageModelFamily):
    """Description of Qwen-Image-2.1 for one run, built by the `family_for_...` functions below."""

    files: QwenImage21Files
    options: Any = NO_OPTIONS  # set only in training
    edit: own.QwenImage21ReferenceOptions = own.QwenImage21ReferenceOptions()
    caches_prefix: bool = True  # keys and values of prompts and references are computed once for all steps

    few_steps: ClassVar = FEW_STEPS
    abilities: ClassVar = Abilities(detects_few_steps=True)
    lora_module: str = field(default=LORA[0].network_module, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=QWEN_IMAGE_21, init=False)
    text_keys: frozenset[str] = field(default=ENCODER_SETTINGS.keys, init=False)
    name: str = field(default="qwen_image_21", init=False)
    cache_tag: str = field(default="qi21", init=False)
    display_name: str = field(default=NAME, init=False)
    references: ReferenceRules | None = field(default=REFERENCES, init=False)

    @property
    def latent(self) -> LatentSpec:
        """Latent space with as many channels as the files of the run have."""
        channels = self.files.channels
        return LATENT if channels in (None, LATENT.channels) else replace(LATENT, channels=channels)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return the model's metadata."""
        return self.add_file_names(
            {
                "architecture": NAME,
                "resolution": f"{SIDE}x{SIDE}",
                "implementation": "https://github.com/QwenLM/Qwen-Image",
                "model_type": self.name,
            }
        )

    @property
    def defaults(self) -> SamplingDefaults:
        """Return the default size, steps and guidance; Turbo, a distilled model, has fixed steps."""
        turbo = find_turbo(self.files.dit)
        return DEFAULTS if turbo is None else replace(DEFAULTS, steps=len(turbo.levels))

    def few_steps_evidence(self) -> str | None:
        """Return why the transformer counts as Turbo, for messages; None if it does not."""
        turbo = find_turbo(self.files.dit)
        return None if turbo is None else f"{self.files.dit} is {NAME} Turbo: {turbo.source}"

    # encoding

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return posterior means of images and references in the VAE's dtype, and hashes of references."""
        vae = encoders.vae
        entries = pictures.encode_images(
            media, vae.device, lambda frames: vae.encode(all_channels(frames)).to(vae.dtype)
        )
        return add_hashes(entries, media)

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the captions' states, the references' latents, and each reference's position in the text.

        Raises CacheError if the states are from another encoder or were taken after the final norm, or if
        the text encoder saw other references.
        """
        batch.check({KEY: TEXTS_AGAIN, SLOTS: TEXTS_AGAIN}, "the transformer")
        config = self.files.dit_header().config
        batch.check_widths({KEY: config.text_dim}, self.files.dit_path, f"{TEXTS_AGAIN} and Qwen3-VL (8B)")
        for cache in batch.cache_origins:
            check_states(cache, ENCODER_SETTINGS.name)
        references = pictures.get_references(batch, self.latent.channels, 1, LATENTS_AGAIN)
        check_references(batch, references)
        return {KEY: batch.tensors[KEY], SLOTS: batch.tensors[SLOTS], **references}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, B C 1 H W float32.

        `cond` contains:
            vl_embed: States of the language model, T D for each sample.
            image_slots: Number of text tokens before each of n references, n for each sample.
            latents_control_0, ...: Clean latents of the references, B C 1 h w each.
        """

        def named(text: Conditions) -> dict[str, Tensor]:
            """Return a text's states, mask and slots by the names of the network's arguments."""
            # slots are used as Python numbers, so they stay on the CPU
            slots = name_texts(text, {"slots": SLOTS}, torch.device("cpu"))
            return {**name_text_and_mask(text, "text", KEY, noisy.device), **slots}

        velocity: Tensor = dit(
            noisy,
            timesteps.float(),
            **named(cond),
            overrides=overrides.rename_nag(named),
            references=pictures.references_in(cond, noisy.device),
        )
        return velocity

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request; noise levels depend on the flow shift, and its default on the image size.

        Raises OptionError if a size or a number cannot be used, or guidance has no negative prompt.
        """
        self._check_guidance(request)
        prepared = self.resolve_image(fill_size(request), 1.0)
        if prepared.request.control_images and self.files.text_encoder is not None:
            self.files.check_tower()
        prepared = add_reference_images(prepared, self.edit)
        shift = request.flow_shift
        if shift is None:
            tokens = count_tokens(LATENT.shape(1, prepared.height, prepared.width))
            shift = size_shift(tokens, SHIFT_AT_FEW_TOKENS, SHIFT_AT_MANY_TOKENS)
        turbo = find_turbo(self.files.dit)  # recognized by its file
        if turbo is not None and prepared.steps == len(turbo.levels):
            levels = stretch_levels(torch.tensor(turbo.levels, dtype=torch.float64), shift, TERMINAL)
            return replace(prepared, flow_shift=shift, sigmas=(*levels.tolist(), 0.0))
        if turbo is not None:
            logger.warning(
                "Turbo was distilled for its own %d noise levels: with %d steps they are evenly spaced, "
                "which makes images worse",
                len(turbo.levels),
                prepared.steps,
            )
        if request.flow_shift is not None:
            return prepared
        solver = SOLVER if prepared.solver == "euler" else prepared.solver
        return replace(prepared, flow_shift=shift, solver=solver)

    def _check_guidance(self, request: Request) -> None:
        scale = request.guidance_scale
        if scale is not None and scale != 1 and request.negative_prompt is None:
            raise OptionError(
                f"--guidance_scale {scale:g} (--l in a prompt line): {NAME} is intended for 1, without "
                "guidance. Other values need a --negative_prompt (--n in a prompt line); it may be empty"
            )

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the images to edit as posterior means `latents_control_0`, ..., each 1 C 1 h w."""
        fits = self.edit.resize_control_to_image_size
        target = (prepared.width, prepared.height) if fits else None
        conditions: dict[str, Tensor | list[Tensor]] = {}
        for index, path in enumerate(prepared.request.control_images):
            frames = read_reference(path, target)[None, None]
            conditions[f"{CONTROL}_{index}"] = encoders.vae.encode(all_channels(frames))
        return {0: conditions}

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode an image, 1 1 H W C uint8, in model space, 1 C 1 h w; `seed` is unused."""
        latents: Tensor = encoders.vae.encode(all_channels(frames))
        return latents

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the request's only denoising section; with a mask, the first image is kept outside of it.

        Without --no_kv_cache, keys and values of texts and references are computed in the first step only.
        """
        section = prompts[0].section(self.draw_noise(prepared, noise), inputs.get(0))
        first = inputs.get(0, {}).get(f"{CONTROL}_0")
        if isinstance(first, Tensor):
            section = replace(section, edit_reference=read_edit_reference(prepared, first))
        if self.caches_prefix:
            # an empty cache, which the network fills in the first step
            section = replace(section, overrides=Overrides(section_cache={}))
        return (yield section)


def all_channels(frames: Tensor) -> Tensor:
    """View B F H W C uint8 as B C F H W, with the alpha channel if there is one."""
    return frames.movedim(-1, 1)


def family_for_latent_caching(options: own.QwenImage21LatentCachingOptions) -> QwenImage21:
    """Build the model description for qwen_image_21_cache_latents.py, which needs only the VAE."""
    return QwenImage21(QwenImage21Files().add_vae(options.vae.file))


def family_for_text_caching(options: own.QwenImage21TextCachingOptions) -> QwenImage21:
    """Build the model description for qwen_image_21_cache_text_encoder_outputs.py: only the text encoder."""
    return QwenImage21(QwenImage21Files().add_text(options.text))


def family_for_training(options: own.QwenImage21TrainingOptions) -> QwenImage21:
    """Build the model description for qwen_image_21_train_network.py."""
    return QwenImage21(_make_files(options, options.dit_dtype), options)


def family_for_generation(options: own.QwenImage21GenerationOptions) -> QwenImage21:
    """Build the model description for qwen_image_21_generate_image.py."""
    files = _make_files(options, options.dit_dtype or options.dtype)
    return QwenImage21(files, edit=options.references, caches_prefix=not options.no_kv_cache)


def _make_files(options: own.QwenImage21ModelOptions, dtype: str | None) -> QwenImage21Files:
    files = QwenImage21Files().add_dit(options.dit, dtype).add_config(options.dit_config)
    return files.add_vae(options.vae.file).add_text(options.text)


_: type[Family] = QwenImage21
