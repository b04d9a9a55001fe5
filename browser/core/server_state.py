"""Objects that all pages of one server share."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

from browser.core.bin_folder import FOLDER as BIN
from browser.core.bin_folder import BinFolder
from browser.core.tokens import PageToken
from browser.jobs.background_jobs import BackgroundJobs
from browser.jobs.jobs import JobQueue
from browser.jobs.render_worker import RenderWorker
from browser.runs.run_start import TrackedRuns
from browser.runs.run_views import FileNotes
from browser.runs.runs import Runs
from project.options import MODELS


@dataclass(frozen=True)
class ServerSettings:
    """Options of a running server. Only `address` contains the token."""

    host: str = "127.0.0.1"
    port: int | None = None  # None: it is not known
    token: PageToken = PageToken(None)
    is_token_given: bool = False  # by --token; otherwise the page created it
    is_local: bool = True  # only this machine can reach it
    address: str = ""  # address that other devices open, with the token
    # origin in --public_url, by which others reach the server through a proxy
    public_origin: str | None = None


@dataclass(frozen=True)
class Site:
    """Runs, queue and settings of a server, shared by all of its pages."""

    runs: Runs
    queue: JobQueue
    background_jobs: BackgroundJobs
    render_worker: RenderWorker
    models: Path = MODELS  # folder of the models' files
    notes: FileNotes = field(default_factory=FileNotes)
    settings: ServerSettings = field(default_factory=ServerSettings)

    @functools.cached_property
    def tracked_runs(self) -> TrackedRuns:
        """All runs with their states."""
        return TrackedRuns(self.runs, self.queue, self.background_jobs)

    @property
    def read_only(self) -> bool:
        """Whether pages may not write."""
        return self.queue.read_only


def open_bin(site: Site) -> BinFolder:
    """Return the bin in the first root.

    Files on other disks go to a bin in their root or in the models folder.
    """
    return BinFolder(*(top / BIN for top in site.runs.root_folders), site.models.absolute() / BIN)
