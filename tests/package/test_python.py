"""`import reelsmith`: the same results as the commands, events, errors; the page's examples run in order."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
from safetensors.torch import save_file

import reelsmith
from modules.installation import EXTENSIONS
from package.reelsmith import api
from package.reelsmith.events import HistoryEvents, PrintedLines
from package.reelsmith.typed_words import ScriptArguments
from tests.commands import QUIET, ROOT, run_program, run_script
from tests.pages import FENCE
from tests.tiny.families import FAMILIES
from tests.tiny.project import write_clips, write_dataset
from tests.tiny.wan import write_tiny_wan
from tests.waiting import wait_for

WAN = FAMILIES[0]
PAGE = ROOT / "docs" / "python.md"
SCRIPT = Path("wan_train_network.py")
# for tiny clips and few steps
SMALLER = {
    "[480, 832]": "[32, 32]",
    "video_length=33": "video_length=5, infer_steps=2",
    "--w 480 --h 272 --f 33 --s 20": "--w 32 --h 32 --f 5 --s 1",
    '"bf16"': '"no"',
    "max_train_steps=40": "max_train_steps=4",
    "max_train_steps = 40": "max_train_steps = 3",
    '"sample_every_n_steps": 20': '"sample_every_n_steps": 2',
    "last + 20": "last + 2",
}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The current folder, without files."""
    before = Path.cwd()
    os.chdir(tmp_path)
    with patch.dict("os.environ", QUIET):
        yield tmp_path
    os.chdir(before)


def as_options(words: list[str]) -> dict[str, object]:
    """Return the words of a command as keyword arguments."""
    options: dict[str, object] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word[2:]
            options[name] = True
        else:
            options[name] = word
    return options


def content_of(path: Path) -> tuple[object, bytes]:
    """Return the header of a safetensors file, whose texts are in any order, and the bytes behind it.

    Without the time at which the file was written.
    """
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header.get("__metadata__", {}).pop("modelspec.date", None)
    return header, content[end:]


@pytest.mark.slow
def test_caches_and_loras_are_those_of_the_commands_to_the_byte(folder: Path) -> None:
    WAN.prepare(folder)
    steps = shlex.split("--seed 1 --max_train_steps 3 --output_dir output --output_name lora --no_metadata")
    for script, *words in (WAN.cache_latents, WAN.cache_texts, [*WAN.train, *steps]):
        run_script(script, *words, folder=folder)
    typed = folder / "typed"
    typed.mkdir()
    for name in ("cache", "output"):
        (folder / name).rename(typed / name)

    reelsmith.cache("wan", **as_options([*WAN.cache_latents[1:], *WAN.cache_texts[1:]]))
    run = reelsmith.train("wan", **as_options([*WAN.train[1:], *steps])).wait()

    assert run.saved == [Path("output/lora.safetensors")]
    assert list(run.losses) == [1, 2, 3]
    caches = [path.relative_to(typed) for path in (typed / "cache").glob("*.safetensors")]
    assert len(caches) == 12
    for path in [*caches, *run.saved]:
        assert content_of(folder / path) == content_of(typed / path), path


def examples() -> list[str]:
    """Return the Python blocks of the page."""
    blocks: list[list[str]] = []
    kind = None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        fence = FENCE.match(line)
        if fence is not None:
            kind = fence[1] if kind is None else None
            blocks += [[]] if kind == "python" else []
        elif kind == "python":
            blocks[-1].append(line)
    return ["\n".join([*block, ""]) for block in blocks]


