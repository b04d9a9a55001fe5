"""Trackers: what TensorBoard, wandb and others get, and what is refused before."""

import contextlib
import importlib.util
import itertools
import os
import sys
import threading
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from modules.errors import OptionError, UserError
from networks.adapter import NormReport
from tests.training.reports.test_logs import PLAIN
from tests.training.reports.test_logs import options as run_options
from tests.waiting import wait_for
from training.features.trackers_options import (
    NO_GIT,
    TrackerOptions,
    check_trackers,
    tracker_arguments,
)
from training.features.trackers_sending import Trackers
from training.processes import make_accelerator
from training.reports.logs import Logs, StepReport

STARTED = datetime(2030, 1, 2, 3, 4, 5)


def options(words: str = "", **paths: Path) -> TrackerOptions:
    return run_options(words, **paths).of(TrackerOptions)


def make_logs(given: TrackerOptions, total_steps: int, first_step: int = 0, **settings: Any) -> Logs:
    """The report of a run with trackers. settings: of these."""
    accelerator = make_accelerator(PLAIN)
    trackers = Trackers(accelerator, given, start_time=STARTED, **settings)
    return Logs(accelerator, total_steps, first_step, recorders=[trackers])


def test_tensorboard_gets_every_number_under_its_tag(tmp_path: Path) -> None:
    given = options("--log_prefix run- --log_config", logging_dir=tmp_path)
    clock = itertools.count(0, 5)
    folder = tmp_path / "run-20300102030405" / "network_train"

    with make_logs(given, 4, 1, config={"max_train_steps": 4}, now=lambda: next(clock)) as logs:
        for step in (2, 4):
            numbers: Any = {"loss": 1 / step, "average": 0.5, "gradient_norm": 2.0, "seconds": 0.5}
            logs.log_step(StepReport(step, {"lr/unet": 1e-4}, norms=NormReport(3, 0.5, 0.9), **numbers))
        logs.log_values({"loss/epoch": 0.4, "validation/loss": 0.3}, 4)

    events = EventAccumulator(str(folder))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/current")] == [(2, 0.5), (4, 0.25)]
    assert [event.value for event in events.Scalars("steps_per_second")] == [2, 2]
    tags = {"loss/average", "lr/unet", "grad_norm", "loss/epoch", "validation/loss", "max_norm/keys_scaled"}
    assert tags <= set(events.Tags()["scalars"])
    assert list(folder.glob("*/hparams.yml"))


