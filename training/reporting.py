"""Build what reports a run to its page from its options, data and samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modules.contract.experts import HIGH_NOISE
from modules.planning.device_memory import MemoryWatch, host_peak
from modules.planning.memory_plan import gib
from networks.module_names import read_family
from networks.names.layouts import TRAINED_ON
from training.following import FamilyScripts, NextSteps, given_options
from training.plan import TrainingPlan
from training.reports.history import History, history_path
from training.reports.page import PageFacts, page_path
from training.reports.reporter import NoReports, RunReporter
from training.samples import NoSampler, Sampler
from training.training_run import NoMemoryWatch


def plan_next_steps(plan: TrainingPlan, scripts: FamilyScripts, sampler: Sampler | NoSampler) -> NextSteps:
    """Return what makes the command lines that can follow the run."""
    names = read_family({TRAINED_ON: plan.family.name})
    return NextSteps(
        given_options(plan.options, plan.family.options, scripts),
        scripts,
        plan.options,
        plan.names.file(plan.output_name),
        plan.steps.total_steps,
        plan.accelerator.num_processes,
        _first_sample(plan, sampler),
        plan.options.samples.loras() if sampler.prompts else (),
        plan.family.experts,
        plan.names.parts,
        "" if names is None else names.converted_for,
    )


def make_reporter(
    plan: TrainingPlan,
    following: NextSteps,
    sampler: Sampler | NoSampler,
    memory: MemoryWatch | NoMemoryWatch,
) -> RunReporter | NoReports:
    """Return what reports the run, in the main process. With --no_page it keeps what the last box says."""
    if not plan.accelerator.is_main_process:
        return NoReports()
    folder, name, progress = plan.output_dir, plan.output_name, plan.progress
    facts = PageFacts(
        name,
        plan.family.name,
        folder,
        following.total_steps,
        following.given.rows(is_changed=True),
        following.given.rows(is_changed=False),
        following.commands,
        lambda: list_memory(plan.accelerator.device, memory),
    )
    is_written = not plan.options.logs.no_page
    history = History(history_path(folder, name), progress.session_id, progress.step, is_written)
    prompts = dict(enumerate(sampler.prompts))
    return RunReporter(
        page_path(folder, name),
        facts,
        history,
        prompts,
        progress.step,
        lambda: plan.accelerator.trackers,  # they start later
    )


def list_memory(device: torch.device, watch: MemoryWatch | NoMemoryWatch) -> Sequence[tuple[str, str]]:
    """Return what the page says of memory: names and values."""
    host = ("most host memory of this process so far, measured", f"{gib(host_peak())} GiB")
    if device.type != "cuda":
        return [host, ("device", f"{device.type}: a prediction is made for CUDA devices (--plan)")]
    found = (
        (watch.predicted, watch.measured, watch.highest) if isinstance(watch, MemoryWatch) else (None,) * 3
    )
    labels = (
        "a training step, predicted",
        "a training step, measured",
        "highest of the run with samples, measured",
    )
    sizes = zip(labels, map(_gib, found), strict=True)
    return [("device", torch.cuda.get_device_name(device)), *sizes, host]


def _gib(size: int | None) -> str:
    return "not known" if size is None else f"{gib(size)} GiB"


def _first_sample(plan: TrainingPlan, sampler: Sampler | NoSampler) -> Mapping[str, Any]:
    """Return the values of the first sample, by the names of `Request`."""
    if not sampler.samples:
        return {}
    sample = sampler.samples[0]
    made = sample.prepared
    settled = {
        name: getattr(made, name) for name in ("width", "height", "frames", "steps", "embedded_guidance")
    }
    settled["guidance_scale"] = made.guidance_scale[0]
    for expert, scale in zip(plan.sampled.experts, made.guidance_scale, strict=True):
        if expert.name == HIGH_NOISE:
            settled[f"guidance_scale_{HIGH_NOISE}"] = scale
    settled["seed"] = made.seed if sample.is_seeded else None
    settled["flow_shift"] = made.flow_shift if plan.family.defaults.flow_shift is not None else None
    return vars(made.asked) | settled
