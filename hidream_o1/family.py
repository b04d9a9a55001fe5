"""HiDream-O1-Image, described for the shared loops.

The network predicts clean pixels, and pixels are the latents. In model space they are divided by the scale of
the noise, so that the shared loops add noise with the standard deviation 1.
"""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from checkpoints.dits import with_dtype
from encoders import pictures
from encoders.files import judge_distillation
from hidream_o1 import options as own
from hidream_o1.configs import DEV, DIT, FULL, PATCH, RELEASE, VARIANTS, HiDreamO1Variant
from hidream_o1.files import HiDreamO1Files
from hidream_o1.flash import TIMES, FlashSolver, limit_noise, select_levels
from hidream_o1.names import LORA
from hidream_o1.options import NAME, SHIFT, SIDE
from hidream_o1.references import RULES, find_own_size, make_references, show_references
from hidream_o1.texts import GRIDS_KEY, KEY, SHOWN_KEY
from modules.errors import CacheError, DatasetError, OptionError
from modules.flow.schedule import TRAIN_TIMESTEPS, make_schedule
from modules.media.pixels import byte_clips
from modules.options import NO_OPTIONS
from protocols.bundled_embeddings import WordsByFile
from protocols.data import (
    CONTROL,
    Batch,
    Conditions,
    LatentSpec,
    MediaEncoders,
    MediaTable,
    SamplingDefaults,
    name_text_and_mask,
    name_texts,
)
from protocols.family import Abilities, DitSpec, Family, NoiseSource, NoiseSpec
from protocols.family_networks import CustomNetwork
from protocols.few_steps import FewSteps, make_transfer_target
from protocols.loading import Placement
from protocols.new_tokens import WordToLearn
from protocols.requests import Prepared, Request
from protocols.rules import ModelRelease, ReferenceRules
from protocols.steps import NO_OVERRIDES, EncodedPrompts, Overrides, Section

logger = logging.getLogger(__name__)

