"""Fibo 2.0, dev and edit-turbo, described for the shared loops."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from encoders import pictures
from encoders.files import judge_distillation
from fibo_2 import options as own
from fibo_2.captions import NULL, find_caption_errors, write_caption, write_edit
from fibo_2.configs import DIT, LATENT, NOISE, RELEASE, STATES
from fibo_2.files import SAMPLE_DIT_OPTION, Fibo2Files
from fibo_2.names import LORA
from fibo_2.options import MASK, NAME, SIDE
from fibo_2.references import find_size, read_edited, read_masked, read_own_size
from fibo_2.texts import DRAWN_KEY, ENCODER_SETTINGS, KEY
from flux_2.configs import count_latents
from flux_2.versions import VERSIONS
from modules.errors import CacheError, OptionError
from modules.flow.schedule import size_shift
from modules.media.buckets import Fit, Size
from modules.media.pixels import byte_clips
from modules.options import NO_OPTIONS
from modules.text_files import looks_like_object
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
from protocols.family import Abilities, DitSpec, Family, NoiseSource, NoiseSpec
from protocols.few_steps import FewSteps
from protocols.requests import Prepared, Prompt, Request, full_patches, get_size
from protocols.rules import ModelRelease, ReferenceRules
from protocols.steps import NO_OVERRIDES, Overrides

TEXTS_AGAIN, LATENTS_AGAIN = "fibo_2_cache_text_encoder_outputs.py", "fibo_2_cache_latents.py"
MAX_REFERENCES = 4  # as released
# tokens of images, and mu of their noise levels
SHIFT_AT_FEW_TOKENS, SHIFT_AT_MANY_TOKENS = (256, 0.5), (4096, 1.15)
DRAWN_TIMES = 900.0  # noise levels in thousandths; above it, drawings are not shown yet, as in the release
PATCH = 2  # latent pixels along each side of a token, in the layout that noise is drawn in
DEFAULTS = pictures.image_defaults(own.STEPS, own.GUIDANCE, SIDE, sized_by_images=True, extras=(MASK,))
TURBO = replace(DEFAULTS, steps=own.TURBO_STEPS, guidance_scale=own.TURBO_GUIDANCE)


@dataclass(frozen=True)
class Fibo2(pictures.ImageModelFamily):
    """Description of Fibo 2.0 for one run, built by the `family_for_...` functions below."""

    files: Fibo2Files
    options: Any = NO_OPTIONS  # set only in training
    samples_on_turbo: bool = False  # whether the transformer is the one of --distilled_dit
    resizes_references: bool = True  # else each image to edit keeps its size

    noise_dtype: torch.dtype | None = torch.float32  # whatever the transformer's, as released
    draws_latents: ClassVar[bool] = False
    few_steps: ClassVar = FewSteps("dev (briaai/Fibo-2.0-dev)", also="edit-turbo", adapter="")
    abilities: ClassVar = Abilities(
        detects_few_steps=True, sampling_dit_option=SAMPLE_DIT_OPTION, adjusts_captions=True
    )
    references: ReferenceRules | None = field(
        default=ReferenceRules(MAX_REFERENCES, seen_by_text=True, text_sees_vae_input=True), init=False
    )
    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=RELEASE, init=False)
    text_keys: frozenset[str] = field(default=frozenset({KEY}), init=False)
    display_name: str = field(default=NAME, init=False)
    name: str = field(default="fibo_2", init=False)
    cache_tag: str = field(default="fibo", init=False)
    model_metadata: ClassVar = {
        "architecture": "Fibo-2.0",
        "resolution": f"{SIDE}x{SIDE}",
        "implementation": "https://github.com/huggingface/diffusers",
        "model_type": "fibo_2",
    }

    @property
    def defaults(self) -> SamplingDefaults:
        """Return the default size, steps and guidance of dev or edit-turbo."""
        return TURBO if self.is_turbo else DEFAULTS

    @property
    def is_turbo(self) -> bool:
        """Return whether the transformer is edit-turbo, which only its name shows."""
        if self.samples_on_turbo or self.files.dit is None:
            return self.samples_on_turbo
        verdict = judge_distillation(self.few_steps, self.files.dit)
        return verdict is not None and verdict.is_distilled

    @property
    def same_latents(self) -> frozenset[str]:
        """Return the names of all models that use FLUX.2's autoencoder, in this and other families."""
        return list_same_latents(self.name) | {version.name for version in VERSIONS.values()}

    # captions that are JSON objects

    def has_coordinates(self, caption: str) -> bool:
        """Return whether a caption may have coordinates in its image: whether it is a JSON object."""
        return looks_like_object(caption)

    def find_caption_errors(self, caption: str, size: Size) -> Sequence[str]:
        """Return the missing and the misspelled keys of a caption."""
        return find_caption_errors(caption)

    def fit_caption(self, caption: str, size: Size, fit: Fit) -> str:
        """Return the caption unchanged, because it has no positions in pixels."""
        return caption

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the captions' states, T n W each, and the latents of references by condition name.

        Raises CacheError for states of another encoder, other layers or another template.
        """
        batch.check({KEY: TEXTS_AGAIN}, "the transformer")
        width = self.files.dit_header().config.state_dim
        remedy = f"{TEXTS_AGAIN} and Qwen3-VL (4B)"
        batch.check_widths({KEY: width}, self.files.dit_path, remedy)
        for states in batch.tensors[KEY]:
            if states.shape[1:-1] != (len(STATES),):
                raise CacheError(
                    f"{batch.keys[0]}: {KEY} in its cache is {'x'.join(map(str, states.shape))}, not "
                    f"{len(STATES)} states of each token. Cache again with {remedy}."
                )
        path = ENCODER_SETTINGS.find_other_template(batch)
        if path is not None:
            raise CacheError(f"{path}: the caption was encoded with another template. Run {TEXTS_AGAIN}.")
        references = pictures.get_references(batch, LATENT.channels, 1, LATENTS_AGAIN)
        drawn = {DRAWN_KEY: batch.tensors[DRAWN_KEY]} if DRAWN_KEY in batch.tensors else {}
        return {KEY: batch.tensors[KEY], **drawn, **references}

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
            fibo_states: States of n layers of the language model, T n W for each sample.
            fibo_drawn_states: The same of captions whose texts the encoder saw as drawings, of length 0 where
                there are none. They replace the others up to the noise level `DRAWN_TIMES`.
            latents_control_0, ...: Clean latents of images to edit, B C 1 h w each, if there are any.
        """
        drawn = cond.get(DRAWN_KEY, ())
        if any(len(states) for states in drawn):
            chosen = [
                states_with if len(states_with) and time <= DRAWN_TIMES else states
                for states, states_with, time in zip(cond[KEY], drawn, timesteps.tolist(), strict=True)
            ]
            cond = {**cond, KEY: chosen}
        velocity: Tensor = dit(
            noisy,
            timesteps.float(),
            **name_text_and_mask(cond, "text", KEY, noisy.device),
            # the second text (NAG) gets the argument names of the network, too
            overrides=overrides.rename_nag(lambda text: name_text_and_mask(text, "text", KEY, noisy.device)),
            references=pictures.references_in(cond, noisy.device),
        )
        return velocity

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request: size, noise levels and prompts; only the positive prompt shows images to edit.

        The size determines the noise levels. Without a size, the result has the trained size nearest to the
        first image's aspect ratio. Without a negative prompt, the null caption is used. Raises OptionError
        for a prompt with invalid JSON.
        """
        request = self._select_size(self.keep_media(request, self.display_name))
        edited = request.control_images
        # reject invalid JSON before anything is computed
        check_prompt = write_edit if edited else write_caption
        check_prompt(request.prompt)
        width, height, _ = get_size(request, self.defaults)
        width, height = full_patches(width, height, LATENT)
        tokens = count_latents(LATENT.shape(1, height, width))
        shift = size_shift(tokens, SHIFT_AT_FEW_TOKENS, SHIFT_AT_MANY_TOKENS)
        prepared = self.resolve_image(request, shift, NULL)
        if edited and self.files.text_encoder is not None:
            self.files.check_tower()
        prompts = prepared.prompts[0]
        positive = self._show_images(prompts.positive, prepared)
        # an empty text is another one than the null caption, which a request without negative prompt has
        text = "" if request.negative_prompt == "" else prepared.negative_prompt
        negative = replace(prompts.negative or Prompt(NULL), text=text, is_negative=True)
        prompts = replace(prompts, positive=positive, negative=negative)
        return replace(prepared, prompts={0: prompts}, negative_prompt=text)

    def _select_size(self, request: Request) -> Request:
        """Return the request with a size; by default, the trained size that fits the first image."""
        if not request.control_images or request.width is not None or request.height is not None:
            return request

        width, height = find_size(request.control_images[0])
        return replace(request, width=width, height=height)

    def _show_images(self, prompt: Prompt, prepared: Prepared) -> Prompt:
        """Add the images to edit to the prompt; raise OptionError for a mask that does not fit."""
        paths = prepared.request.control_images
        mask = prepared.request.extra.get(MASK)
        if mask and len(paths) != 1:
            raise OptionError(
                f"--mask_path {mask}: it needs one --control_image_path, but there are {len(paths)}"
            )
        if not paths:
            return prompt
        # several images keep their trained sizes
        size = (prepared.width, prepared.height) if len(paths) == 1 else None
        prompt = replace(prompt, images=paths, image_size=size)
        if not mask and self.resizes_references:
            return prompt

        if mask:
            frames = [read_masked(paths[0], Path(mask), size if self.resizes_references else None)]
        else:
            frames = [read_own_size(path) for path in paths]
        # prompts with different pixels are equal only if these are equal
        shown = (mask, self.resizes_references)
        return replace(prompt, image_pixels=tuple(frames), media_before_text=shown)

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the images to edit as posterior means `latents_control_0`, ..., each 1 C 1 h w."""
        prompt = prepared.prompts[0].positive
        frames = prompt.image_pixels or [read_edited(path, prompt.image_size) for path in prompt.images]
        conditions: dict[str, Tensor | list[Tensor]] = {}
        for number, image in enumerate(frames):
            conditions[f"{CONTROL}_{number}"] = encoders.vae.encode(byte_clips(image[None, None]))
        return {0: conditions}

    def draw_noise(self, prepared: Prepared, noise: NoiseSource) -> Tensor:
        """Draw an image's noise, 1 C 1 h w float32, before it is packed, as released."""
        channels = LATENT.channels // PATCH**2
        _, _, _, height, width = LATENT.shape(1, prepared.height, prepared.width)
        drawn = noise.draw((1, channels, 1, PATCH * height, PATCH * width), torch.float32)
        return rearrange(drawn, "b z 1 (h ph) (w pw) -> b (z ph pw) 1 h w", ph=PATCH, pw=PATCH)


