"""What all pages of one server are made from."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

from browser.background_jobs import BackgroundJobs
from browser.jobs import JobQueue
from browser.render_worker import RenderWorker
from browser.run_start import TrackedRuns
from browser.run_views import FileNotes
from browser.runs import Runs
from browser.settings import ServerSettings
from project.options import MODELS


@dataclass(frozen=True)
class Site:
    """Hold the runs, the queue and the settings of a server; every group of pages gets it."""

    runs: Runs
    queue: JobQueue
    background_jobs: BackgroundJobs
    render_worker: RenderWorker
    models: Path = MODELS  # folder of the models' files
    notes: FileNotes = field(default_factory=FileNotes)
    settings: ServerSettings = field(default_factory=ServerSettings)

    @functools.cached_property
    def tracked_runs(self) -> TrackedRuns:
        return TrackedRuns(self.runs, self.queue, self.background_jobs)

    @property
    def read_only(self) -> bool:
        return self.queue.read_only
