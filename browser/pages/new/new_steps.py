"""The next step on the New page: the progress of a folder, and the button for that step."""

from collections.abc import Sequence
from dataclasses import dataclass

from browser.core.short_names import short_digest
from browser.folders.new_form import NewForm
from browser.jobs.jobs import WAITING, Job
from browser.jobs.model_files import Download
from browser.runs.runs import FINISHED, RUNNING
from modules.pages.language import join, say, say_count

DESCRIBE, LOAD, CHECK, START = "describe", "load", "check", "start"  # action of the button
CHANGES = "changes"  # the button replaces the files as the listed changes say
FOLLOW = "follow"  # the button leads to another page
CAPTIONS, MEND = "captions", "mend"  # the button jumps to missing inputs, or to listed errors
BUSY = "busy"  # a command is running; the button only shows that
CHANGES_ANCHOR = "#would-change"
CAPTIONS_ANCHOR, WORD_ANCHOR, LISTED_ANCHOR = "#writer", "#trigger", "#progress"
QUEUE_ADDRESS = "/queue"


@dataclass(frozen=True)
class NextStep:
    """The next step towards a training run: label and action of the page's main button."""

    name: str
    label: str
    missing: Sequence[str] = ()  # descriptions of what the user still has to select or fix
    done: str = ""  # descriptions of completed steps
    address: str = ""  # address that the button opens instead of an action
    second_label: str = ""  # label of a second button
    second_address: str = ""

    @property
    def change_key(self) -> str:
        """String that changes with the step."""
        return short_digest(repr(self))


@dataclass(frozen=True)
class FolderProgress:
    """Progress of a folder's preparation and training, derived from its files and its commands."""

    is_described: bool = False
    description_job: Job | None = None  # the last `new` command: it writes the files, or is a dry run
    has_changes: bool = False  # changes found by a dry run that the user has neither accepted nor rejected
    download: Download | None = None  # download of the folder's model
    missing_gigabytes: str = ""  # missing GB of the model that this page can download
    download_failure: str = ""  # last lines of a failed download
    uncaptioned: int = 0  # files without the caption that the training run needs
    only_pictures: bool = True  # whether all of these files are images
    has_listed_errors: bool = False  # `new` has listed files that prevent a training run
    downloads_at_start: bool = False  # the training run downloads missing files
    check_job: Job | None = None
    is_check_old: bool = False
    training_job: Job | None = None  # job of the queue that trains on the folder
    run_address: str = ""  # address of the page of its training

    @property
    def change_key(self) -> str:
        """String that changes with the next step, assuming that the form is saved."""
        return select_step(NewForm(folder="as", family="in", task="files"), self, is_saved=True).change_key

    @property
    def is_checked(self) -> bool:
        """Whether the last check found no error and the files have not changed since."""
        return self.check_job is not None and self.check_job.state == FINISHED and not self.is_check_old

    @property
    def done(self) -> str:
        """Text about the steps that are complete."""
        steps = [say("Prepared")]
        if self.download is not None and self.download.state == FINISHED and not self.missing_gigabytes:
            steps.append(say("the model is here"))
        if self.is_checked:
            steps.append(say("checked: no fault"))
        return say("%(done)s.", done=join(", ", steps))


def select_step(form: NewForm, progress: FolderProgress, is_saved: bool) -> NextStep:
    """Return the next step towards a training run: the button to press, and what is still missing.

    `is_saved` is True if the folder's files contain the values of the form.
    """
    # required fields: phrase for the message -> value
    fields = {say("a folder"): form.folder, say("a model"): form.family}
    if form.family:
        fields[say("a version")] = form.task
    missing_fields = [label for label, text in fields.items() if not text]
    if missing_fields:
        return NextStep(DESCRIBE, say("Prepare"), missing=missing_fields)
    if progress.description_job is not None and progress.description_job.state == RUNNING:
        return NextStep(BUSY, say("Preparing …"))
    if progress.has_changes:
        return NextStep(
            CHANGES,
            say("Replace the three files"),
            second_label=say("Look at the changes"),
            second_address=CHANGES_ANCHOR,
        )
    if not (progress.is_described and is_saved):
        return NextStep(DESCRIBE, say("Prepare"))
    return _select_after_describing(progress)


def _ask_for_captions(progress: FolderProgress) -> NextStep:
    """Return the next step "Write captions", with a trigger word as the alternative."""
    count = progress.uncaptioned
    if progress.only_pictures:
        missing = say_count(
            count,
            "the caption of %(n)s image, or a trigger word",
            "captions of %(n)s images, or a trigger word",
        )
    else:
        missing = say_count(
            count,
            "the caption of %(n)s file, or a trigger word",
            "captions of %(n)s files, or a trigger word",
        )
    return NextStep(
        CAPTIONS,
        say("Write captions"),
        missing=[missing],
        done=progress.done,
        address=CAPTIONS_ANCHOR,
        second_label=say("Type a trigger word"),
        second_address=WORD_ANCHOR,
    )


def _select_after_describing(progress: FolderProgress) -> NextStep:
    """Return the next step for a folder whose files already have the values of the form."""
    training_step = _find_training_step(progress)
    if training_step is not None:
        return training_step
    if progress.uncaptioned:
        return _ask_for_captions(progress)
    if progress.has_listed_errors:
        return NextStep(
            MEND,
            say("Look at the files"),
            missing=[say("the files that are listed under Your files")],
            done=progress.done,
            address=LISTED_ANCHOR,
        )
    if progress.missing_gigabytes:
        download = progress.download
        if download is not None and download.state == RUNNING:
            return NextStep(
                BUSY,
                say("Downloading the model%(progress_words)s …", progress_words=download.progress_words),
                done=progress.done,
            )
        label = say("Download the model (%(size)s)", size=progress.missing_gigabytes)
        return NextStep(LOAD, label, done=progress.done)
    check_job = progress.check_job
    if check_job is not None and check_job.state == RUNNING:
        return NextStep(BUSY, say("Checking …"), done=progress.done)
    # with downloads_at_start, `run` downloads the missing model files itself
    if progress.is_checked or progress.downloads_at_start:
        return NextStep(START, say("Start"), done=progress.done)
    has_errors = check_job is not None and check_job.code not in (0, None) and not progress.is_check_old
    missing = [say("what the check has found")] if has_errors else []
    return NextStep(CHECK, say("Check"), missing=missing, done=progress.done)


def _find_training_step(progress: FolderProgress) -> NextStep | None:
    """Return the step that links to the waiting, running or finished training; None if there is none."""
    job = progress.training_job
    if job is None:
        return None
    has_finished = job.state == FINISHED and progress.run_address != ""
    if job.state not in (WAITING, RUNNING) and not has_finished:
        return None
    done_texts = {
        WAITING: say("It waits in the queue."),
        RUNNING: say("It trains."),
        FINISHED: say("The trained file is ready."),
    }
    address = progress.run_address or QUEUE_ADDRESS
    return NextStep(FOLLOW, say("Show the training"), done=done_texts[job.state], address=address)