def family_for_latent_caching(options: own.Fibo2LatentCachingOptions) -> Fibo2:
    """Build the model description for fibo_2_cache_latents.py, which needs only the VAE."""
    return Fibo2(Fibo2Files().add_vae(options.vae.file))


def family_for_text_caching(options: own.Fibo2TextCachingOptions) -> Fibo2:
    """Build the model description for fibo_2_cache_text_encoder_outputs.py: only the text encoder."""
    return Fibo2(Fibo2Files().add_text(options.text))


def family_for_training(options: own.Fibo2TrainingOptions) -> Fibo2:
    """Build the model description for fibo_2_train_network.py."""
    return Fibo2(_make_files(options), options, resizes_references=not options.no_resize_control)


def family_for_samples(options: own.Fibo2TrainingOptions) -> Fibo2 | None:
    """Build the model description for samples with --distilled_dit; None if it is not given.

    Raises CheckpointError if its file is not a transformer.
    """
    if options.distilled_dit is None:
        return None
    files = replace(_make_files(options), dit=options.distilled_dit, dit_option=SAMPLE_DIT_OPTION)
    files.dit_header()
    resizes_references = not options.no_resize_control
    return Fibo2(files, options, samples_on_turbo=True, resizes_references=resizes_references)


def family_for_generation(options: own.Fibo2GenerationOptions) -> Fibo2:
    """Build the model description for fibo_2_generate_image.py."""
    return Fibo2(_make_files(options), resizes_references=not options.no_resize_control)


def _make_files(options: own.Fibo2ModelOptions) -> Fibo2Files:
    files = Fibo2Files().add_dit(options.dit, options.dit_dtype)
    return files.add_vae(options.vae.file).add_text(options.text)


_: type[Family] = Fibo2
