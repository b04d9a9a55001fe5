"""Run tools on videos and pictures: read, stage after stage, write, as one stream."""

import gc
import logging
from collections.abc import Callable, Sequence

from modules.asking import Answer, ask_at_console
from modules.atomic_write import make_folder
from modules.devices import choose_device
from modules.failures import Failures
from post.chain_options import Chain, in_words
from post.naming import FileJob, plan_jobs, tell_suffix
from post.pictures import run_picture
from post.stages import NamedStage, check_tools, make_stages
from post.videos import check_video, run_video

logger = logging.getLogger(__name__)


def run_chain(chain: Chain, ask: Callable[[str], Answer | None] = ask_at_console) -> None:
    """Do what a command line asks for. Raises UserError; what is named wrongly fails before networks load."""
    jobs = plan_jobs(chain, ask)
    device = choose_device(chain.run.device)
    check_tools(chain.tools, chain.labels, device)
    if not jobs:
        return
    tell_suffix(chain, jobs)
    for folder in sorted({job.output.parent for job in jobs}):
        make_folder(folder, "--output")
    if chain.run.format.keep_pngs:
        for folder in sorted({job.source.parent for job in jobs if not job.is_picture}):
            make_folder(folder, "--keep_pngs")
    if len(jobs) == 1 and not jobs[0].is_picture:
        check_video(jobs[0].source)
    run_jobs(chain, jobs, make_stages(chain.tools, chain.labels, device))


def run_jobs(chain: Chain, jobs: Sequence[FileJob], stages: Sequence[NamedStage]) -> None:
    """Work on file after file. Of several, one that fails is reported and the others go on.

    Raises UserError at the end if one failed, with the exit code of the failures if they share one.
    """
    done = [in_words(tool, options) for tool, options in chain.tools]
    failures = Failures(strict=len(jobs) == 1)
    for job in jobs:
        with failures.note_errors(str(job.source)):
            if job.is_picture:
                run_picture(stages, job, done, chain.hides)
            else:
                run_video(stages, job, done, chain.run.format, chain.hides)
        gc.collect()  # errors and their tracebacks hold each other, and with them what a file took
    if len(jobs) > 1 and not failures.reasons:
        logger.info("All %d files are done", len(jobs))
    failures.raise_if_any(len(jobs), f"{chain.run.input}: ")
