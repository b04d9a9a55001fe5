"""MOSS-Image, Base and SFT, described for the shared loops."""

import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from encoders import pictures
from flux_2.versions import VERSIONS
from modules.control_codes import shorten
from modules.errors import CacheError, OptionError
from modules.media.buckets import Fit, Size
from modules.media.pixels import byte_clips
from modules.options import NO_OPTIONS
from modules.text_files import looks_like_object
from moss_image import options as own
from moss_image.configs import DIT, LATENT, NOISE, RELEASE
from moss_image.files import ENCODER_SETTINGS, KEY, MossImageFiles, find_sft
from moss_image.layouts import find_layout_errors, fit_layout
from moss_image.names import LORA
from moss_image.options import EXTRAS, NAME, SHIFT, SIDE
from moss_image.schedule import snap_levels
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
from protocols.requests import Prepared, Request
from protocols.rules import GuidanceRules, ModelRelease, NegativeSkips, ReferenceRules
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section

logger = logging.getLogger(__name__)

TEXTS_AGAIN, LATENTS_AGAIN = "moss_image_cache_text_encoder_outputs.py", "moss_image_cache_latents.py"
MAX_REFERENCES = 10
DEFAULTS = pictures.image_defaults(own.STEPS, own.GUIDANCE, SIDE, flow_shift=SHIFT, extras=tuple(EXTRAS))


