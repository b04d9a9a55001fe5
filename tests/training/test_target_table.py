"""Every target with every other one, and with whatever a sample may carry: by hand, or refused by name."""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from modules.errors import OptionError
from modules.options import Options
from protocols.data import AUDIO_LATENTS, HAS_AUDIO, Batch, Conditions
from protocols.family import Abilities
from protocols.steps import NO_OVERRIDES, Overrides
from runtime.run_blocks import get_runner
from tests.training import toy
from tests.training.toy_images import train_image_toy, write_subset
from training.features.blank_prior import BlankPriorOptions, run_blank_pass
from training.features.guided import GuidedTarget, GuidedTargetOptions, with_guided_target
from training.features.hooks import Tally
from training.features.ip_noise import IpNoiseOptions
from training.features.mask_prior import MaskPriorOptions, compare_outside_masks
from training.features.output_preservation import preserve
from training.features.preference import PreferenceOptions
from training.features.preference_pairs import Preference, pair_passes
from training.features.slider import SliderOptions
from training.features.slider_file import Slider, SliderFile
from training.features.slider_passes import SliderTarget, slider_passes
from training.features.teacher_options import TeacherOptions
from training.features.teacher_passes import Band, TeacherComparison, TeacherTarget, predict_as_base_model
from training.features.tread import TreadOptions, check_tread
from training.features.tread_runner import Route, bypassing_blocks
from training.learning_options import PRESERVE_OUTPUT
from training.loss import MASK, LossRule, NoisyAudio, NoisyBatch
from training.noise_options import L2, LossOptions
from training.options import TrainedNetworkOptions, TrainingOptions
from training.targets.passes import TrainingPasses, compare_with_clip, loss_passes, run_usual_pass

# of a run: what a network learns towards, and which tokens take part
TARGETS = (
    "guided",
    "teacher",
    "mask_prior_weight",
    "blank_prior_weight",
    "preference",
    "slider",
    "tread",
)
# of samples and batches, and of how errors are measured
CARRIED = (
    "preserved",
    "masks",
    "weights",
    "network_multiplier",
    "has_empty_text",
    "num_clean_frames",
    "perturbation",
    "audio",
    "loss_type",
)
ALL = (*TARGETS, *CARRIED)
WORDS = {
    "guided": ("--guided_target", 3),
    "teacher": ("--teacher", "base"),
    "mask_prior_weight": ("--mask_prior_weight", 1),
    "blank_prior_weight": ("--blank_prior_weight", 1),
    "preference": ("--preference", 2000),
    "slider": ("--slider", "slider.toml"),
}
ONLY = "--network_train_unet_only"
PRESERVED = "custom_attributes.diff_output_preservation = true"
REJECTED = {
    ("guided", "teacher"): "both choose what is learned instead of the clip",
    **{(name, "preference"): "has no place for another target" for name in TARGETS[:4]},
    **{(name, "slider"): "a slider learns from its captions alone" for name in TARGETS[:5]},
    ("preference", "preserved"): "cannot be used with --preference",
    ("slider", "preserved"): "cannot be used with --slider",
    ("slider", "network_multiplier"): "cannot be used with --slider",
    ("tread", "audio"): "second stream, for audio",
}
SHAPE = (4, toy.LATENT.channels, 2, 2, 2)
LEVELS = (0.8, 0.3, 0.6, 0.45)
AUDIO_LEVELS = (0.35, 0.7, 0.2, 0.9)
TEXTS = (0.3, -0.4, 0.9, 0.2)
EMPTY = -0.7
GUIDED = GuidedTarget(scale=3.0, audio_scale=2.0, lowest_level=0.4)
TEACHER = TeacherTarget(0.25, band=Band(0.0, 0.5), anchor_weight=0.5)
MASK_PRIOR, BLANK_PRIOR, MULTIPLIER, ROUTED = 0.6, 0.8, -0.5, 1.5
PREFERENCE = Preference(beta=2.0, data_weight=0.3)
SLIDER = Slider("red", "blue", "a thing", anchor="a dog", weight=0.7, anchor_weight=0.4)
CAPTIONS = {"red": 0.5, "blue": -0.2, "a thing": 0.1, "a dog": 1.1}
GUIDANCE = 2.0


