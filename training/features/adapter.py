"""Train a training adapter: --make_adapter.

A training adapter is a LoRA that undoes the distillation of a model. It is trained like any LoRA of the
distilled model; other LoRAs are trained with it (--training_adapter) and used without it. So the option does
not change the training: saved files record the adapter's model and its training images, the run does not warn
that the few-step ability is lost, and it rejects targets that would keep this ability.
"""

from functools import partial

from modules.errors import OptionError
from modules.options import HABIT, option
from training.features.contract import AT_NETWORK, Feature, FeatureOptions
from training.features.hooks import PlannedRun, RunFeatures

OWN, REAL, MIXED = "own", "real", "mixed"
NO_LORA = "a training adapter is a LoRA, and the model itself is trained"


class AdapterOptions(FeatureOptions, title="network", at=AT_NETWORK, facts=HABIT, why_not_full=NO_LORA):
    """Option to save the LoRA as a training adapter."""

    make_adapter: str | None = option(
        "save as a training adapter, made from such images",
        choices=(OWN, REAL, MIXED),
    )


def _note_base(run: RunFeatures, planned: PlannedRun) -> None:
    from checkpoints.file_hashes import name_base  # not needed for --help

    bases = [name_base(file) for file in planned.family.dit_files]
    run.info.in_files["training_adapter_for"] = ", ".join(bases)


def _join(run: RunFeatures, options: AdapterOptions) -> None:
    network = run.options.network
    if network is not None and network.frozen.training_adapter is not None:
        raise OptionError(
            "--make_adapter with --training_adapter: with an adapter in use, little is left to unlearn. "
            "To continue training one, pass it as --network_weights"
        )
    kept = [target.option for target in run.targets if target.replaces_velocity]
    if kept:
        raise OptionError(
            f"--make_adapter with {kept[0]}: an adapter has to unlearn what the model was distilled for, and "
            "this target keeps it. Omit one of the two"
        )
    run.keeps_few_step_ability = True
    run.info.in_files["adapter_data"] = options.make_adapter
    run.info.targets.append("what the model was distilled for is unlearned: a training adapter")
    run.on.plan.append(partial(_note_base, run))


ADAPTER = Feature(
    name="adapter",
    options=AdapterOptions,
    is_on=lambda options: options.make_adapter is not None,
    join=_join,
)
