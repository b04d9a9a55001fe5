"""HiDream-O1-Image, described for the shared loops.

The network predicts clean pixels, and pixels are the latents. In model space they are divided by the scale of
the noise, so that the shared loops add noise with the standard deviation 1.
"""

import logging
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from encoders import pictures
from encoders.files import judge_distillation
from hidream_o1 import options as own
from hidream_o1.configs import DEV, DIT, FULL, RELEASE, VARIANTS, HiDreamO1Variant
from hidream_o1.files import HiDreamO1Files
from hidream_o1.flash import TIMES, FlashSolver, limit_noise, select_levels
from hidream_o1.names import LORA
from hidream_o1.options import NAME, SHIFT, SIDE
from hidream_o1.texts import KEY
from modules.errors import OptionError
from modules.flow.schedule import TRAIN_TIMESTEPS, make_schedule
from modules.options import NO_OPTIONS
from protocols.bundled_embeddings import WordsByFile
from protocols.data import (
    Batch,
    Conditions,
    LatentSpec,
    MediaEncoders,
    SamplingDefaults,
    name_text_and_mask,
)
from protocols.family import Abilities, DitSpec, Family, NoiseSource, NoiseSpec
from protocols.family_networks import CustomNetwork
from protocols.few_steps import FewSteps, make_transfer_target
from protocols.new_tokens import WordToLearn
from protocols.requests import Prepared, Request
from protocols.rules import ModelRelease
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section

logger = logging.getLogger(__name__)

TEXTS_AGAIN = "hidream_o1_cache_text_encoder_outputs.py"
_NO_WORDS = f"{NAME} embeds words itself and has no text encoder to add words to. Train a LoRA instead"
SMALLEST_SIGMA = 0.001  # the error of a prediction is divided by no smaller noise level, as released
FEW_STEPS = FewSteps(
    base="the full model (hidream_o1_image_bf16.safetensors)",
    also="Dev",
    adapter="",
    targets=(make_transfer_target("the full model", "hidream_o1_image_dev_bf16.safetensors"),),
    distilled_words="dev",
    undistilled_pattern="hi_?dream_?o1(?!.*dev)",
)