class Linear(nn.Module):
    """The base model and what a network adds to it, a product each; `strength` is that of the network."""

    spec = toy.ToyDit.spec

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.strength = 1.0

    def forward(self, noisy: Tensor, texts: Tensor) -> Tensor:
        output = predicted(noisy, texts, self.strength)
        is_routed = get_runner(self) is not PLAIN_RUNNER
        return output * ROUTED if is_routed else output


def predicted(noisy: Tensor, texts: Tensor, strength: float) -> Tensor:
    """noisy: B ...; texts: B."""
    text = texts.view(-1, *[1] * (noisy.ndim - 1))
    return 0.7 * noisy + 0.4 * text + strength * (0.3 * noisy - 0.9 * text)


PLAIN_RUNNER = get_runner(Linear())


@dataclass(frozen=True)
class LinearFamily(toy.ToyFamily):
    def predict(
        self,
        dit: nn.Module,
        noisy: Tensor,
        timesteps: Tensor,
        cond: Conditions,
        overrides: Overrides = NO_OVERRIDES,
    ) -> Tensor:
        return dit(noisy, torch.stack([text.mean() for text in cond["letters"]]))


def having(names: tuple[str, ...], name: str) -> tuple[bool, ...]:
    """Which of the four samples have it: with two things all four combinations are in the batch."""
    patterns = ((True, True, False, False), (True, False, True, False), (True, False, False, True))
    return patterns[names.index(name)] if name in names else (False,) * 4


def make_batch(names: tuple[str, ...]) -> NoisyBatch:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    is_empty = having(names, "has_empty_text")
    texts = [EMPTY if empty else text for text, empty in zip(TEXTS, is_empty, strict=True)]
    tensors: dict[str, Any] = {
        "latents": draw(*SHAPE),
        "letters": [torch.full((1, 1), text) for text in texts],
    }
    if "masks" in names or "mask_prior_weight" in names:
        mask = torch.ones(4, 2, 2)
        for index, masked in enumerate(having(names, "masks")):
            if masked or "masks" not in names:
                mask[index] = torch.tensor([[0.25, 1.0], [0.0, 0.5]])
        tensors[MASK] = mask
    audio = None
    if "audio" in names:
        tensors[AUDIO_LATENTS] = draw(4, 3, 5, 1)
        tensors[HAS_AUDIO] = torch.tensor(having(names, "audio"))
        sigmas = torch.tensor(AUDIO_LEVELS)
        weights = tensors[HAS_AUDIO].float() * 0.9
        audio = NoisyAudio(draw(4, 3, 5, 1), sigmas, 1000 * sigmas, weights, AUDIO_LEVELS)
    batch = Batch(
        tensors,
        captions=("a",) * 4,
        keys=("a",) * 4,
        attributes=tuple(frozenset({PRESERVE_OUTPUT} if has else ()) for has in having(names, "preserved")),
        empty_text={"letters": [torch.full((1, 1), EMPTY)] * 4},
        has_empty_text=is_empty if "has_empty_text" in names else (),
        rejected=draw(*SHAPE) if "preference" in names else None,
        network_multiplier=MULTIPLIER if "network_multiplier" in names else 1.0,
    )
    sigmas = torch.tensor(LEVELS)
    weights = torch.tensor([2.0 if weighted else 1.0 for weighted in having(names, "weights")])
    return NoisyBatch(
        batch,
        noise=draw(*SHAPE),
        sigmas=sigmas,
        timesteps=1000 * sigmas,
        weights=weights,
        levels=LEVELS,
        num_clean_frames=1 if "num_clean_frames" in names else 0,
        perturbation=0.2 * draw(*SHAPE) if "perturbation" in names else None,
        audio=audio,
    )


