"""Krea 2, described for the shared loops."""

import logging
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from encoders import pictures
from encoders.language_encoder import LanguageEncoderSettings
from krea2 import options as own
from krea2.configs import DIT, FEW_STEPS, KREA_2, LATENT, NOISE, PATCH
from krea2.files import (
    EDIT_SETTINGS,
    KEY,
    KREA_2_SETTINGS,
    MAX_REFERENCES,
    MEGAPIXEL,
    MIXED_SETTINGS,
    Krea2Files,
    Krea2Release,
    find_release,
)
from krea2.names import LORA
from krea2.options import EXTRAS, NAME, SIDE, check_levels, check_mu
from modules.errors import CacheError, OptionError
from modules.flow.schedule import size_shift
from modules.media.pixels import to_pixels
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
)
from protocols.family import Abilities, DitSpec, Family, NoiseSource, NoiseSpec, count_image_tokens
from protocols.requests import Prepared, Request
from protocols.rules import ModelRelease, ReferenceRules
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section

logger = logging.getLogger(__name__)

TEXTS_AGAIN, LATENTS_AGAIN = "krea2_cache_text_encoder_outputs.py", "krea2_cache_latents.py"
DEFAULTS = pictures.image_defaults(28, 5.5, SIDE, extras=tuple(EXTRAS))
TURBO = replace(DEFAULTS, steps=own.TURBO_STEPS, guidance_scale=own.TURBO_GUIDANCE)
FEW_TOKENS, MANY_TOKENS = 256, 6400  # numbers of image tokens for which mu is defined


