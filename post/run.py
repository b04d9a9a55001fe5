"""Run tools on videos and pictures: read, stage after stage, write, as one stream."""

import logging
from collections.abc import Callable, Sequence

import torch

from modules.atomic_write import make_folder
from modules.devices import choose_device
from modules.failures import Failures
from post.asking import Answer, ask_at_console
from post.chain_options import Chain, in_words, label_of, name_tool
from post.making import check_tool, make_stage
from post.naming import Job, plan_jobs, tell_suffix
from post.pictures import run_picture
from post.stages import NamedStage
from post.videos import check_video, run_video

logger = logging.getLogger(__name__)


def run_chain(chain: Chain, ask: Callable[[str], Answer | None] = ask_at_console) -> None:
    """Do what a command line asks for. Raises UserError; what is named wrongly fails before networks load."""
    jobs = plan_jobs(chain, ask)
    for index, (tool, options) in enumerate(chain.tools):
        with name_tool(label_of(index, tool)):
            check_tool(options)
    if not jobs:
        return
    tell_suffix(chain, jobs)
    for folder in sorted({job.output.parent for job in jobs}):
        make_folder(folder, "--output")
    if len(jobs) == 1 and not jobs[0].is_picture:
        check_video(jobs[0].source)
    device = choose_device(chain.run.device)
    run_jobs(chain, jobs, make_stages(chain, device))


def make_stages(chain: Chain, device: torch.device) -> list[NamedStage]:
    """Load the networks of all tools. Raises UserError, which names the tool if it is not the first."""
    stages = []
    for index, (tool, options) in enumerate(chain.tools):
        label = label_of(index, tool)
        with name_tool(label):
            stages.append(NamedStage(make_stage(options, device), label))
    return stages


def run_jobs(chain: Chain, jobs: Sequence[Job], stages: Sequence[NamedStage]) -> None:
    """Work on file after file. Of several, one that fails is reported and the others go on.

    Raises UserError at the end if one failed, with the exit code of the failures if they share one.
    """
    done = [in_words(tool, options) for tool, options in chain.tools]
    failures = Failures(strict=len(jobs) == 1)
    for job in jobs:
        with failures.note_errors(str(job.source)):
            if job.is_picture:
                run_picture(stages, job, done)
            else:
                run_video(stages, job, done, chain.run.format)
    if len(jobs) > 1 and not failures.reasons:
        logger.info("All %d files are done", len(jobs))
    failures.raise_if_any(len(jobs), f"{chain.run.input}: ", with_code=True)
