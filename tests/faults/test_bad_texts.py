"""Texts that never end, are huge, nested too deeply or hold what no text can: one message at once,
everywhere.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import pytest

from tests.faults.messages import assert_one_message, run_here
from tests.faults.runs import WAN, copy_data
from tests.faults.test_bad_inputs import GENERATE, SHORT_TRAINING

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
FAMILIES = (WAN,)  # all read texts by the same functions


@dataclass(frozen=True)
class Place:
    """An option that names a text, in a command; or a file of a dataset."""

    command: tuple[str, ...]
    option: str
    suffix: str


PLACES = {
    "dataset": Place(WAN.cache_latents, "--dataset_config", ".toml"),
    "dataset in JSON": Place(WAN.cache_texts, "--dataset_config", ".json"),
    "options": Place(SHORT_TRAINING, "--config_file", ".toml"),
    "trackers": Place(
        (*SHORT_TRAINING, "--log_with", "tensorboard", "--logging_dir", "logs"),
        "--log_tracker_config",
        ".toml",
    ),
    "samples": Place((*SHORT_TRAINING, "--sample_at_first"), "--sample_prompts", ".txt"),
    "samples in TOML": Place((*SHORT_TRAINING, "--sample_at_first"), "--sample_prompts", ".toml"),
    "samples in JSON": Place((*SHORT_TRAINING, "--sample_at_first"), "--sample_prompts", ".json"),
    "prompts": Place(GENERATE, "--from_file", ".txt"),
}
MODELS = {
    "dit": Place(GENERATE, "--dit", ".safetensors"),
    "vae": Place(WAN.cache_latents, "--vae", ".pth"),
    "lora": Place(GENERATE, "--lora_weight", ".safetensors"),
    "tokenizer": Place(WAN.cache_texts, "--t5_tokenizer", ".json"),
}


def pipe(path: Path) -> str:
    os.mkfifo(path)
    return "named pipe"


def endless(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "device"


def huge(path: Path) -> str:
    with path.open("wb") as file:
        file.truncate(10 << 30)  # takes no room on the disk
    return "larger than 16 MiB"


def deep(path: Path) -> str:
    path.write_text("[" * 100_000 if path.suffix == ".json" else "a = " + "[" * 100_000, encoding="ascii")
    return "64 levels"


def long_number(path: Path) -> str:
    path.write_text(
        "[1" + "0" * 5000 + "]" if path.suffix == ".json" else "a = 1" + "0" * 5000, encoding="ascii"
    )
    return "4300"


@contextlib.contextmanager
def seconds(limit: int) -> Iterator[None]:
    """Fail rather than wait for ever."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"still waiting after {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# all faults at one place, and a pipe at each of the others, which read by the same functions
@pytest.mark.parametrize(
    ("place", "make"),
    [(place, make) for place in ("dataset", "dataset in JSON") for make in (endless, huge, deep, long_number)]
    + [(place, pipe) for place in PLACES],
)
def test_a_text_that_cannot_be_read_is_one_message(
    place: str, make: Callable[[Path], str], project: Path, tmp_path: Path
) -> None:
    where = PLACES[place]
    reason = make(tmp_path / f"bad{where.suffix}")

    with seconds(60):
        code, said = run_here(*where.command, where.option, tmp_path / f"bad{where.suffix}", folder=project)

    assert_one_message(code, said, f"bad{where.suffix}", reason, remedy=False)


@pytest.mark.parametrize("make", [pipe, endless])
@pytest.mark.parametrize("place", MODELS)
def test_a_model_that_is_no_regular_file_is_one_message(
    place: str, make: Callable[[Path], str], project: Path, tmp_path: Path
) -> None:
    where = MODELS[place]
    reason = make(tmp_path / f"bad{where.suffix}")

    with seconds(60):
        code, said = run_here(*where.command, where.option, tmp_path / f"bad{where.suffix}", folder=project)

    assert_one_message(code, said, f"bad{where.suffix}", reason)


# --- datasets -----------------------------------------------------------------------------------------------


def caption_of(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "clips" / "clip 1.txt").write_bytes(content)

    return write


def in_place_of_caption(make: Callable[[Path], str]) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / "clips" / "clip 1.txt").unlink()
        make(folder / "clips" / "clip 1.txt")

    return replace


def as_list(line: str) -> Callable[[Path], None]:
    """Turn the dataset into a list with one good line and this one; CLIP stands for the path of a clip."""

    def write(folder: Path) -> None:
        config = folder / "dataset.toml"
        text = config.read_text(encoding="utf-8")
        clips = (folder / "clips").as_posix()
        config.write_text(
            text.replace("video_directory", "video_jsonl_file").replace(
                f'"{clips}"', f'"{clips}/list.jsonl"'
            ),
            encoding="utf-8",
        )
        lines = (
            f'{{"video_path": "{clips}/clip 0.mp4", "caption": "a square"}}\n',
            line.replace("CLIP", f"{clips}/clip 1.mp4"),
        )
        (folder / "clips" / "list.jsonl").write_text("".join(lines), encoding="utf-8")

    return write


def name_of_bytes(folder: Path) -> None:
    (folder / "clips" / "clip 1.mp4").rename(os.fsdecode(os.fsencode(folder / "clips") + b"/clip \xff.mp4"))


BAD_DATA: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "caption of gigabytes": (in_place_of_caption(huge), ("clip 1.txt", "larger than 1 MiB")),
    "caption that is a pipe": (in_place_of_caption(pipe), ("clip 1.txt", "named pipe")),
    "caption with NUL": (caption_of(b"a\0 cat"), ("clip 1.txt", "NUL")),
    "list with NUL in a path": (as_list('{"video_path": "a\\u0000.mp4"}'), ("list.jsonl, line 2", "NUL")),
    "list with half a character in a caption": (
        as_list('{"video_path": "CLIP", "caption": "\\udc00"}'),
        ("line 2: caption", "\\udc00"),
    ),
    "a clip with a name in bytes": (name_of_bytes, ("not UTF-8", "rename", "udcff")),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_a_dataset_that_holds_what_no_text_can_is_one_message(
    fault: str, project: Path, tmp_path: Path
) -> None:
    make, words = BAD_DATA[fault]
    config = copy_data(project, tmp_path, cached=False)
    make(tmp_path)

    with seconds(60):
        code, said = run_here(*WAN.cache_texts, "--dataset_config", config, folder=project)

    assert_one_message(code, said, *words, remedy=False)