TEXTS_AGAIN, LATENTS_AGAIN = "hidream_o1_cache_text_encoder_outputs.py", "hidream_o1_cache_latents.py"
# scale of the first noise of an edit that Dev makes by Euler's steps. Source: the released code
FLOW_MATCH_SCALE = FULL.noise_scale
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
    # what the run makes or learns, as --task; None: a generation, with or without references
    task: str | None = None
    keeps_aspect: bool = False  # a result has the aspect ratio of its only reference

    noise_dtype: torch.dtype | None = torch.float32  # whatever the network's
    draws_latents: ClassVar[bool] = False
    to_edit: ClassVar = "to learn edits, pass --task i2i; else remove them"
    few_steps: ClassVar = FEW_STEPS
    abilities: ClassVar = Abilities(detects_few_steps=True)
    lora_module: str = field(default=LORA[0].network_module, init=False)
    dit: DitSpec = field(default=DIT, init=False)
    release: ModelRelease = field(default=RELEASE, init=False)
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
    def text_keys(self) -> frozenset[str]:
        """Names of the tensors in a text cache: the ids and, for edits, what the vision tower sees."""
        return frozenset({KEY} if self.references is None else {KEY, SHOWN_KEY, GRIDS_KEY})

    @property
    def references(self) -> ReferenceRules | None:
        """Rules for references; None if the run takes none."""
        if self.task == own.T2I:
            return None
        return replace(RULES, edits_images=self.task == own.I2I)

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
            extras=tuple(own.EXTRAS),
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

    # encoding

    def check_table(self, table: MediaTable) -> None:
        """Raise DatasetError if a table has clips, or control images if and only if --task is t2i."""
        super().check_table(table)
        if self.task == own.I2I and not table.has_control:
            raise DatasetError(
                f"{table.name}: the table has no control images, and --task i2i learns edits of them. Set "
                "control_directory, or pass --task t2i."
            )

    # the network

    def load_dit(self, placement: Placement, expert: int = 0) -> nn.Module:
        """Load the network, with its vision tower if the run may have references."""
        (path,) = self.dit_files
        has_tower = self.references is not None
        return self.files.format.load(path, with_dtype(placement, self.files.dit_dtype), has_tower)

    def batch_conditions(self, latents: Tensor, batch: Batch) -> Conditions:
        """Return the captions' token ids, L each, and references: patches, and what the vision tower sees.

        Raises CacheError if something is missing, or texts were cached with other references.
        """
        batch.check(dict.fromkeys(sorted(self.text_keys), TEXTS_AGAIN), "the network")
        if self.references is None:
            return {KEY: batch.tensors[KEY]}
        references = pictures.get_references(batch, self.latent.channels, PATCH, LATENTS_AGAIN)
        number = len(references) + sum(name.startswith(CONTROL) for name in batch.undropped)
        for grids in batch.tensors[GRIDS_KEY]:
            if len(grids) != number:
                raise CacheError(
                    f"{batch.keys[0]}: its text was cached with {len(grids)} references, but it has "
                    f"{number}. Cache again with {TEXTS_AGAIN} --task i2i."
                )
        return {name: batch.tensors[name] for name in self.text_keys} | references

    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        """Predict the velocity in model space, B 3 1 H W float32.

        The network predicts the clean pixels; the velocity is the difference of the noisy ones to them,
        divided by the noise level. `cond` contains:
            hidream_o1_ids: Ids of text tokens, L for each sample.
            hidream_o1_shown: Pixels of small copies of references, n K uint8 each, if there are any.
            hidream_o1_grids: Rows and columns of their tokens, references 2 each.
            latents_control_0, ...: Clean pixels of the references, B 3 1 h w each.
        """
        name_inputs = partial(_name_text, device=noisy.device)
        scale = self.variant.noise_scale
        pixels = noisy.float() * scale
        clean = dit(
            pixels,
            timesteps.float(),
            **name_inputs(cond),
            overrides=overrides.rename_nag(name_inputs),
            references=pictures.references_in(cond, noisy.device),
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
            OptionError: If there are more steps than Dev has noise levels, or references or their boxes
                cannot be used.
            CheckpointError: If there are references, and the file has no vision tower.
        """
        paths = request.control_images
        extra = {name: request.extra[name] for name in own.EXTRAS if name in request.extra}
        boxes = own.read_boxes(extra["layout_bboxes"]) if "layout_bboxes" in extra else ()
        scheduler = own.check_scheduler(extra.get("editing_scheduler", own.FLOW_MATCH))
        self._check_edit(paths, bool(boxes))
        request = self.keep_media(request, self.display_name)
        has_own_solver = request.solver in (None, own.RELEASED_SOLVER)
        has_fixed_levels = self.variant is DEV and (has_own_solver or request.solver == DEV.solver)
        edits_by_flow = has_own_solver and self.variant is DEV and len(paths) == 1 and not boxes
        if "editing_scheduler" in extra and not edits_by_flow:
            logger.warning(
                "--editing_scheduler %s is ignored because it is for Dev with exactly one reference and its "
                "own solver",
                scheduler,
            )
        if has_own_solver:
            follows_flow = edits_by_flow and scheduler == own.FLOW_MATCH
            request = replace(request, solver="euler" if follows_flow else None)
        if paths and self.keeps_aspect:
            width, height = find_own_size(paths[0])
            request = replace(request, width=width, height=height)
        is_several = len(paths) + bool(boxes) > 1
        prepared = self.resolve_image(request, own.SHIFT_OF_SEVERAL if is_several else SHIFT)
        if paths:
            size = prepared.width, prepared.height
            side = SIDE if self.keeps_aspect else None
            prepared = show_references(prepared, make_references(paths, boxes, size, side))
        if has_fixed_levels:
            return self._set_fixed_levels(prepared)
        schedule = make_schedule(prepared.solver, prepared.steps, prepared.flow_shift)
        return replace(prepared, sigmas=tuple(schedule.sigmas.tolist()))

    def _check_edit(self, paths: Sequence[Path], has_boxes: bool) -> None:
        """Raise an error if the run, the file or the options cannot use these references."""
        if has_boxes and not paths:
            raise OptionError(
                "--layout_bboxes: there are no references for the boxes. Pass --control_image_path (--ci in "
                "a prompt line)"
            )
        if not paths:
            return
        if self.references is None:
            raise OptionError(
                "--control_image_path (--ci in a prompt line): this run has no vision tower because of "
                "--task t2i. Pass --task i2i"
            )
        self.files.check_tower()
        if self.keeps_aspect and (len(paths) > 1 or has_boxes):
            raise OptionError(
                "--keep_original_aspect needs exactly one reference, without a layout, but there are "
                f"{len(paths) + has_boxes}. Omit it"
            )

    def _set_fixed_levels(self, prepared: Prepared) -> Prepared:
        """Set the noise levels of Dev's own solvers; raise OptionError if there are too few for the steps."""
        if prepared.steps > len(TIMES):
            raise OptionError(
                f"--infer_steps {prepared.steps}: Dev has {len(TIMES)} fixed noise levels. Use fewer "
                "steps, or --sample_solver vanilla"
            )
        if prepared.request.flow_shift is not None:
            logger.warning(
                "--flow_shift %g is ignored because Dev's noise levels are fixed; --sample_solver "
                "vanilla uses it",
                prepared.request.flow_shift,
            )
        scheduler = own.FLASH if prepared.solver == DEV.solver else own.FLOW_MATCH
        return replace(prepared, sigmas=select_levels(prepared.steps), family_settings=scheduler)

    def request_conditions(self, encoders: MediaEncoders, prepared: Prepared) -> Mapping[int, Conditions]:
        """Return the pixels of the references as `latents_control_0`, ..., each 1 3 1 h w."""
        conditions: dict[str, Tensor | list[Tensor]] = {}
        for number, reference in enumerate(prepared.prompts[0].positive.media_before_text):
            frames = torch.from_numpy(reference.read())[None, None]
            conditions[f"{CONTROL}_{number}"] = encoders.vae.encode(byte_clips(frames))
        return {0: conditions}

    def draw_noise(self, prepared: Prepared, noise: NoiseSource) -> Tensor:
        """Return an image's initial noise, 1 3 1 H W float32; Dev's is limited, except that of an edit."""
        drawn = super().draw_noise(prepared, noise)
        if prepared.family_settings == own.FLOW_MATCH:
            return drawn * (FLOW_MATCH_SCALE / self.variant.noise_scale)
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
        if prepared.family_settings == own.FLASH:
            schedule = make_schedule(prepared.solver, prepared.steps, 1.0, levels=prepared.sigmas)
            solver = FlashSolver(noise, section.noise, prepared.first_step, schedule)
            section = replace(section, solver=solver)
        return (yield section)

    def decode(self, encoders: MediaEncoders, latents: Tensor) -> Iterator[Tensor]:
        """Yield the pixels, limited to -1..1."""
        yield encoders.vae.decode(latents / self.latent.scale)


def _name_text(text: Conditions, device: torch.device) -> dict[str, Tensor]:
    """Return a text's ids, mask and references by the names of the network's arguments."""
    named = name_text_and_mask(text, "text", KEY, device)
    if SHOWN_KEY in text:
        named |= name_texts(text, {"shown": SHOWN_KEY, "grids": GRIDS_KEY}, device)
    return named


def family_for_latent_caching(options: own.HiDreamO1LatentCachingOptions) -> HiDreamO1:
    """Build the model description for hidream_o1_cache_latents.py, which needs no file."""
    return HiDreamO1(HiDreamO1Files(), task=options.task)


def family_for_text_caching(options: own.HiDreamO1TextCachingOptions) -> HiDreamO1:
    """Build the model description for hidream_o1_cache_text_encoder_outputs.py: only the tokenizer."""
    files = HiDreamO1Files(takes_references=options.task == own.I2I)
    return HiDreamO1(files.add_dit(options.dit, None).add_tokenizer(options.tokenizer), task=options.task)


def family_for_training(options: own.HiDreamO1TrainingOptions) -> HiDreamO1:
    """Build the model description for hidream_o1_train_network.py and hidream_o1_train.py."""
    variant, is_edit = _select_variant(options), options.task == own.I2I
    files = replace(_make_files(options), takes_references=is_edit, needs_tower=is_edit)
    # filled in here, because the variant is recorded and compared later, and printed commands may name a
    # network that has no tokenizer next to it
    options = replace(options, model_type=variant.name, tokenizer=files.find_tokenizer())
    return HiDreamO1(files, options, variant, options.task)


def family_for_generation(options: own.HiDreamO1GenerationOptions) -> HiDreamO1:
    """Build the model description for hidream_o1_generate_image.py."""
    files = replace(_make_files(options), takes_references=options.task != own.T2I)
    return HiDreamO1(
        files,
        variant=_select_variant(options),
        task=own.T2I if options.task == own.T2I else None,
        keeps_aspect=options.keep_original_aspect,
    )


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