@dataclass(frozen=True)
class Krea2(pictures.ImageModelFamily):
    """Description of Krea 2 for one run, built by the `family_for_...` functions below."""

    files: Krea2Files
    options: Any = NO_OPTIONS  # set only in training
    samples_on_turbo: bool = False  # whether the transformer is the one of --turbo_dit
    references: ReferenceRules | None = None
    isolated: bool = False  # references attend to each other alone

    few_steps: ClassVar = FEW_STEPS
    draws_latents: ClassVar[bool] = False
    vae_takes_clips: ClassVar[bool] = True
    to_edit: ClassVar = "for edits, pass --edit to caching and training; else remove them"
    abilities: ClassVar = Abilities(detects_few_steps=True, sampling_dit_option="--turbo_dit")
    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=KREA_2, init=False)
    text_keys: frozenset[str] = field(default=KREA_2_SETTINGS.keys, init=False)
    display_name: str = field(default=NAME, init=False)

    @property
    def edits(self) -> bool:
        """Return whether this run edits images."""
        return self.references is not None and self.references.edits_images

    @property
    def name(self) -> str:
        """Return the name in caches and saved files, which differs for edit models."""
        return "krea2_edit" if self.edits else "krea2"

    @property
    def cache_tag(self) -> str:
        """Return the suffix of cache file names, which differs for edits."""
        return "kr2e" if self.edits else "kr2"

    @property
    def metadata(self) -> Mapping[str, str]:
        """Return the model's metadata, with its release if it is known and, for edits, the task."""
        names = {
            "architecture": "Krea-2",
            "resolution": f"{SIDE}x{SIDE}",
            "implementation": "https://github.com/krea-ai/krea-2",
            "model_type": "krea2",
        }
        release = self._find_release() if hasattr(self.options, "dit_variant") else None
        variant_metadata = {}
        if release is not None:
            variant_metadata = {own.VARIANT_KEY: own.TURBO if release.is_turbo else own.RAW}
        return self.add_file_names(names | variant_metadata | ({"task": "edit"} if self.edits else {}))

    @property
    def is_turbo(self) -> bool:
        """Return whether the transformer is Turbo, according to options, file or names."""
        if self.samples_on_turbo:
            return True
        release = self._find_release()
        return release is not None and release.is_turbo

    @property
    def defaults(self) -> SamplingDefaults:
        """Return the default size, steps and guidance of raw or Turbo."""
        return TURBO if self.is_turbo else DEFAULTS

    def _find_release(self) -> Krea2Release | None:
        """Return the release that --dit_variant specifies, or without it the one that the file shows."""
        variant = getattr(self.options, "dit_variant", None)
        if variant is not None:
            return Krea2Release(variant == own.TURBO, f"--dit_variant {variant}")
        return find_release(self.files.dit)

    def _says_raw(self) -> bool:
        release = self._find_release()
        return release is not None and not release.is_turbo

    def few_steps_evidence(self) -> str | None:
        """Return why the transformer counts as Turbo, for messages; None if it does not."""
        release = self._find_release()
        if release is None or not release.is_turbo:
            return None
        return f"{self.files.dit} is {NAME} Turbo: {release.source}"

    # encoding

    @property
    def media_identity(self) -> Mapping[str, str]:
        """Return what cached latents depend on: the VAE and, for edits, the pixel size of references."""
        if self.references is None:
            return super().media_identity
        area = "the target's" if self.references.max_area is None else str(self.references.max_area)
        return {**super().media_identity, "reference_pixels": area}

    def encode_media(self, encoders: MediaEncoders, media: MediaBatch) -> list[list[CacheEntry]]:
        """Return posterior means of images and their references, in the VAE's dtype."""
        vae = encoders.vae
        return pictures.encode_images(
            media, vae.device, lambda frames: vae.encode(to_pixels(frames)).to(vae.dtype)
        )

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the captions' states, a list of T n D, and the latents of references by condition name.

        Raises CacheError if states are from another encoder or number of layers, or if they were encoded with
        images for a run that trains without them, or the reverse.
        """
        batch.check({KEY: TEXTS_AGAIN}, "the transformer")
        config = self.files.dit_header().config
        remedy = f"{TEXTS_AGAIN} and Qwen3-VL (4B)"
        batch.check_widths({KEY: config.text_dim}, self.files.dit_path, remedy)
        for states in batch.tensors[KEY]:
            # T, number of layers, text_dim
            if states.shape[1:-1] != (config.states,):
                raise CacheError(
                    f"{batch.keys[0]}: {KEY} in its cache is {'x'.join(map(str, states.shape))}, not "
                    f"{config.states} states of each token. Cache again with {remedy}."
                )
        # Raise CacheError if captions were encoded for editing but the run does not edit, or the reverse
        path = self.files.encoder_settings.find_other_template(batch)
        if path is not None:
            how, words = ("without images", " with --edit") if self.edits else ("for edits", "")
            raise CacheError(f"{path}: the caption was encoded {how}. Run {TEXTS_AGAIN}{words}.")
        references = pictures.get_references(batch, LATENT.channels, PATCH, LATENTS_AGAIN)
        return {KEY: batch.tensors[KEY], **references}

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
            krea2_vl_embed: States of n layers of the language model, T n D for each sample.
            latents_control_0, ...: Clean latents of images to edit, B C 1 h w each, if there are any.
        """
        velocity: Tensor = dit(
            noisy,
            timesteps.float(),
            **name_text_and_mask(cond, "text", KEY, noisy.device),
            # the second text (NAG) gets the argument names of the network, too
            overrides=overrides.rename_nag(lambda text: name_text_and_mask(text, "text", KEY, noisy.device)),
            references=pictures.references_in(cond, noisy.device),
            isolated=self.isolated,
        )
        return velocity

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request: references, size, and the flow shift, which sets the noise levels.

        By default the flow shift is fixed for Turbo, and depends on the image size for the raw model.

        Raises OptionError if a size or a number cannot be used.
        """
        prepared = self.resolve_image(request, 1.0)
        if prepared.request.control_images:  # the text encoder sees the images to edit too
            if self.files.text_encoder is not None:
                self.files.check_tower()
            prepared = pictures.show_references(prepared)
        # The request's values of --mu, --y1 and --y2, which determine the flow shift, by name
        mu_values = {name: float(text) for name, text in request.extra.items() if name in EXTRAS}
        for name, mu in mu_values.items():
            check_mu(mu, f"--{name}")
        # a guidance scale of 1 turns guidance off
        if prepared.guidance_scale == (1.0,) and self._says_raw():
            logger.warning(
                "%s is raw, whose images are blurred without guidance. Pass Turbo, a LoRA that makes it "
                "Turbo, or a --guidance_scale such as %g",
                self.files.dit,
                DEFAULTS.guidance_scale,
            )
        check_levels(mu_values, request.flow_shift is not None)  # mu excludes a flow shift
        if request.flow_shift is not None:
            return prepared
        if "mu" in mu_values and len(mu_values) > 1:
            unused = " ".join(f"--{name}" for name in mu_values if name != "mu")
            logger.warning("%s is ignored because --mu %g fixes the noise levels", unused, mu_values["mu"])
        flow_shift = self._compute_flow_shift(mu_values, prepared.height, prepared.width)
        return replace(prepared, flow_shift=flow_shift)

    def _compute_flow_shift(self, mu_values: Mapping[str, float], height: int, width: int) -> float:
        """Return an image's flow shift; `mu_values` are the request's values of mu, y1 and y2."""
        if "mu" in mu_values:
            return math.exp(mu_values["mu"])
        if self.is_turbo and not mu_values:
            return math.exp(own.TURBO_MU)
        few, many = mu_values.get("y1", own.FEW_TOKENS_MU), mu_values.get("y2", own.MANY_TOKENS_MU)
        tokens = count_image_tokens(LATENT.shape(1, height, width))
        return size_shift(tokens, (FEW_TOKENS, few), (MANY_TOKENS, many))

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the references as posterior means `latents_control_0`, ..., each 1 C 1 h w."""
        area = prepared.width * prepared.height
        if self.references and self.references.max_area:
            area = self.references.max_area
        conditions: dict[str, Tensor | list[Tensor]] = {}
        for index, path in enumerate(prepared.request.control_images):
            frames = pictures.read_reference(path, area, LATENT.pixel_step)
            conditions[f"{CONTROL}_{index}"] = encoders.vae.encode(to_pixels(frames))
        return {0: conditions}

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the only section; it caches keys and values of references that do not see the image."""
        section = prompts[0].section(self.draw_noise(prepared, noise), inputs.get(0))
        if self.isolated:
            section = replace(section, overrides=Overrides(section_cache={}))
        return (yield section)


def family_for_latent_caching(options: own.Krea2LatentCachingOptions) -> Krea2:
    """Build the model description for krea2_cache_latents.py, which needs only the VAE."""
    return Krea2(Krea2Files().add_vae(options.vae.file), references=_make_rules(options, options.edit))


def family_for_text_caching(options: own.Krea2TextCachingOptions) -> Krea2:
    """Build the model description for krea2_cache_text_encoder_outputs.py: only the text encoder."""
    encoder_settings = EDIT_SETTINGS if options.edit else KREA_2_SETTINGS
    files = Krea2Files(encoder_settings=encoder_settings).add_text(options.text)
    return Krea2(files, references=_make_rules(options, options.edit))


def family_for_training(options: own.Krea2TrainingOptions, dit: Path | None = None) -> Krea2:
    """Build the model description for training; `dit` is a transformer in place of the trained one."""
    encoder_settings = EDIT_SETTINGS if options.edit else KREA_2_SETTINGS
    files = _make_files(options, encoder_settings, dit)
    return Krea2(files, options, references=_make_rules(options, options.edit), isolated=options.kv_cache)


def family_for_samples(options: own.Krea2TrainingOptions) -> Krea2 | None:
    """Build the model description for samples with --turbo_dit; None without that option.

    Raises OptionError if the file is marked as the raw model.
    """
    turbo = options.turbo_dit
    if turbo is None:
        return None
    release = find_release(turbo)
    if release is not None and not release.is_turbo:
        raise OptionError(
            f"--turbo_dit {turbo}: it is marked as raw ({release.source}), which cannot generate images in "
            "eight steps. Pass turbo.safetensors, or omit the option"
        )
    return replace(family_for_training(options, turbo), samples_on_turbo=True)


def family_for_generation(options: own.Krea2GenerationOptions) -> Krea2:
    """Build the model description for krea2_generate_image.py."""
    return Krea2(
        _make_files(options, MIXED_SETTINGS), references=_make_rules(options, None), isolated=options.kv_cache
    )


def _make_rules(options: Any, is_edit: bool | None) -> ReferenceRules | None:
    """Return the rules for reference images; None if the model takes none."""
    # `is_edit` is None for a generation, which may be an edit.
    if is_edit is False:
        return None
    area = None if getattr(options, "match_target_res", False) else MEGAPIXEL
    return ReferenceRules(
        MAX_REFERENCES, seen_by_text=True, edits_images=bool(is_edit), keeps_aspect_ratio=True, max_area=area
    )


def _make_files(
    options: own.Krea2ModelOptions, encoder_settings: LanguageEncoderSettings, dit: Path | None = None
) -> Krea2Files:
    files = Krea2Files(encoder_settings=encoder_settings).add_dit(dit or options.dit, options.dit_dtype)
    return files.add_vae(options.vae.file).add_text(options.text)


_: type[Family] = Krea2
