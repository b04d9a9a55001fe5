"""A generation script that another program drives: requests and answers as JSON, interrupted anywhere."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modules.installation import DRIVEN
from modules.media.reading import read_tags
from tests.commands import QUIET, ROOT
from tests.tiny.loras import write_lora_of_blocks
from tests.tiny.wan import TinyWan, write_tiny_wan

SIZE = {"w": "32", "h": "32", "f": "5", "s": "3", "d": "7"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyWan:
    return write_tiny_wan(tmp_path_factory.mktemp("models"))


@dataclass
class Driven:
    """A script that waits for requests, and what it has answered."""

    process: "subprocess.Popen[str]"
    folder: Path

    def ask(self, prompt: str = "a cat", **options: object) -> None:
        self.send(json.dumps({"prompt": prompt, "options": {**SIZE, **options}}))

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def next(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def until(self, event: str, what: str = "") -> list[dict[str, Any]]:
        """The answers up to one of this event, which is the last one."""
        answers = [self.next()]
        while answers[-1]["event"] != event or (what and answers[-1].get("what") != what):
            answers.append(self.next())
        return answers

    def made(self) -> list[Path]:
        return sorted((self.folder / "made").glob("*.mp4"))


@contextlib.contextmanager
def drive(folder: Path, files: TinyWan, words: Sequence[str] = ()) -> Iterator[Driven]:
    options = ["--task", "t2v-1.3B", "--device", "cpu", *files.models, "--interactive", *words]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / "wan_generate_video.py", *options, "--save_path", folder / "made"],
            cwd=folder,
            env={**os.environ, **QUIET, DRIVEN: str(folder / "previews")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        yield Driven(process, folder)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


def events(answers: Sequence[dict[str, Any]]) -> list[str]:
    return [str(answer.get("what") or answer["event"]) for answer in answers]


def test_a_request_is_answered_with_its_phases_its_steps_and_its_file(tmp_path: Path, files: TinyWan) -> None:
    with drive(tmp_path, files) as driven:
        assert driven.next() == {"event": "ready"}
        driven.ask("a --w 9 cat\nü", n="grey")
        answers = driven.until("ready")
        phases = ["reading the prompt", "loading the transformer"]
        steps = ["step"] * 3
        assert events(answers) == ["begun", *phases, *steps, "decoding", "made", "ready"]
        assert answers[0]["steps"] == 3
        assert [answer["done"] for answer in answers if answer["event"] == "step"] == [1, 2, 3]
        assert [answers[-2]["file"]] == [str(path) for path in driven.made()]
        tags = read_tags(driven.made()[0])
        assert (tags["bt_prompt"], tags["bt_negative_prompt"]) == ("a --w 9 cat\\nü", "grey")
        assert driven.process.stdin is not None
        driven.process.stdin.close()
        assert driven.process.wait(60) == 0


def test_a_request_sets_strengths_of_blocks_for_itself_alone(tmp_path: Path, files: TinyWan) -> None:
    lora = write_lora_of_blocks(tmp_path / "a.safetensors", files.dit, r"blocks\.\d+\.ffn\.0")
    with drive(tmp_path, files, ["--lora_weight", str(lora), "--lora_blocks", "0=0.5"]) as driven:
        driven.until("ready")
        recorded = []
        for options in ({}, {"lb": "1=0"}, {"lora_blocks": ["0=0.25,1=0"]}, {}):
            driven.ask("a cat", **options)
            (made,) = (answer for answer in driven.until("ready") if answer["event"] == "made")
            recorded.append(read_tags(Path(made["file"]))["bt_lora_blocks"])
        assert recorded == ["0=0.5", "1=0", "0=0.25,1=0", "0=0.5"]
        driven.ask("a cat", lb="7=0")
        (failed,) = (answer for answer in driven.until("ready") if answer["event"] == "failed")
        assert "--lora_blocks '7=0' names no block" in failed["reason"]


def test_requests_that_fail_say_why_and_the_next_is_made(tmp_path: Path, files: TinyWan) -> None:
    errors = {
        "{": "a request is a JSON object with prompt and options",
        "[]": "a request is a JSON object with prompt and options",
        json.dumps({"prompt": "a", "options": {"zoom": "1"}}): "this script has no option --zoom",
        json.dumps({"prompt": "a", "options": {"s": "ten"}}): "--s: 'ten' is not a whole number",
        json.dumps({"prompt": "a", "options": {"s": "0"}}): "--infer_steps 0",
        json.dumps({"prompt": " ", "options": {}}): "has no prompt",
        json.dumps({"prompt": "a", "options": {}, "strengths": {"": ["1"]}}): "1 strengths for 0 LoRAs",
        json.dumps({"prompt": "a", "options": {}, "strengths": {"": ["x"]}}): "could not convert",
    }
    with drive(tmp_path, files) as driven:
        driven.until("ready")
        for line, message in errors.items():
            driven.send(line)
            failed, _ = driven.until("ready")
            assert failed["event"] == "failed"
            assert message in failed["reason"]
        driven.ask()
        assert events(driven.until("ready"))[-2] == "made"


@pytest.mark.skipif(os.name == "nt", reason="there the process is killed")
def test_an_interrupt_ends_a_request_in_any_phase_and_nothing_else(tmp_path: Path, files: TinyWan) -> None:
    with drive(tmp_path, files) as driven:
        driven.until("ready")
        driven.process.send_signal(signal.SIGINT)  # nothing is made: it is no matter of the process
        driven.ask()
        assert events(driven.until("ready"))[-2] == "made"
        content = driven.made()[0].read_bytes()
        for event, what in (("begun", ""), ("phase", "reading the prompt"), ("step", "")):
            driven.ask("another cat" if what else "a cat", s="500")
            driven.until(event, what)
            driven.process.send_signal(signal.SIGINT)
            assert events(driven.until("ready"))[-2] == "cancelled"
            assert len(driven.made()) == 1
        driven.ask()
        assert events(driven.until("ready"))[-2] == "made"
        # a clip has its time of making in it
        assert abs(len(driven.made()[1].read_bytes()) - len(content)) < 100
        assert not [path for path in (tmp_path / "made").iterdir() if path.suffix != ".mp4"]


def test_a_preview_grows_apart_from_the_results(tmp_path: Path, files: TinyWan) -> None:
    with drive(tmp_path, files) as driven:
        driven.until("ready")
        driven.ask(s="12")
        driven.until("ready")
        assert [path.name for path in (tmp_path / "previews").iterdir()] == ["latent_preview.mp4"]
        assert "bt_preview_latent_every" not in read_tags(driven.made()[0])
        assert [path.suffix for path in (tmp_path / "made").iterdir()] == [".mp4"]


def test_a_wrong_model_file_ends_it_with_the_reason_before_it_is_ready(
    tmp_path: Path, files: TinyWan
) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"none")
    with drive(tmp_path, files, ["--dit", str(tmp_path / "x.safetensors")]) as driven:
        assert driven.process.stdout is not None
        assert driven.process.stdout.read() == ""
        assert driven.process.wait(60) != 0
        assert "x.safetensors" in (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_ends_when_nobody_reads_its_answers(tmp_path: Path, files: TinyWan) -> None:
    with drive(tmp_path, files) as driven:
        driven.until("ready")
        driven.ask(s="500")
        driven.until("step")
        assert driven.process.stdout is not None
        driven.process.stdout.close()
        assert driven.process.wait(60) != 0