def losses_of(names: tuple[str, ...], noisy_batch: NoisyBatch) -> Tensor:
    """The loss of the passes, which is compared with that by hand."""
    dit = Linear()

    @contextlib.contextmanager
    def at_strength(strength: float) -> Iterator[None]:
        before = dit.strength
        dit.strength = strength
        yield
        dit.strength = before

    family = LinearFamily()
    changes: dict[str, Any] = {
        "guided": partial(with_guided_target, GUIDED),
        "mask_prior_weight": partial(compare_outside_masks, MASK_PRIOR),
        "teacher": TeacherComparison(TEACHER, predict_as_base_model).compare,
    }
    rule = LossRule(
        LossOptions.from_defaults(loss_type="l1") if "loss_type" in names else L2,
        as_base=lambda: at_strength(0.0),
        list_comparisons=toy.around(
            compare_with_clip, preserve, *(change for name, change in changes.items() if name in names)
        ),
    )
    if "blank_prior_weight" in names:
        run_passes = toy.around(run_usual_pass, partial(run_blank_pass, BLANK_PRIOR))
        rule = replace(rule, run_passes=run_passes)
    if "preference" in names:
        pairs = partial(pair_passes, PREFERENCE, Tally(("a", "b", "c")))
        rule = replace(rule, run_passes=toy.around(run_usual_pass, pairs))
    if "tread" in names:
        route = Route(0, -1, lambda grid: torch.zeros(1))

        def predict(passes: TrainingPasses, noisy_batch: NoisyBatch) -> Tensor:
            with bypassing_blocks(passes.dit, route):
                return passes.predict(noisy_batch)

        rule = replace(rule, predict=predict)
    if "slider" in names:
        encoded = {text: {"letters": torch.full((1, 1), value)} for text, value in CAPTIONS.items()}
        target = SliderTarget(SliderFile(GUIDANCE, (SLIDER,)), encoded, frozenset({"letters"}))
        sliders = partial(slider_passes, target, at_strength)
        rule = replace(rule, run_passes=toy.around(run_usual_pass, sliders))
    with at_strength(noisy_batch.batch.network_multiplier):
        passes = loss_passes(family, dit, noisy_batch, contextlib.nullcontext, rule)
        return sum((stream for streams in passes for stream in streams), torch.zeros(()))


