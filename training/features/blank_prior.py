"""Hold the network to the model without it for the empty prompt: --blank_prior_weight."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import HABIT, Options, option
from training.features.contract import AT_NETWORK, EMPTY_PROMPT, Feature, StepPasses

if TYPE_CHECKING:
    from training.features.hooks import Hooks, OptionsOfRun
    from training.loss import NoisyBatch
    from training.steps import Progress
    from training.targets.passes import Streams, TrainingPasses


class BlankPriorOptions(Options, title="what the model keeps"):
    """How strongly the network is held to the predictions of the model without it, without a prompt."""

    blank_prior_weight: float | None = option(
        "also compare the network with the model without it for the empty prompt, with this weight: keeps "
        "what the model makes without a prompt. Two more passes in each step, one of them with gradients",
        above=0,
        most=100,
        hint="0.5 to 1 are usual",
        known_as=("blank_prompt_preservation", "blank_prompt_preservation_multiplier"),
        facts=HABIT,
    )

    @property
    def weight(self) -> float:
        return self.blank_prior_weight or 0.0


def _refuse(options: "OptionsOfRun") -> None:
    if options.is_fused:
        raise OptionError(
            "--blank_prior_weight with --fused_backward_pass: the gradients of its two passes are added, "
            "and fused gradients are freed at once. Leave out one of the two"
        )


def blank_pass(weight: float, passes: "TrainingPasses", noisy_batch: "NoisyBatch") -> "Iterator[Streams]":
    """Yield the errors against the base model for the empty prompt, with the weight of this prior.

    Masks are about the clip, so that all places count here.
    """
    from training.targets.passes import measure_plainly, without_masks  # torch: only with this target

    blank = replace(noisy_batch, batch=noisy_batch.batch.with_empty_text())
    target = passes.base(blank)
    passes.restart(noisy_batch)
    errors = measure_plainly(passes, passes.learning(blank), target, without_masks(blank))
    passes.restart(noisy_batch)
    yield tuple(weight * error for error in errors)


def _install(hooks: "Hooks", options: "OptionsOfRun", progress: "Progress") -> None:
    hooks.further_passes.append(partial(blank_pass, options.of(BlankPriorOptions).weight))


BLANK_PRIOR = Feature(
    name="blank_prior",
    options=BlankPriorOptions,
    place=AT_NETWORK,
    is_on=lambda options: options.blank_prior_weight is not None,
    facts=HABIT,
    refuse=_refuse,
    target=lambda options: f"--blank_prior_weight {options.weight:g}",
    passes=lambda options: StepPasses(with_gradients=1, without=1),
    needs=(EMPTY_PROMPT,),
    describe=lambda options: (
        f"for the empty prompt as the model without the network, weight {options.weight:g}"
    ),
    metadata=lambda options, progress: asdict(options),
    install=_install,
)