@dataclass(frozen=True)
class HiDreamO1(pictures.ImageModelFamily):
    """Description of HiDream-O1-Image for one run, built by the `family_for_...` functions below."""

    files: HiDreamO1Files
    options: Any = NO_OPTIONS  # set only in training
    variant: HiDreamO1Variant = FULL

    noise_dtype: torch.dtype | None = torch.float32  # whatever the network's
    draws_latents: ClassVar[bool] = False
    few_steps: ClassVar = FEW_STEPS
    abilities: ClassVar = Abilities(detects_few_steps=True)
    lora_module: str = field(default=LORA[0].network_module, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=RELEASE, init=False)
    text_keys: frozenset[str] = field(default=frozenset({KEY}), init=False)
    display_name: str = field(default=NAME, init=False)
    name: str = field(default="hidream_o1", init=False)
    cache_tag: str = field(default="ho1", init=False)
    model_metadata: ClassVar = {
        "architecture": "HiDream-O1-Image",
        "resolution": f"{SIDE}x{SIDE}",
        "implementation": "https://github.com/HiDream-ai/HiDream-O1-Image",
        "model_type": "hidream_o1",
    }

    @property
    def latent(self) -> LatentSpec:
        """Pixels, divided by the scale of the noise in model space."""
        return self.variant.latent

    @property
    def noise(self) -> NoiseSpec:
        """How training adds noise, and what its loss compares."""
        return self.variant.noise

    @property
    def defaults(self) -> SamplingDefaults:
        """Default steps, guidance and size of the variant."""
        return pictures.image_defaults(
            self.variant.steps,
            self.variant.guidance,
            SIDE,
            flow_shift=SHIFT,
            solver=self.variant.solver,
            noise_on_cpu=True,
        )

    # words of textual inversion

    def with_words(self, files: WordsByFile, option: str) -> Self:
        """Return the family; raise OptionError if a file has words, because no text encoder reads them."""
        if files:
            raise OptionError(f"{option} {' '.join(map(str, files))}: {_NO_WORDS}")
        return self

    def with_word_in_texts(self, word: WordToLearn) -> Self:
        """Raise OptionError, because there is no text encoder that could learn a word."""
        raise OptionError(f"--train_embedding {word.text}: {_NO_WORDS}")

    def word_network(self, word: WordToLearn) -> CustomNetwork:
        """Raise OptionError, because there is no text encoder that could learn a word."""
        raise OptionError(f"--train_embedding {word.text}: {_NO_WORDS}")

    # the network

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the captions' token ids, L each; raise CacheError if they are missing."""
        batch.check({KEY: TEXTS_AGAIN}, "the network")
        return {KEY: batch.tensors[KEY]}

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity in model space, B 3 1 H W float32.

        The condition is hidream_o1_ids: ids of text tokens, L for each sample. The network predicts the clean
        pixels; the velocity is the difference of the noisy ones to them, divided by the noise level.
        """
        # token ids and mask, by the names of the network's arguments
        name_inputs = partial(name_text_and_mask, argument="text", name=KEY, device=noisy.device)
        scale = self.variant.noise_scale
        pixels = noisy.float() * scale
        clean = dit(
            pixels,
            timesteps.float(),
            **name_inputs(cond),
            overrides=overrides.rename_nag(name_inputs),
        )
        sigmas = (timesteps.float() / TRAIN_TIMESTEPS).clamp(min=SMALLEST_SIGMA).view(-1, 1, 1, 1, 1)
        velocity: Tensor = (pixels - clean) / (scale * sigmas)
        return velocity

    # generation

    def prepare(self, request: Request) -> Prepared:
        """Resolve a request; without a negative prompt, guidance leads away from a space.

        The noise levels of its solver are set one by one: the network then gets exact times, and the velocity
        is divided by the noise level that the solver steps from.

        Raises:
            OptionError: If there are more steps than Dev has noise levels.
        """
        if request.solver == own.RELEASED_SOLVER:
            request = replace(request, solver=None)
        prepared = self.resolve_image(request, SHIFT)
        if self._steps_in_flashes(prepared):
            if prepared.steps > len(TIMES):
                raise OptionError(
                    f"--infer_steps {prepared.steps}: Dev has {len(TIMES)} fixed noise levels. Use fewer "
                    "steps, or --sample_solver vanilla"
                )
            if request.flow_shift is not None:
                logger.warning(
                    "--flow_shift %g is ignored because Dev's noise levels are fixed; --sample_solver "
                    "vanilla uses it",
                    request.flow_shift,
                )
            return replace(prepared, sigmas=select_levels(prepared.steps))
        schedule = make_schedule(prepared.solver, prepared.steps, prepared.flow_shift)
        return replace(prepared, sigmas=tuple(schedule.sigmas.tolist()))

    def _steps_in_flashes(self, prepared: Prepared) -> bool:
        """Return whether an image is made with Dev's own solver."""
        return self.variant is DEV and prepared.solver == DEV.solver

    def draw_noise(self, prepared: Prepared, noise: NoiseSource) -> Tensor:
        """Return an image's initial noise, 1 3 1 H W float32; that of Dev is limited."""
        drawn = super().draw_noise(prepared, noise)
        return limit_noise(drawn) if self.variant is DEV else drawn

    def sections(
        self,
        prepared: Prepared,
        prompts: Mapping[int, EncodedPrompts],
        inputs: Mapping[int, Conditions],
        noise: NoiseSource,
    ) -> Generator[Section, Tensor, Tensor]:
        """Yield the only section, for Dev with its own solver."""
        section = prompts[0].section(self.draw_noise(prepared, noise), inputs.get(0))
        if self._steps_in_flashes(prepared):
            schedule = make_schedule(prepared.solver, prepared.steps, 1.0, levels=prepared.sigmas)
            solver = FlashSolver(noise, section.noise, prepared.first_step, schedule)
            section = replace(section, solver=solver)
        return (yield section)

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Yield the pixels, limited to -1..1."""
        yield encoders.vae.decode(latents / self.latent.scale)


def family_for_latent_caching(options: own.HiDreamO1LatentCachingOptions) -> HiDreamO1:
    """Build the model description for hidream_o1_cache_latents.py, which needs no file."""
    return HiDreamO1(HiDreamO1Files())


def family_for_text_caching(options: own.HiDreamO1TextCachingOptions) -> HiDreamO1:
    """Build the model description for hidream_o1_cache_text_encoder_outputs.py: only the tokenizer."""
    return HiDreamO1(HiDreamO1Files().add_dit(options.dit, None).add_tokenizer(options.tokenizer))


def family_for_training(options: own.HiDreamO1TrainingOptions) -> HiDreamO1:
    """Build the model description for hidream_o1_train_network.py and hidream_o1_train.py."""
    variant, files = _select_variant(options), _make_files(options)
    # filled in here, because the variant is recorded and compared later, and printed commands may name a
    # network that has no tokenizer next to it
    options = replace(options, model_type=variant.name, tokenizer=files.find_tokenizer())
    return HiDreamO1(files, options, variant)


def family_for_generation(options: own.HiDreamO1GenerationOptions) -> HiDreamO1:
    """Build the model description for hidream_o1_generate_image.py."""
    return HiDreamO1(_make_files(options), variant=_select_variant(options))


def _make_files(options: own.HiDreamO1ModelOptions) -> HiDreamO1Files:
    return HiDreamO1Files().add_dit(options.dit, options.dit_dtype).add_tokenizer(options.tokenizer)


def _select_variant(options: own.HiDreamO1ModelOptions) -> HiDreamO1Variant:
    """Return the variant that --model_type or the file's names say; log it."""
    if options.model_type is not None:
        return VARIANTS[options.model_type]
    variant = FULL
    if options.dit is not None and options.dit.exists():
        verdict = judge_distillation(FEW_STEPS, options.dit)
        if verdict is not None and verdict.is_distilled:
            variant = DEV
            logger.info("--model_type %s, because %s", DEV.name, verdict.evidence)
        else:
            logger.info("--model_type %s, because no name of %s says that it is Dev", FULL.name, options.dit)
    return variant


_: type[Family] = HiDreamO1