class ByHand:
    """The same numbers from the formulas of docs/targets.md, stream by stream."""

    def __init__(self, names: tuple[str, ...], noisy_batch: NoisyBatch) -> None:
        self.names = names
        self.noisy_batch = noisy_batch
        self.batch = noisy_batch.batch
        self.strength = self.batch.network_multiplier
        self.preserved = self.column(having(names, "preserved"))
        self.texts = torch.stack([text.mean() for text in self.batch.tensors["letters"]])  # type: ignore[arg-type]
        self.empty = torch.full((4,), EMPTY)

    @staticmethod
    def column(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).view(-1, 1)

    def error(self, difference: Tensor) -> Tensor:
        return difference.abs() if "loss_type" in self.names else difference.square()

    def learned(self, noisy: Tensor, texts: Tensor, strength: float) -> Tensor:
        return predicted(noisy, texts, strength) * (ROUTED if "tread" in self.names else 1.0)

    def streams(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]]:
        """Of each stream: noised input and velocity, B N; how much places count; weights; levels; scale."""
        noisy_batch, given = self.noisy_batch, self.noisy_batch.num_clean_frames
        latents = toy.LATENT.to_model(self.batch.tensor("latents"))
        share = noisy_batch.sigmas.view(-1, 1, 1, 1, 1)
        noise = noisy_batch.noise
        seen = noise if noisy_batch.perturbation is None else noise + noisy_batch.perturbation
        noisy = ((1 - share) * latents + share * seen)[:, :, given:].flatten(1)
        velocity = (noise - latents)[:, :, given:].flatten(1)
        mask = self.batch.tensors.get(MASK, torch.ones(4, 2, 2))
        places = mask.view(4, 1, 1, 2, 2).expand(SHAPE)[:, :, given:].flatten(1)  # type: ignore[union-attr]
        rows = [(noisy, velocity, places, noisy_batch.weights, self.column(LEVELS), GUIDED.scale)]
        audio = noisy_batch.audio
        if audio is not None:
            heard = self.batch.tensor(AUDIO_LATENTS).flatten(1)
            level = self.column(AUDIO_LEVELS)
            rows.append(
                (
                    (1 - level) * heard + level * audio.noise.flatten(1),
                    audio.noise.flatten(1) - heard,
                    torch.ones_like(heard),
                    audio.weights,
                    level,
                    GUIDED.audio_scale,
                )
            )
        return rows

    def loss(self) -> Tensor:
        if "preference" in self.names:
            return self.of_pairs()
        if "slider" in self.names:
            return self.of_sliders()
        return torch.stack([self.of_stream(index) for index in range(len(self.streams()))]).sum()

    def of_stream(self, index: int) -> Tensor:
        noisy, velocity, places, weights, levels, scale = self.streams()[index]
        output = self.learned(noisy, self.texts, self.strength)
        base = predicted(noisy, self.texts, 0.0)
        target = velocity
        if "guided" in self.names:
            away = predicted(noisy, self.empty, self.strength)
            is_empty = self.column(having(self.names, "has_empty_text"))
            counts = (levels >= GUIDED.lowest_level) * (1 - is_empty)
            target = velocity + counts * (away + scale * (velocity - away) - velocity)
        target = self.preserved * base + (1 - self.preserved) * target
        errors = (places * self.error(output - target)).mean(1)
        against_base = (places * self.error(output - base)).mean(1)
        if "teacher" in self.names:
            taught = 1 - self.preserved[:, 0]
            # the levels of the picture say what the teacher knows
            inside = (self.column(LEVELS)[:, 0] <= 0.5).float()
            factor = inside + (1 - inside) * TEACHER.anchor_weight
            share = taught * TEACHER.weight
            errors = (1 - share) * errors + share * factor * against_base
        if "mask_prior_weight" in self.names and index == 0:
            errors = errors + MASK_PRIOR * ((1 - places) * self.error(output - base)).mean(1)
        if "blank_prior_weight" in self.names:
            blank = self.learned(noisy, self.empty, self.strength) - predicted(noisy, self.empty, 0.0)
            errors = errors + BLANK_PRIOR * self.error(blank).mean(1)
        return (weights * errors).mean()

    def of_pairs(self) -> Tensor:
        """Errors of the better and the worse one, with sound both in one."""
        sums = {"learned": [torch.zeros(4), torch.zeros(4)], "base": [torch.zeros(4), torch.zeros(4)]}
        rejected = replace(self.noisy_batch, batch=replace(self.batch, tensors=self.rejected_tensors()))
        for place, noisy_batch in enumerate((self.noisy_batch, rejected)):
            own = ByHand(self.names, noisy_batch)
            for index, (noisy, velocity, places, *_) in enumerate(own.streams()):
                counts = torch.ones(4) if index == 0 else self.batch.tensor(HAS_AUDIO).float()
                learned = self.error(self.learned(noisy, self.texts, self.strength) - velocity)
                frozen = self.error(predicted(noisy, self.texts, 0.0) - velocity)
                sums["learned"][place] += counts * (places * learned).mean(1)
                sums["base"][place] += counts * (places * frozen).mean(1)
        (better, other), (base_better, base_other) = sums["learned"], sums["base"]
        margin = (base_better - better) + (other - base_other)
        losses = -torch.nn.functional.logsigmoid(PREFERENCE.beta / 2 * margin)
        return (self.noisy_batch.weights * (losses + PREFERENCE.data_weight * better)).mean()

    def rejected_tensors(self) -> dict[str, Any]:
        assert self.batch.rejected is not None
        return {**self.batch.tensors, "latents": self.batch.rejected}

    def of_sliders(self) -> Tensor:
        total = torch.zeros(())
        positive, negative, neutral, dog = (torch.full((4,), CAPTIONS[text]) for text in CAPTIONS_IN_ORDER)
        for noisy, _, places, weights, *_ in self.streams():
            change = predicted(noisy, positive, 0.0) - predicted(noisy, negative, 0.0)
            for strength in (1.0, -1.0):
                aim = predicted(noisy, neutral, 0.0) + strength * GUIDANCE * change
                pulled = self.error(self.learned(noisy, neutral, strength) - aim)
                held = self.error(self.learned(noisy, dog, strength) - predicted(noisy, dog, 0.0))
                errors = 0.5 * pulled + SLIDER.anchor_weight * held
                total = total + (weights * SLIDER.weight * (places * errors).mean(1)).mean()
        return total


