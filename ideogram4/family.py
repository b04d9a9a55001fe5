"""Ideogram 4, with and without its second network, described for the shared loops."""

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from checkpoints.dits import with_dtype
from encoders import pictures
from encoders.files import judge_distillation
from ideogram4 import options as own
from ideogram4.captions import find_caption_errors, fit_caption
from ideogram4.configs import DIT, LATENT, NOISE, PAIR, RELEASE
from ideogram4.files import FIRST_TYPE, Ideogram4Files
from ideogram4.model import NetworkPair
from ideogram4.names import LORA
from ideogram4.options import LORA_FLAG, NAME, SECOND_FLAG, SIDE
from ideogram4.sampling import SAMPLERS, SamplerPreset, find_mean, make_levels
from ideogram4.texts import KEY
from modules.control_codes import shorten
from modules.errors import DatasetError, OptionError
from modules.media.buckets import Fit, Size
from modules.media.pixels import byte_clips
from modules.options import NO_OPTIONS
from modules.text_files import looks_like_object
from protocols.data import (
    Batch,
    Conditions,
    LatentSpec,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
    name_text_and_mask,
)
from protocols.family import Abilities, DitSpec, Family, NoiseSource, NoiseSpec
from protocols.few_steps import FewSteps
from protocols.loading import Placement
from protocols.requests import Prepared, Request
from protocols.rules import GuidanceRules, ModelRelease
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section

logger = logging.getLogger(__name__)

TEXTS_AGAIN = "ideogram4_cache_text_encoder_outputs.py"
INSTANT, INSTANT_STEPS = "instant", 8  # word in the name of fal's release, and its number of steps
BASE = pictures.image_defaults(own.STEPS, own.GUIDANCE, SIDE)


