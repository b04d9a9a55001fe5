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
from training.job import TrainingJob
from training.reports.history import History, history_path
from training.reports.logs import Logs
from training.reports.page import PageFacts, page_path
from training.reports.reporter import NoReports, RunReporter
from training.samples import Sampler


def plan_next_steps(
    job: TrainingJob, scripts: FamilyScripts, total_steps: int, sampler: Sampler | None
) -> NextSteps:
    """Return what makes the command lines that can follow the run."""
    names = read_family({TRAINED_ON: job.family.name})
    return NextSteps(
        given_options(job.options, job.family.options, scripts),
        scripts,
        job.options,
        job.names.file(job.output_name),
        total_steps,
        job.accelerator.num_processes,
        _first_sample(job, sampler),
        () if sampler is None else job.options.samples.loras(),
        job.family.experts,
        job.names.parts,
        "" if names is None else names.converted_for,
    )


def make_reporter(
    job: TrainingJob, following: NextSteps, sampler: Sampler | None, memory: MemoryWatch | None, logs: Logs
) -> RunReporter | NoReports:
    """Return what reports the run, in the main process. With --no_page it keeps what the last box says."""
    if not job.accelerator.is_main_process:
        return NoReports()
    folder, name, progress = job.output_dir, job.output_name, job.progress
    facts = PageFacts(
        name,
        job.family.name,
        folder,
        following.total_steps,
        following.given.rows(is_changed=True),
        following.given.rows(is_changed=False),
        following.commands,
        lambda: list_memory(job.accelerator.device, memory),
    )
    is_written = not job.options.logs.no_page
    history = History(history_path(folder, name), progress.session_id, progress.step, is_written)
    prompts = dict(enumerate(() if sampler is None else sampler.prompts))
    trackers = logs.accelerator.trackers
    return RunReporter(page_path(folder, name), facts, history, prompts, progress.step, trackers)


def list_memory(device: torch.device, watch: MemoryWatch | None) -> Sequence[tuple[str, str]]:
    """Return what the page says of memory: names and values."""
    host = ("most host memory of this process so far, measured", f"{gib(host_peak())} GiB")
    if device.type != "cuda":
        return [host, ("device", f"{device.type}: a prediction is made for CUDA devices (--plan)")]
    rows = [
        ("device", torch.cuda.get_device_name(device)),
        ("a training step, predicted", _gib(None if watch is None else watch.predicted)),
        ("a training step, measured", _gib(None if watch is None else watch.measured)),
        ("highest of the run with samples, measured", _gib(None if watch is None else watch.highest)),
    ]
    return [*rows, host]


def _gib(size: int | None) -> str:
    return "not known" if size is None else f"{gib(size)} GiB"


def _first_sample(job: TrainingJob, sampler: Sampler | None) -> Mapping[str, Any]:
    """Return the values of the first sample, by the names of `Request`."""
    if sampler is None or not sampler.samples:
        return {}
    sample = sampler.samples[0]
    made = sample.prepared
    settled = {
        name: getattr(made, name) for name in ("width", "height", "frames", "steps", "embedded_guidance")
    }
    settled["guidance_scale"] = made.guidance_scale[0]
    for expert, scale in zip(job.sampled.experts, made.guidance_scale, strict=True):
        if expert.name == HIGH_NOISE:
            settled[f"guidance_scale_{HIGH_NOISE}"] = scale
    settled["seed"] = made.seed if sample.is_seeded else None
    settled["flow_shift"] = made.flow_shift if job.family.defaults.flow_shift is not None else None
    return vars(made.asked) | settled
