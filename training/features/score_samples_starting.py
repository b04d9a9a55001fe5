"""Start tools/score.py for a run while it trains, one process at a time."""

import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from modules.error_output import extract_error_message
from modules.installation import program_environment, program_words
from modules.option_values import option_argv
from training.reports.history import history_path

if TYPE_CHECKING:
    from modules.media.reading import Frame

logger = logging.getLogger(__name__)
SCRIPT = Path("tools/score.py")


@dataclass
class SampleScorer:
    """Recorder that scores a run's samples in a subprocess, started by the main process.

    A subprocess scores all existing samples, using embeddings of earlier samples from disk. The next
    subprocess scores the samples generated in the meantime. If one fails, a warning says why, and training
    continues without scores.
    """

    folder: Path  # --output_dir
    name: str  # --output_name
    models: Mapping[str, Path | None]  # options of the script that name a model
    device: str
    program: Sequence[str] = ()  # replaces the script in tests
    _process: "subprocess.Popen[bytes] | None" = None
    _stderr_file: "IO[bytes] | None" = None  # standard error of the process
    _has_unscored_samples: bool = False  # whether there are samples that no process has scored
    _has_failed: bool = False

    def __enter__(self) -> "SampleScorer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Score the remaining samples and wait for the results, so that the run's final page shows them.

        If the user interrupts the run, nothing is scored.
        """
        # KeyboardInterrupt and SystemExit are not subclasses of Exception
        is_interrupted = kind is not None and not issubclass(kind, Exception)
        if is_interrupted:
            return
        if self._process is not None:
            self._wait_for_process()
        if self._has_unscored_samples:
            self._start_process()
        if self._process is not None:
            logger.info("Scoring the last samples")
            self._wait_for_process()

    def log_samples(
        self,
        step: int,
        files: Mapping[int, Path],
        strips: "Mapping[int, Frame]",
        prompts: Mapping[int, str],
    ) -> None:
        """Request scores; `log_values` starts the process later, when the history lists the samples."""
        self._has_unscored_samples = True

    def log_values(self, values: Mapping[str, float], step: int) -> None:
        """Start a process if there are samples to score and no process runs."""
        if self._process is not None and self._process.poll() is not None:
            self._wait_for_process()
        if self._has_unscored_samples and self._process is None:
            self._start_process()

    def _start_process(self) -> None:
        """Start tools/score.py on the samples so far; if it cannot start, no more samples are scored."""
        self._has_unscored_samples = False
        if self._has_failed:
            return
        history = history_path(self.folder, self.name)
        command = [*self._script_command, str(history), *option_argv(self.models), "--device", self.device]
        self._stderr_file = tempfile.TemporaryFile()  # noqa: SIM115  # closed when the process has ended
        try:
            self._process = subprocess.Popen(
                command,
                env=program_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr_file,
                start_new_session=True,  # Ctrl-C must reach only the training
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        except OSError as error:
            self._fail(str(error))

    @property
    def _script_command(self) -> Sequence[str]:
        return self.program or [sys.executable, *program_words(SCRIPT)]

    def _wait_for_process(self) -> None:
        """Wait for the process, and warn if it failed."""
        assert self._process is not None
        assert self._stderr_file is not None
        code = self._process.wait()
        self._process = None
        self._stderr_file.seek(0)
        said = self._stderr_file.read().decode("utf-8", "replace")
        self._stderr_file.close()
        if code:
            self._fail(extract_error_message(said) or f"exit code {code}")

    def _fail(self, reason: str) -> None:
        self._has_failed = True
        logger.warning("--score_samples: samples are no longer scored: %s", reason)