@dataclass(frozen=True)
class Ideogram4(pictures.ImageModelFamily):
    """Description of Ideogram 4 for one run, built by the `family_for_...` functions below."""

    files: Ideogram4Files
    options: Any = NO_OPTIONS  # set only in training
    sampler: SamplerPreset = SAMPLERS[own.DEFAULT]
    initial_sigma: float | None = None  # noise level of the first step; None: the preset's
    has_second: bool = False  # whether images are made with the second network too

    noise_dtype: torch.dtype | None = torch.float32  # whatever the transformer's, as released
    draws_latents: ClassVar[bool] = False
    few_steps: ClassVar = FewSteps(
        base="the released network (ideogram4_fp8_scaled.safetensors)",
        also="Instant and Fast",
        adapter="",
        distilled_words=f"{INSTANT}|fast",
    )
    abilities: ClassVar = Abilities(
        detects_few_steps=True,
        sampling_dit_option=SECOND_FLAG,
        join_sample_networks=NetworkPair,
        adjusts_captions=True,
    )
    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    release: ModelRelease = field(default=RELEASE, init=False)
    text_keys: frozenset[str] = field(default=frozenset({KEY}), init=False)
    display_name: str = field(default=NAME, init=False)
    name: str = field(default="ideogram4", init=False)
    cache_tag: str = field(default="i4", init=False)
    model_metadata: ClassVar = {
        "architecture": "Ideogram-4",
        "resolution": f"{SIDE}x{SIDE}",
        "implementation": "https://github.com/huggingface/diffusers",
        "model_type": "ideogram4",
        "file_model_type": FIRST_TYPE,
    }

    @property
    def guides_without_text(self) -> bool:
        """Return whether guidance leads away from a prediction without a text."""
        return self.has_second or self.files.unconditional_lora is not None

    @property
    def loads_pair(self) -> bool:
        """Return whether one network contains both: not in training, whose network is the first alone."""
        return self.has_second and self.options is NO_OPTIONS

    @property
    def dit(self) -> DitSpec:
        """Return the names inside the network, or inside both of them."""
        return PAIR if self.loads_pair else DIT

    @property
    def defaults(self) -> SamplingDefaults:
        """Return the default steps and guidance: of the preset, or of a distilled release by its name."""
        distillation = self.distillation
        if distillation is None:
            return replace(BASE, steps=self.sampler.steps)
        steps = INSTANT_STEPS if INSTANT in distillation else own.STEPS
        return replace(BASE, steps=steps, guidance_scale=1.0)

    @property
    def distillation(self) -> str | None:
        """Return what says that the transformer was distilled, in lower case; None if it was not."""
        verdict = None if self.files.dit is None else judge_distillation(self.few_steps, self.files.dit)
        return verdict.evidence.lower() if verdict is not None and verdict.is_distilled else None

    def check_named_files(self) -> None:
        """Check all model files given by options; raise UserError if one is unusable."""
        super().check_named_files()
        self.files.check_second()

    def check_files(self, media: bool) -> None:
        """Check the files that a generation needs, and the second transformer if it is given."""
        super().check_files(media)
        self.files.check_second()

    # captions that are JSON objects

    def has_coordinates(self, caption: str) -> bool:
        """Return whether a caption may have boxes: whether it is a JSON object."""
        return looks_like_object(caption)

    def find_caption_errors(self, caption: str, size: Size) -> Sequence[str]:
        """Return how a JSON caption differs from those that the model was trained with."""
        return find_caption_errors(caption)

    def fit_caption(self, caption: str, size: Size, fit: Fit) -> str:
        """Return the caption with its boxes in thousandths of the image's bucket."""
        return fit_caption(caption, size, fit)

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError for clips, for control images, and for mirrored images."""
        super().check_table(table)
        if table.flips:
            raise DatasetError(
                f"{table.name}: flip_aug mirrors images, but the boxes and texts of their captions "
                "would stay as they are. Omit flip_aug"
            )

    # the network

    @property
    def dit_files(self) -> tuple[Path, ...]:
        """Return the transformer's file; for samples of a training, the second one's, which joins it."""
        files: tuple[Path, ...] = super().dit_files
        if self.has_second and not self.loads_pair and self.files.second_path is not None:
            return (self.files.second_path,)
        return files

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the transformer of `dit_files`, in a generation with the second one in it."""
        placement = with_dtype(placement, self.files.dit_dtype)
        (path,) = self.dit_files
        second_path = self.files.second_path if self.loads_pair else None
        network: nn.Module = self.files.format.load(path, placement, self.loads_pair, second_file=second_path)
        network.spec = self.dit  # type: ignore[assignment]
        if self.files.unconditional_lora is not None:
            network.stage_files = [(self.files.unconditional_lora, LORA_FLAG)]  # type: ignore[assignment]
        return network

    def block_counts(self) -> tuple[int, ...]:
        """Return the number of blocks, of the second network too."""
        return (self.files.dit_header().config.num_layers,) * len(self.dit.block_lists)

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the text states; raise CacheError if they are missing or have another width."""
        batch.check({KEY: TEXTS_AGAIN}, "the transformer")
        width = self.files.dit_header().config.text_dim
        batch.check_widths({KEY: width}, self.files.dit_path, f"{TEXTS_AGAIN} and Qwen3-VL (8B)")
        return {KEY: batch.tensors[KEY]}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity, B C 1 H W float32.

        The condition is i4_llm_features: states of the language model, T D for each sample. Without it, the
        second network predicts.
        """
        times = 1 - timesteps.float() / 1000
        if KEY not in cond:
            alone: Tensor = dit(noisy, times, overrides=overrides)
            return -alone
        # text states and mask, by the names of the network's arguments
        name_inputs = partial(name_text_and_mask, argument="text", name=KEY, device=noisy.device)
        direction: Tensor = dit(
            noisy, times, **name_inputs(cond), overrides=overrides.rename_nag(name_inputs)
        )
        return -direction

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request: its noise levels and guidance, and which network guidance leads away from.

        Without a guidance scale of the request, the last steps of a preset have a lower one. A flow shift
        replaces the mean of the noise levels, which else depends on the preset and the size.

        Raises:
            OptionError: If a size or a number cannot be used.
        """
        prepared = self.resolve_image(request, 1.0)
        if looks_like_object(request.prompt):
            for error in find_caption_errors(request.prompt):
                logger.warning("the prompt %s: %s", shorten(request.prompt, 40), error)
        mean = find_mean(self.sampler, prepared.width, prepared.height)
        if request.flow_shift is not None:
            mean = math.log(request.flow_shift)
        levels = make_levels(prepared.steps, mean, self.sampler.std, self.initial_sigma)
        if len(set(levels)) < len(levels):
            raise OptionError(
                f"--flow_shift {math.exp(mean):g} with {prepared.steps} steps: several steps would have "
                "the same noise level. Pass a shift nearer to 1, or fewer steps"
            )
        prepared = replace(prepared, sigmas=levels, flow_shift=math.exp(mean))
        if prepared.guidance_scale != (1.0,) and not self.guides_without_text:
            logger.info(
                "Guidance leads away from the prompt %r, as there is no %s",
                shorten(prepared.negative_prompt, 40),
                SECOND_FLAG,
            )
        elif self.guides_without_text and request.negative_prompt:
            logger.warning(
                "the negative prompt %s is ignored because %s predicts without a text",
                shorten(request.negative_prompt, 40),
                SECOND_FLAG if self.has_second else LORA_FLAG,
            )
        has_final_scale = request.guidance_scale is None and prepared.guidance_scale != (1.0,)
        rules = GuidanceRules(
            negative_lora_strengths=() if self.files.unconditional_lora is None else (1.0,),
            final_steps=self.sampler.final_steps if has_final_scale else 0,
            final_scale=own.FINAL_GUIDANCE,
        )
        return replace(prepared, rules=rules)

    def draw_noise(self, prepared: Prepared, noise: NoiseSource) -> Tensor:
        """Draw an image's noise, 1 C 1 h w float32, token after token, as released."""
        _, channels, _, height, width = LATENT.shape(1, prepared.height, prepared.width)
        drawn = noise.draw((1, height * width, channels), torch.float32)
        return rearrange(drawn, "b (h w) c -> b c 1 h w", h=height)

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield an image's only run of the denoising loop; guidance by the second network has no text."""
        texts = prompts[0]
        if self.guides_without_text and texts.negative is not None:
            texts = replace(texts, negative={})
        return (yield texts.section(self.draw_noise(prepared, noise), inputs.get(0)))

    def encode_source(self, encoders: MediaEncoders, frames: Tensor, seed: int) -> Tensor:
        """Encode an image, 1 1 H W 3 uint8, to latents in model space, 1 C 1 h w."""
        return LATENT.to_model(encoders.vae.encode(byte_clips(frames)))


