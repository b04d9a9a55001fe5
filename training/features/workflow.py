"""Write a workflow for ComfyUI next to each saved LoRA: --save_workflow.

`workflow_nodes.py` creates the nodes; a family describes them in its `workflow.py`.
"""

from functools import partial
from typing import TYPE_CHECKING

from modules.errors import OptionError
from modules.options import FREE, option
from training.features.contract import AT_NETWORK, Feature, FeatureOptions
from training.features.hooks import PlannedRun, RunFeatures
from training.features.phases import SAVE

if TYPE_CHECKING:
    from protocols.family import Family
    from training.other_models import OtherFamilies


class WorkflowOptions(
    FeatureOptions,
    title="ComfyUI",
    at=AT_NETWORK,
    facts=FREE,
    why_not_full="the workflow shows what a LoRA does to its model, and none is trained",
):
    """Option to write a ComfyUI workflow with each save."""

    save_workflow: bool = option(
        "write a workflow for ComfyUI next to each saved LoRA, NAME.workflow.json: dropped on ComfyUI, it "
        "makes the samples of --sample_prompts with the LoRA",
    )


def _join(run: RunFeatures, options: WorkflowOptions) -> None:
    """Register --save_workflow, which needs samples without merged LoRAs."""
    if run.options.samples.sample_prompts is None:
        raise OptionError(
            "--save_workflow writes the workflow of the run's samples, and the run makes none: pass "
            "--sample_prompts, or omit it"
        )
    if run.merge is not None:
        raise OptionError(
            "--save_workflow with --base_weights: samples show the model with these LoRAs merged in, but "
            "the workflow would load it without them. Omit one of the two"
        )
    run.on.start.append(_start)
    run.on.check_files.append(_check)
    run.on.plan.append(partial(_plan, run))


def _start(run: RunFeatures) -> None:
    if run.embedding_words:
        raise OptionError(
            "--save_workflow with --train_embedding: ComfyUI takes a learned word by a different name than "
            "the samples' prompts have. Omit one of the two"
        )


def _check(family: "Family", others: "OtherFamilies") -> None:
    from training.features.workflow_nodes import find_model  # only with --save_workflow

    find_model(family, others)


def _plan(run: RunFeatures, plan: PlannedRun) -> None:
    from training.features.workflow_nodes import plan_workflows  # only with --save_workflow

    workflows = plan_workflows(plan)
    if plan.accelerator.is_main_process:
        workflows.log_limits()
        run.after(SAVE, lambda saver, paths: workflows.write(paths))


WORKFLOW = Feature(
    name="workflow",
    options=WorkflowOptions,
    is_on=lambda options: options.save_workflow,
    join=_join,
)