@dataclass(frozen=True)
class NegativeSkipChoice:
    """Which blocks the negative pass skips, and during which fraction of the steps."""

    blocks: str = own.SKIPPED
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class MossImage(pictures.ImageModelFamily):
    """Description of MOSS-Image for one run, built by the `family_for_...` functions below."""

    files: MossImageFiles
    options: Any = NO_OPTIONS  # set only in training
    schedule: str = own.OFFICIAL
    skips: NegativeSkipChoice = NegativeSkipChoice()
    isolated: bool = True  # references attend to each other alone

    noise_dtype: torch.dtype | None = torch.float32  # whatever the transformer's, as released
    draws_latents: ClassVar[bool] = False
    few_steps: ClassVar = FewSteps("Base (moss_image_base_bf16.safetensors)", also="it", adapter="")
    abilities: ClassVar = Abilities(detects_few_steps=True, adjusts_captions=True)
    lora_module: str = field(default=LORA[0].network_module, init=False)
    latent: LatentSpec = field(default=LATENT, init=False)
    noise: NoiseSpec = field(default=NOISE, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=RELEASE, init=False)
    text_keys: frozenset[str] = field(default=frozenset({KEY}), init=False)
    display_name: str = field(default=NAME, init=False)
    name: str = field(default="moss_image", init=False)
    cache_tag: str = field(default="moss", init=False)
    defaults: SamplingDefaults = field(default=DEFAULTS, init=False)
    model_metadata: ClassVar = {
        "architecture": "MOSS-Image",
        "resolution": f"{SIDE}x{SIDE}",
        "implementation": "https://github.com/OpenMOSS/MOSS-Image",
        "model_type": "moss_image",
    }

    @property
    def same_latents(self) -> frozenset[str]:
        """Return the names of FLUX.2's releases and of other families that use its encoder."""
        return list_same_latents(self.name) | {version.name for version in VERSIONS.values()}

    @property
    def references(self) -> ReferenceRules:
        """Return how many reference images the model takes, and which networks use them."""
        return ReferenceRules(max_references=MAX_REFERENCES, seen_by_text=True)

    # layouts

    def has_coordinates(self, caption: str) -> bool:
        """Return whether a caption may have coordinates in its image: whether it is a JSON object."""
        return looks_like_object(caption)

    def find_caption_errors(self, caption: str, size: Size) -> Sequence[str]:
        """Return the errors in a JSON layout for an image of this size."""
        return find_layout_errors(caption, size)

    def fit_caption(self, caption: str, size: Size, fit: Fit) -> str:
        """Return the layout with its boxes converted to pixels of the image's bucket."""
        return fit_layout(caption, size, fit)

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the captions' states, T D each, and the latents of references by condition name.

        Raises CacheError for states of another encoder or another template.
        """
        batch.check({KEY: TEXTS_AGAIN}, "the transformer")
        config = self.files.dit_header().config
        batch.check_widths({KEY: config.text_dim}, self.files.dit_path, f"{TEXTS_AGAIN} and Qwen3.5 (9B)")
        path = ENCODER_SETTINGS.find_other_template(batch)
        if path is not None:
            raise CacheError(f"{path}: the caption was encoded with another template. Run {TEXTS_AGAIN}.")
        references = pictures.get_references(batch, LATENT.channels, 1, LATENTS_AGAIN)
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
            qwen3_5_embed: States of the language model, T D for each sample.
            latents_control_0, ...: Clean latents of references, B C 1 h w each, if there are any.
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
        """Resolve a request, its noise levels, and which blocks the pass with the negative prompt skips.

        Raises OptionError if a size or a number cannot be used.
        """
        prepared = self.resolve_image(request, SHIFT)
        if prepared.request.control_images:
            if self.files.text_encoder is not None:
                self.files.check_tower()
            prepared = pictures.show_references(prepared)
        if looks_like_object(request.prompt):
            for error in find_layout_errors(request.prompt, (prepared.width, prepared.height)):
                logger.warning("the layout %s: %s", shorten(request.prompt, 40), error)
        skips = self._select_skips(request)
        prepared = replace(prepared, rules=GuidanceRules(negative_skips=skips))
        schedule = own.check_schedule(request.extra.get("moss_schedule", self.schedule))
        if schedule == own.SIMPLE or prepared.solver != "euler":
            return prepared
        levels = snap_levels(prepared.steps, prepared.flow_shift)
        num_steps = len(levels) - 1
        if num_steps < prepared.steps:
            logger.warning(
                "%d of the %d steps are used: the official noise levels are whole thousandths, and equal "
                "ones are skipped. --moss_schedule simple uses all",
                num_steps,
                prepared.steps,
            )
        return replace(prepared, steps=num_steps, sigmas=levels)

    def _select_skips(self, request: Request) -> NegativeSkips:
        """Return which blocks the pass with the negative prompt skips, and in which part of the steps."""
        blocks = own.read_blocks(request.extra.get("negative_skip_blocks", self.skips.blocks))
        missing: list[int] = []
        is_default = blocks == own.read_blocks(own.SKIPPED)
        if self.files.dit is not None:
            num_layers = self.files.dit_header().config.num_layers
            missing = sorted(block for block in blocks if block >= num_layers)
            if missing and not is_default:  # the default fits the released model
                raise OptionError(
                    f"--negative_skip_blocks {','.join(map(str, missing))}: {self.files.dit_path} has the "
                    f"blocks 0 to {num_layers - 1}"
                )
        start, end = self.skips.start, self.skips.end
        # warnings name the option only if the user changed it
        is_changed = not is_default or (start, end) != (0, 1)
        option = ""
        if blocks and is_changed:
            option = f"--negative_skip_blocks {','.join(map(str, sorted(blocks)))}"
        return NegativeSkips(blocks - frozenset(missing), start, end, option)

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Encode the references as posterior means `latents_control_0`, ..., each 1 C 1 h w."""
        area = prepared.width * prepared.height
        conditions: dict[str, Tensor | list[Tensor]] = {}
        for number, path in enumerate(prepared.request.control_images):
            frames = pictures.read_reference(path, area, LATENT.pixel_step)
            conditions[f"{CONTROL}_{number}"] = encoders.vae.encode(byte_clips(frames))
        return {0: conditions}

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the only section, with a cache for the keys and values of isolated references."""
        section = prompts[0].section(self.draw_noise(prepared, noise), inputs.get(0))
        if self.isolated and prepared.request.control_images:
            section = replace(section, overrides=Overrides(section_cache={}))
        return (yield section)


def family_for_latent_caching(options: own.MossImageLatentCachingOptions) -> MossImage:
    """Build the model description for moss_image_cache_latents.py, which needs only the VAE."""
    return MossImage(MossImageFiles().add_vae(options.vae.file))


def family_for_text_caching(options: own.MossImageTextCachingOptions) -> MossImage:
    """Build the model description for moss_image_cache_text_encoder_outputs.py: only the text encoder."""
    return MossImage(MossImageFiles().add_text(options.text))


def family_for_training(options: own.MossImageTrainingOptions) -> MossImage:
    """Build the model description for training; warn if the file name says that the model is SFT."""
    name = find_sft(options.dit)
    if name is not None:
        logger.warning(
            "--dit %s: %s says that it is SFT, which was post-trained. Base is intended for training, and "
            "its LoRAs work on SFT too",
            options.dit,
            name,
        )
    return _describe(options, options)


def family_for_generation(options: own.MossImageGenerationOptions) -> MossImage:
    """Build the model description for moss_image_generate_image.py."""
    return _describe(options, NO_OPTIONS)


def _describe(
    options: own.MossImageTrainingOptions | own.MossImageGenerationOptions, training: Any
) -> MossImage:
    """Build the model description; `training` are a training run's options, NO_OPTIONS for generation."""
    # Options that are not given get their defaults here.
    files = MossImageFiles().add_dit(options.dit, options.dit_dtype).add_vae(options.vae.file)
    return MossImage(
        files.add_text(options.text),
        training,
        schedule=options.moss_schedule or own.OFFICIAL,
        skips=NegativeSkipChoice(
            options.negative_skip_blocks or own.SKIPPED,
            options.negative_skip_start or 0.0,
            1.0 if options.negative_skip_end is None else options.negative_skip_end,
        ),
        isolated=not options.joint_references,  # references attend only to each other
    )


_: type[Family] = MossImage