def family_for_latent_caching(options: own.Ideogram4LatentCachingOptions) -> Ideogram4:
    """Build the model description for ideogram4_cache_latents.py, which needs only the VAE."""
    return Ideogram4(Ideogram4Files().add_vae(options.vae.file))


def family_for_text_caching(options: own.Ideogram4TextCachingOptions) -> Ideogram4:
    """Build the model description for ideogram4_cache_text_encoder_outputs.py: only the text encoder."""
    stops = not options.warn_on_caption_issues if options.validate_caption_structure else None
    return Ideogram4(Ideogram4Files().add_text(options.text).add_caching(options.text_cache_dtype, stops))


def family_for_training(options: own.Ideogram4TrainingOptions) -> Ideogram4:
    """Build the model description for ideogram4_train_network.py and ideogram4_train.py."""
    files = _make_files(options)
    return Ideogram4(files, options, SAMPLERS[options.sampler_preset], options.initial_sigma)


def family_for_samples(options: own.Ideogram4TrainingOptions) -> Ideogram4:
    """Build the model description for samples with both networks."""
    return replace(family_for_training(options), has_second=True)


def family_for_generation(options: own.Ideogram4GenerationOptions) -> Ideogram4:
    """Build the model description for ideogram4_generate_image.py."""
    files = _make_files(replace(options, dit_dtype=options.dit_dtype or options.dtype))
    family = Ideogram4(
        files,
        sampler=SAMPLERS[options.sampler_preset],
        initial_sigma=options.initial_sigma,
        has_second=options.unconditional_dit is not None,
    )
    if INSTANT in (family.distillation or ""):
        logger.warning(
            "--dit %s: the noise levels of the Instant release are not published; those of --sampler_preset "
            "%s are used",
            options.dit,
            options.sampler_preset,
        )
    return family


def _make_files(options: own.Ideogram4TrainingOptions | own.Ideogram4GenerationOptions) -> Ideogram4Files:
    files = Ideogram4Files().add_dit(options.dit, options.dit_dtype).add_vae(options.vae.file)
    return replace(
        files.add_text(options.text),
        unconditional_dit=options.unconditional_dit,
        unconditional_lora=options.unconditional_lora,
    )


_: type[Family] = Ideogram4