CAPTIONS_IN_ORDER = ("red", "blue", "a thing", "a dog")
PAIRS = [(name,) for name in ALL] + [*itertools.combinations(ALL, 2)]
COMPUTED = [names for names in PAIRS if names not in REJECTED]


@pytest.mark.parametrize("names", COMPUTED, ids="-".join)
def test_two_things_together_have_the_loss_of_both_formulas(names: tuple[str, ...]) -> None:
    noisy_batch = make_batch(names)

    torch.testing.assert_close(losses_of(names, noisy_batch), ByHand(names, noisy_batch).loss())


@pytest.mark.parametrize("name", ALL)
def test_three_things_together_have_the_loss_of_all_formulas(name: str) -> None:
    """Of three things some samples of the batch have all, and some only one."""
    further = [names for names in COMPUTED if len(names) == 2 and name not in names]
    for pair in further:
        names = (name, *pair)
        if any(two in REJECTED for two in itertools.permutations(names, 2)):
            continue
        noisy_batch = make_batch(names)
        loss, expected = losses_of(names, noisy_batch), ByHand(names, noisy_batch).loss()
        torch.testing.assert_close(loss, expected, msg=f"the losses of {names} differ")


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("preference", "slider")])
def test_preserved_samples_stay_with_the_base_model_whatever_else_is_asked(name: str) -> None:
    """Where all samples are preserved, a loss is only what the network does differently."""
    names = (name,) if name == "preserved" else ("preserved", name)
    noisy_batch = make_batch(names)
    preserved = replace(
        noisy_batch, batch=replace(noisy_batch.batch, attributes=(frozenset({PRESERVE_OUTPUT}),) * 4)
    )
    still = replace(preserved, batch=replace(preserved.batch, network_multiplier=0.0))

    loss = losses_of(names, still)
    assert (loss > 0) == (name == "tread")  # whose output is not the base model's


