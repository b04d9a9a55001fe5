"""Several processes that write into one cache folder without knowing of each other.

Each scenario stops one process at a chosen place, lets another do something, and lets the first go on.
"""

import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dataset.caching.loop import cache_media, cache_texts
from dataset.caching.prefetch import run_ahead, write_behind
from modules import atomic_write
from protocols.data import Conditions
from protocols.requests import Prompt
from tests.dataset.caching.test_loop import make_config, names
from tests.dataset.caching.test_shards import contents, entries, into, shard
from tests.dataset.test_two_passes import KEYS, PARTS, ToyClip, ToyLlm, two
from tests.dataset.toy_family import ToyFamily, options
from tests.waiting import PATIENCE, wait_for

LATENT = "clip_{}_00000-005_0032x0032_toy.safetensors"
# not "fork": this process has threads. A server forks children that have all modules loaded already.
PROCESSES: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
if sys.platform != "win32":
    PROCESSES.set_forkserver_preload([__name__])


class Stop:
    """A place where a process waits: `reached` when it is there, `go` lets it on."""

    def __init__(self) -> None:
        self.reached, self.go = PROCESSES.Event(), PROCESSES.Event()

    def here(self) -> None:
        """Wait; only the first time."""
        if not self.reached.is_set():
            self.reached.set()
            assert self.go.wait(PATIENCE)


@dataclasses.dataclass
class StoppingLlm(ToyLlm):
    stop: Any = None

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        self.stop.here()
        return super().encode(prompts)


@dataclasses.dataclass
class StoppingClip(ToyClip):
    stop: Any = None

    def encode(self, prompts: Sequence[Prompt]) -> list[Conditions]:
        self.stop.here()
        return super().encode(prompts)


@dataclasses.dataclass
class StoppingFamily(ToyFamily):
    """Stops when its sources are listed."""

    stop: Any = None

    def check_named_files(self) -> None:
        self.stop.here()


def texts_stopping_in(encoder: str, folder: Path, form: str, stop: Stop) -> None:
    llm = StoppingLlm(stop=stop) if encoder == "llm" else ToyLlm()
    clip = StoppingClip(stop=stop) if encoder == "clipL" else ToyClip()
    config = make_config(folder, cache_format=form)
    cache_texts(ToyFamily(text=[llm, clip], text_keys=KEYS), config, options())


def latents_stopping_before_a_rename(folder: Path, stop: Stop) -> None:
    rename = atomic_write.replace_file

    def stopping(source: Any, target: Any) -> None:
        stop.here()
        rename(source, target)

    atomic_write.replace_file = stopping
    cache_media(ToyFamily(), make_config(folder), options())


def stopping_when_listed(folder: Path, form: str, cache: Callable[..., Any], stop: Stop) -> None:
    config = make_config(folder, clips=(), cache_format=form)
    cache(StoppingFamily(stop=stop, text=two().text), config, options())


class Other:
    """Another process that runs until it comes to its stop."""

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        self.stop = Stop()
        self.process = PROCESSES.Process(target=work, args=(*arguments, self.stop), daemon=True)

    def __enter__(self) -> "Other":
        self.process.start()
        assert self.stop.reached.wait(PATIENCE)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            self.process.kill()
            self.process.join(PATIENCE)
        if self.process.is_alive():  # an event that a killed process waited for would wait for it
            self.stop.go.set()
            self.process.join(PATIENCE)

    def end(self) -> int | None:
        """Let it go on; return its exit code."""
        self.stop.go.set()
        self.process.join(PATIENCE)
        return int(self.process.exitcode)


@pytest.mark.parametrize(("encoder", "form"), [("llm", "shards"), ("clipL", "files")])
def test_texts_of_two_runs_at_once_are_whole(tmp_path: Path, encoder: str, form: str) -> None:
    """This process does everything while the other one is in its first pass, or between its passes."""
    config = make_config(tmp_path, cache_format=form)
    undisturbed = into(config, tmp_path / "undisturbed")
    cache_texts(two(), undisturbed, options())
    with Other(texts_stopping_in, encoder, tmp_path, form) as other:
        (tmp_path / "cache").mkdir(exist_ok=True)
        # shards show what they hold when they are finished, or when their writer is dead
        assert sorted(entries(config)) == (PARTS if form == "files" else [])
        cache_texts(two(), config, options())
        assert entries(config) == entries(undisturbed)
        assert other.end() == 0
    assert entries(config) == entries(undisturbed)
    assert cache_texts(two(), config, options()).reused == 2
    assert len(contents(tmp_path / "cache")) == len(contents(tmp_path / "undisturbed"))


def test_a_file_that_another_process_is_writing_is_not_swept(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with Other(latents_stopping_before_a_rename, tmp_path) as other:
        (written,) = names(tmp_path)
        assert written.endswith(".tmp")
        assert cache_media(ToyFamily(), config, options()).written == 2
        assert written in names(tmp_path)
        assert other.end() == 0
    assert names(tmp_path) == [LATENT.format(0), LATENT.format(1)]


def test_what_a_killed_process_was_writing_goes_at_once(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with Other(latents_stopping_before_a_rename, tmp_path) as other:
        os.kill(other.process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        other.process.join(PATIENCE)
        (left,) = names(tmp_path)
        if os.name == "nt":  # there nobody asks whether a process lives
            os.utime(tmp_path / "cache" / left, (0, 0))
        assert cache_media(ToyFamily(), config, options(shard=shard(0, 2))).written == 1
    assert left not in names(tmp_path)


@pytest.mark.parametrize(("form", "cache"), [("files", cache_media), ("shards", cache_texts)])
def test_what_others_make_of_new_sources_is_not_stale(
    tmp_path: Path, form: str, cache: Callable[..., Any]
) -> None:
    """A clip is copied in after one run has listed the sources and before another one does."""
    make_config(tmp_path, clips=(9,))
    with Other(stopping_when_listed, tmp_path, form, cache) as other:
        config = make_config(tmp_path, clips=(9, 9), cache_format=form)
        cache(two(), config, options())
        made = entries(config)
        assert len(made) == 2
        assert other.end() == 0
    assert entries(config) == made


def test_results_come_in_order_and_no_more_is_started_than_the_limit_allows() -> None:
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        time.sleep(0.02 if number == 0 else 0)  # the others are done first
        return number * 10

    ahead = run_ahead(range(8), work, 4, lambda _: 10, limit_bytes=25)
    for index, count in enumerate((2, 3)):  # 20 bytes; what was returned last is not given back yet
        assert next(ahead) == (index, 10 * index)
        wait_for(lambda count=count: len(started) >= count)  # type: ignore[misc]
        time.sleep(0.05)  # in which more would be started
        assert len(started) == count
    assert list(ahead) == [(number, 10 * number) for number in range(2, 8)]


def test_writes_happen_in_order_and_are_finished_at_the_end() -> None:
    written: list[int] = []
    with write_behind() as write:
        for number in range(20):
            write(lambda number=number: written.append(number))  # type: ignore[misc]
    assert written == list(range(20))