@pytest.mark.slow
def test_the_examples_of_the_page_run_in_their_order(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_tiny_wan(folder / "tiny", "t2v")
    write_clips(folder / "clips", count=2)
    write_dataset(folder, frames="5")
    models = folder / "models"
    (folder / "tiny").rename(models)
    (models / "dit.safetensors").rename(models / "wan2.1_t2v_1.3B_bf16.safetensors")
    (models / "vae.safetensors").rename(models / "Wan2.1_VAE.pth")
    (models / "t5.safetensors").rename(models / "models_t5_umt5-xxl-enc-bf16.pth")
    blocks = examples()
    names: dict[str, object] = {}
    used = set()

    for block in blocks:
        for old, new in SMALLER.items():
            if old in block:
                used.add(old)
                block = block.replace(old, new)
        exec(compile(block, str(PAGE), "exec"), names)

    said = capfd.readouterr().out
    assert len(blocks) == 10
    assert used == set(SMALLER)
    assert "Memory plan" in said
    assert "Did you mean --learning_rate?" in said
    assert re.search(r"^\d+ steps with 1e-3, 2 with 1e-4: output.fox.safetensors$", said, re.MULTILINE)
    assert len(names["shown"]) == 2  # type: ignore[arg-type]
    assert all(path.is_file() for path in names["shown"])  # type: ignore[attr-defined]
    assert len(list((folder / "videos").glob("*/*.mp4"))) == 2
    assert (folder / "merged.safetensors").is_file()
    assert [len(losses) for losses in names["losses"].values()] == [3, 3]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"netwrk_dim": 16}, "Unknown option --netwrk_dim. Did you mean --network_dim?"),
        ({"network_dim": "x"}, "argument --network_dim: x is not a whole number. Pass one, such as 1."),
        ({"network_dim": 0}, "--network_dim 0: use a number of at least 1 (the rank)"),
        ({"dit": True}, "--dit is not a switch: pass its value in place of True"),
        ({"sdpa": 1}, "--sdpa is a switch: pass True or False, not 1"),
        ({"config": "missing.toml"}, "--config_file missing.toml: cannot be read"),
        ({"help": True}, "the options ask for the help alone"),
        ({"dit": "\0"}, "'--dit=\\x00' contains the character NUL"),
        ({"sample_lora": ["a", "\ud800"]}, "'\\ud800' contains half a character"),
    ],
)
def test_a_wrong_option_is_an_exception_with_the_message_of_the_command(
    folder: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(reelsmith.UserError) as raised:
        reelsmith.train("wan", **options)

    assert str(raised.value).startswith(message)
    assert not any(folder.iterdir())


def test_names_that_do_not_exist_are_told_with_the_nearest(folder: Path) -> None:
    with pytest.raises(reelsmith.UserError, match="'wam' is not a model. Did you mean wan"):
        reelsmith.generate("wam")
    with pytest.raises(
        reelsmith.UserError, match="'finetune wn' is not a command. Did you mean finetune wan"
    ):
        reelsmith.command("finetune wn")
    # an option of one of the two caching commands
    with pytest.raises(reelsmith.UserError, match="--t55. Did you mean --t5?"):
        reelsmith.cache("wan", dataset="dataset.toml", vae="vae.safetensors", t55="t5.safetensors")
    with pytest.raises(reelsmith.UserError, match="--vea. Did you mean --vae?"):
        reelsmith.cache("wan", dataset="dataset.toml", vea="vae.safetensors", t5="t5.safetensors")
    for wrong in (None, 3):
        with pytest.raises(reelsmith.UserError, match=f"{wrong} is not a model. There are wan"):
            reelsmith.train(wrong)  # type: ignore[arg-type]
    with pytest.raises(reelsmith.UserError, match=r"not 'output/fox'. To continue one .* resume="):
        reelsmith.resume("output/fox")  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        reelsmith.trian  # noqa: B018


def test_what_the_running_command_finds_is_an_exception_too(folder: Path) -> None:
    run = reelsmith.command("download", family="wan", task="nope", to="models")

    with pytest.raises(reelsmith.UserError, match=r"^--task nope: wan has t2v-1.3B"):
        run.wait()
    assert not run.is_running


def test_other_commands_take_words_without_an_option(folder: Path) -> None:
    lines: list[str] = []
    run = reelsmith.command("download", list=True, family="wan")

    run.wait(lambda event: lines.append(event.text) if isinstance(event, reelsmith.LineEvent) else None)

    assert lines == run.lines
    assert any("t2v-1.3B" in line for line in lines)
    with pytest.raises(reelsmith.UserError, match=r"^folder nowhere: no such folder"):
        reelsmith.command("new", "nowhere", family="wan").wait()


def test_keyword_arguments_become_the_words_that_a_user_types() -> None:
    options = {
        "dataset": "dataset.toml",
        "sdpa": True,
        "gradient_checkpointing": False,
        "seed": None,
        "optimizer_args": {"weight_decay": 0.01, "eps": 1e-8},
        "lora_multiplier": -0.5,
        "sample_lora": [Path("a b.safetensors"), "c.safetensors"],
        "blocks_to_swap": "auto",
    }

    assert ScriptArguments(SCRIPT).make_argv((), options) == [
        "--dataset_config=dataset.toml",
        "--sdpa",
        *("--optimizer_args", "weight_decay=0.01", "eps=1e-08"),
        "--lora_multiplier=-0.5",
        *("--sample_lora", "a b.safetensors", "c.safetensors"),
        "--blocks_to_swap=auto",
    ]


SESSION = b'{"session": 1, "version": 1}\n'
STARTED = b'{"step": 0, "started": {"total_steps": %d, "process": {"number": %d}}}\n'
STEP = b'{"step": %d, "loss": 0.5, "rates": {"lr": 0.1}}\n'


def test_events_of_an_earlier_training_in_the_same_history_are_not_told_again(tmp_path: Path) -> None:
    path = tmp_path / "x-history.jsonl"
    earlier = SESSION + STARTED % (4, 7) + STEP % 1
    path.write_bytes(earlier + STEP % 2)
    history = HistoryEvents(tmp_path, "x")
    assert [*history.read()] == []

    # the training goes on after step 1: it replaces the file, and appends
    new = tmp_path / "new"
    new.write_bytes(earlier + STARTED % (3, 8) + STEP % 2)
    new.replace(path)
    steps = [*history.read()]
    with path.open("ab") as file:
        file.write(STEP % 3 + b'{"step": 3, "saved": "x.safetensors"}\n{"step": 3, "sa')
    later = [*history.read()]

    assert [(event.step, event.total_steps) for event in steps] == [(2, 3)]  # type: ignore[union-attr]
    assert later[0] == reelsmith.StepEvent(3, 3, 0.5, None, {"lr": 0.1}, None, None)
    assert later[1:] == [reelsmith.SavedEvent(3, tmp_path / "x.safetensors")]


def test_a_line_is_told_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "output.txt"
    path.write_bytes(b"one\ntw")
    lines = PrintedLines(path)
    assert [event.text for event in lines.read()] == ["one"]

    path.write_bytes(b"one\ntwo\nthr")

    assert [event.text for event in lines.read()] == ["two"]
    assert [event.text for event in lines.read(is_over=True)] == ["thr"]


def make_run(folder: Path, code: str, history: HistoryEvents | None = None) -> reelsmith.CommandRun:
    """Start a program that is none of ours."""
    (folder / "x.py").write_text(code, encoding="utf-8")
    with patch("package.reelsmith.command_run.program_words", lambda script: [str(script)]):
        return reelsmith.CommandRun(Path("x.py"), [], {}, history)


WAITS = "import time, sys; print('begun', flush=True); time.sleep(600)"


@pytest.mark.skipif(os.name == "nt", reason="sends a signal of POSIX")
def test_ctrl_c_stops_the_command_too_and_goes_on_to_the_caller(
    folder: Path, request: pytest.FixtureRequest
) -> None:
    # who starts the tests behind `&` lets them ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    run = make_run(folder, WAITS)

    def interrupt(event: reelsmith.Event) -> None:
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run.wait(interrupt)

    assert not run.is_running


@pytest.mark.skipif(os.name == "nt", reason="sends a signal of POSIX")
def test_a_run_ends_with_its_block(folder: Path) -> None:
    with make_run(folder, WAITS) as run:
        assert run.is_running

    assert not run.is_running


@pytest.mark.skipif(os.name == "nt", reason="sends a signal of POSIX")
def test_an_error_of_a_callback_stops_the_command_and_is_raised(folder: Path) -> None:
    """Nobody else could stop what `generate` or `cache` has started."""
    run = make_run(folder, WAITS)

    with pytest.raises(ZeroDivisionError):
        run.wait(lambda event: 1 / 0)  # type: ignore[arg-type, return-value]

    assert not run.is_running


@pytest.mark.skipif(os.name == "nt", reason="sends a signal of POSIX")
def test_a_stopped_run_knows_what_nobody_has_iterated_over(folder: Path) -> None:
    """Each event is still yielded once."""
    history = HistoryEvents(folder, "x")
    run = make_run(folder, "for number in range(3): print(number, flush=True)\n" + WAITS, history)
    events = iter(run)
    assert next(events) == reelsmith.LineEvent("0")
    wait_for(lambda: b"begun" in (Path(run._folder.name) / "output.txt").read_bytes())
    history.path.write_bytes(
        SESSION + STARTED % (3, 8) + STEP % 1 + b'{"step": 1, "saved": "x.safetensors"}\n'
    )

    run.stop()
    run.stop()

    assert run.lines[:4] == ["0", "1", "2", "begun"]
    assert run.losses == {1: 0.5}
    assert run.saved == [folder / "x.safetensors"]
    rest = [event.text for event in events if isinstance(event, reelsmith.LineEvent)]
    assert rest[:3] == ["1", "2", "begun"]
    assert [len(run.losses), len(run.saved), len(run.lines)] == [1, 1, 1 + len(rest)]


@pytest.mark.parametrize("words", [["merge_lora.py"], ["reelsmith.py", "merge"]])
def test_a_file_that_is_replaced_is_warned_of_once(folder: Path, words: list[str]) -> None:
    for name in ("dit", "merged"):
        (folder / f"{name}.safetensors").touch()
    files = ["--dit", "dit.safetensors", "--save_merged_model", "merged.safetensors"]
    done = run_script(*words, *files, folder=folder, check=False)
    assert done.stderr.count("merged.safetensors already exists: it will be replaced") == 1


def test_warnings_of_a_command_are_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_run(folder, "print('WARNING: no LoRA is given'); print('done')").wait()

    assert caplog.messages == ["x: no LoRA is given"]


IGNORED = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
ENDS = """
from pathlib import Path
import reelsmith
import package.reelsmith.command_run as command_run
command_run.program_words = lambda script: [str(script)]
print(reelsmith.CommandRun(Path("x.py"), [], {}, None)._process.pid)
"""


@pytest.mark.parametrize("first", ["", f"{IGNORED}\n"], ids=["as typed", "behind &"])
def test_a_program_that_ends_stops_what_it_has_started(folder: Path, first: str) -> None:
    (folder / "x.py").write_text(WAITS, encoding="utf-8")

    done = run_program(
        sys.executable, "-c", first + ENDS, folder=folder, environment={"PYTHONPATH": str(ROOT)}
    )

    assert not psutil.pid_exists(int(done.stdout))


def test_the_names_of_the_module_are_those_of_the_api() -> None:
    assert reelsmith.__all__ == api.__all__
    assert dir(reelsmith) == sorted(api.__all__)
    for name in ("train", "cache", "generate", "merge", "plan", "command"):
        assert "--help" in str(getattr(api, name).__doc__) or name == "plan"
    code = "import sys, reelsmith; print('package.reelsmith.api' in sys.modules, 'subprocess' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
    assert (ROOT / "package" / "reelsmith" / "py.typed").is_file()


# a training as its history tells it; it has the words of a command of ours that ends at once
def run_with_history(folder: Path, rows: bytes, **options: object) -> reelsmith.CommandRun:
    output = folder / "out put"
    history = HistoryEvents(output, "cat")
    output.mkdir()
    options = {"output_dir": str(output), "output_name": "cat", "max_train_steps": 10, **options}
    run = reelsmith.CommandRun(Path("tools/download.py"), ["--list"], options, history)
    history.path.write_bytes(SESSION + STARTED % (10, os.getpid()) + rows)
    return run


def test_a_cell_of_a_notebook_shows_what_a_run_has_done(folder: Path) -> None:
    saved = b'{"step": 10, "saved": "cat.safetensors"}\n'
    run = run_with_history(folder, STEP % 3 + STEP % 10 + saved)
    run._process.wait()

    assert repr(run) == f"cat: finished, step 10 of 10, loss 0.5, {folder / 'out put' / 'cat.safetensors'}"
    assert [type(event).__name__ for event in run][-3:] == ["StepEvent", "StepEvent", "SavedEvent"]
    assert repr(reelsmith.command("download", list=True).wait()) == "download: finished"
    with pytest.raises(reelsmith.UserError) as raised:
        reelsmith.command("download", family="wan", task="nope", to="models").wait()
    assert "wan has" in str(raised.value)


def test_what_cannot_be_continued_says_so_in_the_words_of_python(folder: Path) -> None:
    finished = run_with_history(folder, STEP % 10).wait()
    finished.script = SCRIPT
    with pytest.raises(reelsmith.UserError, match=r"all its 10 steps.*resume\(run, max_train_steps=20\)"):
        reelsmith.resume(finished)

    with pytest.raises(
        reelsmith.UserError, match="no state of cat in .*out put: .*save_state=True"
    ) as raised:
        reelsmith.resume(finished, max_train_steps=20)
    assert "--" not in str(raised.value)


def test_files_of_a_generation_are_found_without_reading_the_folders_beside_them(tmp_path: Path) -> None:
    (tmp_path / "a lot" / "inside").mkdir(parents=True)
    (tmp_path / "a lot" / "inside" / "x.png").touch()
    (tmp_path / "old.png").touch()
    before = api._list_modification_times(tmp_path)
    assert [path.name for path in before] == ["a lot", "old.png"]
    assert api._list_modification_times(tmp_path / "none") == {}
    assert [*api._list_modification_times(tmp_path / "old.png")] == [tmp_path / "old.png"]

    with patch.object(Path, "iterdir", side_effect=PermissionError):
        assert api._list_modification_times(tmp_path) == {}


@pytest.mark.parametrize("target", ["results", "results/one.png"])
def test_a_generation_returns_its_files_and_those_of_frames(
    target: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / target
    (folder / "results" / "earlier").mkdir(parents=True)
    (folder / "results" / "earlier" / "x.png").touch()

    def write(_: object) -> reelsmith.CommandRun:
        if path.suffix:
            path.touch()
        else:
            (path / "frames").mkdir()
            (path / "frames" / "0.png").touch()
            (path / "new.mp4").touch()
        return reelsmith.CommandRun(Path("tools/download.py"), ["--list"], {}, None)

    monkeypatch.setattr(api.CheckedCommand, "start", write)
    checked = api.CheckedCommand(SCRIPT, [], {}, {"save_path": str(path)})
    monkeypatch.setattr(api, "_check_script", lambda *_: checked)

    files = reelsmith.generate("wan")

    expected = ["results/one.png"] if path.suffix else ["results/frames/0.png", "results/new.mp4"]
    assert [file.relative_to(folder).as_posix() for file in files] == expected


def test_options_of_named_extensions_are_left_to_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"glow": 0.5, "output_dir": "output", "output_name": "x"}
    words = ScriptArguments(SCRIPT).make_argv((), options)
    with pytest.raises(reelsmith.UserError, match="Unknown option --glow"):
        ScriptArguments(SCRIPT).check(words)

    monkeypatch.setenv(EXTENSIONS, "glow")

    values = ScriptArguments(SCRIPT).check(words)
    assert (values["output_dir"], values["output_name"]) == ("output", "x")


def test_findings_of_a_file_are_records(folder: Path) -> None:
    matrices = {}
    for block in range(2):
        name = f"lora_unet_blocks_{block}_self_attn_q"
        matrices[f"{name}.lora_up.weight"] = torch.zeros(8, 2)
        matrices[f"{name}.lora_down.weight"] = torch.ones(2, 8)
    save_file(matrices, folder / "flat ü.safetensors")

    (finding,) = reelsmith.diagnose("flat ü.safetensors")

    assert (finding.id, finding.figure) == ("lora-empty", 1.0)
    with pytest.raises(reelsmith.UserError, match="no such file"):
        reelsmith.diagnose("none.safetensors")