@pytest.mark.parametrize(("names", "message"), REJECTED.items(), ids=str)
def test_two_things_that_answer_one_question_are_refused_by_name(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    if names == ("tread", "audio"):
        hearing = SimpleNamespace(name="toy", abilities=Abilities(trains_audio=True), dit=toy.ToyDit.spec)
        with pytest.raises(OptionError, match=message):
            check_tread(TreadOptions(tread=0.5), hearing, (4,))  # type: ignore[arg-type]
        return
    slider = tmp_path / "slider.toml"
    slider.write_text('[[sliders]]\npositive = "a"\nnegative = "b"\nneutral = "c"\n', encoding="utf-8")
    words = [word for name in names for word in WORDS.get(name, ())]
    words = [slider if word == "slider.toml" else word for word in words]

    if "preserved" in names:
        write_subset(tmp_path, PRESERVED)
        train: Any = train_image_toy
        words.append(ONLY)
    else:
        toy.write_caches(tmp_path, more="network_multiplier = -0.5\n" if names[1] in CARRIED else "")
        train = toy.train_toy

    with pytest.raises(OptionError, match=message):
        train(tmp_path, *words)


# fields of the records that say nothing of how an output is judged, or that belong to an entry of the table
WITHOUT_SAY = {
    Batch: {
        "tensors",
        "captions",
        "keys",
        "cache_origins",
        "text_metadata",
        "undropped",
        "condition_set",
        "empty_text",
    }
    # of pairs; in the weights of a `NoisyBatch`; the entry "preserved"
    | {"rejected", "loss_weights", "attributes"}
    # of which `given` is made: tests/ltx_2/test_given.py
    | {"clean_times", "crop_regions"},
    NoisyBatch: {
        "batch",
        "noise",
        "sigmas",
        "timesteps",
        "levels",
        "expert",
        "number",
        "notes",
        "clean_tokens",
    },
    LossRule: {"options", "prediction", "as_base", "always_runs_base_model"}
    | {"list_comparisons", "run_passes", "predict"}  # phases, with what targets put around them
    | {"in_lockstep", "seed", "seed_networks"},
}


@pytest.mark.parametrize("record", WITHOUT_SAY, ids=lambda record: record.__name__)
def test_whatever_is_new_is_entered_here(record: Any) -> None:
    """A field that is neither in the table nor known to have no say in a loss needs its pairs by hand."""
    assert {field.name for field in fields(record)} - set(ALL) == WITHOUT_SAY[record]


# of each record of options that a target has: its place in the table -> the options that belong to it
OPTIONS_OF: dict[type[Options], dict[str, set[str]]] = {
    GuidedTargetOptions: {
        "guided": {"guided_target", "guided_target_min_timestep", "guided_target_sound"},
    },
    TeacherOptions: {
        "teacher": {"teacher", "teacher_weight", "teacher_dit", "teacher_lora", "teacher_delta"}
        | {"teacher_min_timestep", "teacher_max_timestep", "teacher_anchor_weight", "teacher_split"}
        | {"teacher_size_weight", "teacher_colour_weight", "teacher_sees"},
    },
    MaskPriorOptions: {"mask_prior_weight": {"mask_prior_weight"}},
    BlankPriorOptions: {"blank_prior_weight": {"blank_prior_weight"}},
    PreferenceOptions: {"preference": {"preference", "preference_data_weight"}},
    SliderOptions: {"slider": {"slider"}},
    TreadOptions: {"tread": {"tread", "tread_blocks"}},
    IpNoiseOptions: {"perturbation": {"ip_noise_gamma", "ip_noise_gamma_random_strength"}},
    LossOptions: {"loss_type": {"loss_type", "huber_schedule", "huber_c", "huber_scale"}},
}
# records of options that say nothing of what a network learns towards, or only how much a level counts
OF_NO_TARGET = {
    *("LoopOptions", "CheckPageOptions", "ValidationOptions", "OptimizerOptions", "LrScheduleOptions"),
    *("TimestepOptions", "AcceleratorOptions", "SavingOptions", "SampleOptions", "PreviewOptions"),
    *(
        "EarlyStoppingOptions",
        "RollbackOptions",
        "ItemTurnsOptions",
        "EmaOptions",
        "SkipOptions",
        "LogOptions",
        "EndOptions",
    ),
    *("MetadataOptions", "UploadOptions"),
    *(
        "TrackerOptions",
        "BaseWeightsOptions",
        "ShowTimestepsOptions",
        "WorkflowOptions",
        "SampleVariantOptions",
    ),
    *("TrainingSpeedOptions", "TrainingAttentionOptions", "TrainingFp8Options", "SwapOptions"),
    *(
        "OptionsOfWays",
        "ShardBaseOptions",
        "ContextParallelOptions",
        "TrainingCompileOptions",
        "PlanOptions",
        "FrozenModelOptions",
    ),
    *("RunFeatureOptions", "OutputPreservationOptions", "EmbeddingOptions", "ItemLossOptions"),
    # inputs of their own, prompts in place of clips, and what a file says of itself
    *("InpaintingOptions", "LecoOptions", "AdapterOptions", "SampleScoringOptions"),
}


def records_in(record: type[Options]) -> Iterator[type[Options]]:
    """The records of options among the fields of one, and those among theirs."""
    for kind in get_type_hints(record).values():
        if isinstance(kind, type) and issubclass(kind, Options):
            yield kind
            yield from records_in(kind)


@pytest.mark.parametrize("record", OPTIONS_OF, ids=lambda record: record.__name__)
def test_a_new_option_of_a_target_is_entered_here(record: type[Options]) -> None:
    entered = OPTIONS_OF[record]
    assert set(entered) <= set(ALL)
    assert {field.name for field in fields(record)} == set().union(*entered.values())


def test_a_new_record_of_options_is_entered_here() -> None:
    records = {*records_in(TrainingOptions), *records_in(TrainedNetworkOptions)}
    assert set(OPTIONS_OF) <= records
    assert {record.__name__ for record in records - set(OPTIONS_OF)} == OF_NO_TARGET


def test_every_option_of_a_target_is_in_the_table(tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    default = {"--guided_target": 3, "--mask_prior_weight": 1, "--blank_prior_weight": 1}
    options = toy.toy_options(tmp_path, *itertools.chain.from_iterable(default.items()))
    entered = {str(words[0]) for name, words in WORDS.items() if name != "slider"}

    assert {target.option.partition(" ")[0] for target in options.features.targets} == set(default)
    assert set(default) | {"--teacher", "--preference"} == entered