def test_a_tracker_whose_disk_is_full_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")  # of POSIX systems
    given = options(logging_dir=tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def texts() -> list[str]:
        return [text for text in caplog.messages if "receives no more values" in text]

    with make_logs(given, 4, 1) as logs:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
        try:
            steps = itertools.count()
            wait_for(lambda: texts() or logs.log_values({"loss/epoch": 0.4}, next(steps)))
            for _ in range(20):  # it is not told again
                logs.log_values({"loss/epoch": 0.4}, next(steps))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    (said,) = texts()
    assert said.startswith(
        "--log_with tensorboard receives no more values; the training continues: [Errno 27]"
    )
    assert "Traceback" not in capfd.readouterr().err


def test_a_tracker_that_fails_leaves_the_others_their_values(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full = MagicMock(log=MagicMock(side_effect=OSError("disk full")))
    working = MagicMock()
    full.name, working.name = "aim", "wandb"
    with make_logs(options(logging_dir=tmp_path), 10) as logs:
        logs.accelerator.trackers.extend([full, working])
        for step in (1, 2):
            logs.log_values({"loss/epoch": 0.4}, step)

    assert [call.kwargs["step"] for call in working.log.call_args_list] == [1, 2]
    assert full.log.call_count == 1
    (warning,) = [text for text in caplog.messages if "receives no more values" in text]
    assert warning == "--log_with aim receives no more values; the training continues: disk full"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_tracker_that_cannot_end_leaves_threads_their_errors(
    error: type[BaseException], tmp_path: Path
) -> None:
    before = threading.excepthook
    with contextlib.suppress(KeyboardInterrupt), make_logs(options(logging_dir=tmp_path), 10, 4) as logs:
        assert threading.excepthook is not before
        logs.accelerator.trackers.append(MagicMock(finish=MagicMock(side_effect=error)))
    assert not logs.accelerator.trackers
    assert threading.excepthook is before


def test_a_tracker_config_replaces_the_name_of_the_run(tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    file.write_text('[wandb]\nname = "b"\n')

    assert tracker_arguments(options("--wandb_run_name a")) == {"wandb": {"name": "a"}}
    given = options("--wandb_run_name a", log_tracker_config=file)
    assert tracker_arguments(given) == {"wandb": {"name": "b"}}
    file.write_text("name = 1")
    with pytest.raises(UserError, match="outside a table"):
        tracker_arguments(given)


@pytest.mark.parametrize("name", ["trackio", "aim", "mlflow", "swanlab", "comet_ml"])
def test_other_dashboards_get_the_numbers_and_their_arguments(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the package, as accelerate calls it."""
    package = MagicMock(__version__="9.0", __spec__=None)
    package.search_experiments.return_value = []
    package.utils.validation.MAX_PARAM_VAL_LENGTH = package.utils.validation.MAX_PARAMS_TAGS_PER_BATCH = 100
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType(name)])
    file = tmp_path / "t.toml"
    argument = "run_name" if name == "mlflow" else "experiment"
    file.write_text(f'[{name}]\n{argument} = "mine"\n')
    given = options(f"--log_with {name}", log_tracker_config=file, logging_dir=tmp_path)
    check_trackers(given)

    with make_logs(given, 4, config={"max_train_steps": 4}) as logs:
        logs.log_values({"loss/epoch": 0.5, "lr/d*lr/unet": 0.25}, 3)

    calls = str(package.mock_calls)
    for part in (
        f"{argument}='mine'",
        "'max_train_steps': 4",
        "loss/epoch",
        "lr/d-lr/unet",
        "0.25",
        "step=3",
    ):
        assert part in calls, (part, calls)


def test_what_writes_into_a_folder_needs_one() -> None:
    with pytest.raises(OptionError, match="--log_with aim needs --logging_dir"):
        options("--log_with aim")


def test_a_missing_tracker_is_named_with_the_command_to_install_it() -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("it is installed here")
    with pytest.raises(OptionError, match="pip install wandb"):
        check_trackers(options("--log_with wandb"))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("wandb", "wandb/settings"),
        ("comet_ml", ".comet.config"),
        ("comet_ml", ".env"),
        ("swanlab", ".swanlab"),
    ],
)
@pytest.mark.parametrize("variable", ["REELSMITH_RUN_GOES_ON", "REELSMITH_FROM_QUEUE"])
def test_settings_of_a_tracker_in_a_strangers_folder_are_refused(
    name: str, file: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They can name the server, which gets the user's key."""
    monkeypatch.setitem(sys.modules, name, MagicMock(__spec__=None))
    monkeypatch.chdir(tmp_path)
    for git in NO_GIT:
        monkeypatch.setenv(git, "")
    given = options(f"--log_with {name}")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("[default]\nbase_url = http://evil\n", encoding="utf-8")
    check_trackers(given)  # typed in a terminal
    assert os.environ["WANDB_DISABLE_GIT"] == ""
    monkeypatch.setenv(variable, "1")
    with pytest.raises(OptionError, match=f"has settings of {name}, which can name any server"):
        check_trackers(given)
    (tmp_path / file).unlink()
    check_trackers(given)
    assert os.environ["WANDB_DISABLE_GIT"] == "true"


def test_wandb_gets_files_with_their_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[dict[str, Any], int]] = []

    def media(kind: str) -> Any:
        return lambda path, **settings: (kind, path, settings)

    package = SimpleNamespace(Video=media("video"), Image=media("image"))
    monkeypatch.setitem(sys.modules, "wandb", package)  # type: ignore[arg-type]
    tracker: Any = SimpleNamespace(name="wandb", log=lambda values, step: sent.append((values, step)))
    files = {0: tmp_path / "a.mp4", 1: tmp_path / "b.png"}

    recorder = Trackers(SimpleNamespace(trackers=[tracker]), options("--log_with wandb"))  # type: ignore[arg-type]

    recorder.log_samples(5, files, {}, {0: "a cat", 1: "a dog"})

    video = ("video", str(files[0]), {"caption": "a cat", "format": "mp4"})
    image = ("image", str(files[1]), {"caption": "a dog"})
    assert sent == [({"samples/00": video, "samples/01": image}, 5)]


def test_a_tracker_that_fails_leaves_the_others_their_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    package = SimpleNamespace(Image=lambda path, caption: caption)
    monkeypatch.setitem(sys.modules, "wandb", package)  # type: ignore[arg-type]
    full = MagicMock(writer=MagicMock(add_image=MagicMock(side_effect=OSError("disk full"))))
    working = MagicMock()
    full.name, working.name = "tensorboard", "wandb"
    accelerator: Any = SimpleNamespace(trackers=[full, working])
    recorder = Trackers(accelerator, options("--log_with wandb"))

    for step in (1, 2):
        recorder.log_samples(step, {0: tmp_path / "a.png"}, {0: MagicMock()}, {0: "a cat"})

    assert [call.kwargs["step"] for call in working.log.call_args_list] == [1, 2]
    assert full.writer.add_image.call_count == 1
    (warning,) = [text for text in caplog.messages if "receives no more values" in text]
    assert warning == "--log_with tensorboard receives no more values; the training continues: disk full"
