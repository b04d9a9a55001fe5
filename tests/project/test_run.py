"""From a folder of mixed files to a LoRA and a page, through the commands that a user types."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from networks.loading import read_lora
from tests.commands import QUIET, ROOT, run_script
from tests.faults.messages import assert_one_message, run_here, succeed_here
from tests.project.folder import write_folder

FILES = {"dit": "dit.safetensors", "vae": "vae.safetensors", "t5": "t5.safetensors"}
POCKET = [
    word for name, file in FILES.items() for word in ("--model_file", f"{name}={ROOT / 'pocket' / file}")
]
MODEL = ["--family", "wan", "--task", "t2v-1.3B", "--memory", "0", *POCKET]


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is described, for two steps with short samples."""
    folder = tmp_path_factory.mktemp("collected") / "my clips"
    write_folder(folder, seconds=0.4, size=(48, 32))
    run_script("reelsmith.py", "new", folder, *MODEL, "--max_train_steps", 2)
    prompts = folder / "prompts.txt"
    prompts.write_text(prompts.read_text(encoding="utf-8").replace("--s 20", "--s 2"), encoding="utf-8")
    return folder


def list_commands(folder: Path) -> list[list[str]]:
    """The commands that `run` prints."""
    said = run_script("reelsmith.py", "run", folder, "--dry_run").stdout
    return [shlex.split(line)[2:] for line in said.splitlines() if line.startswith("$ ")]


def check_results(folder: Path) -> None:
    assert read_lora(folder / "output" / "my_clips.safetensors")
    page = (folder / "output" / "my_clips.html").read_text(encoding="utf-8")
    assert "a square moves" in page
    assert len([*(folder / "output" / "sample").glob("*.mp4")]) == 3


def test_the_plain_commands_lead_to_a_lora_and_a_page(collected: Path) -> None:
    commands = list_commands(collected)
    assert [Path(words[0]).name.removeprefix("wan_") for words in commands] == [
        *("cache_text_encoder_outputs.py", "cache_latents.py", "cache_text_encoder_outputs.py"),
        "train_network.py",
    ]
    for words in commands:
        succeed_here(*words, folder=collected.parent)
    check_results(collected)
    assert list_commands(collected)[-1][-2:] == ["--resume", "latest"]


@pytest.mark.slow
def test_run_does_what_the_commands_do(collected: Path, tmp_path: Path) -> None:
    folder = Path(
        shutil.copytree(
            collected, tmp_path / "my clips", ignore=shutil.ignore_patterns("cache", "output", "*.toml")
        )
    )
    run_script("reelsmith.py", "new", folder, *MODEL, "--max_train_steps", 2, "--overwrite")
    for _ in range(2):  # the second time, nothing is left to do
        said = run_script("reelsmith.py", "run", folder).stdout.splitlines()
        assert said[-1] == f"The page of the training: {folder / 'output' / 'my_clips.html'}"
        check_results(folder)


def test_missing_files_of_the_model_are_told_before_anything_runs(collected: Path, tmp_path: Path) -> None:
    folder = Path(
        shutil.copytree(collected, tmp_path / "clips", ignore=shutil.ignore_patterns("cache", "output"))
    )
    model = ["--family", "hunyuan_video", "--task", "t2v", "--memory", "12"]
    describe = ["new_project.py", folder, "--overwrite", *model]
    assert run_here(*describe, folder=tmp_path) == (0, "")
    code, said = run_here("run_project.py", folder, folder=tmp_path)
    words = "--family hunyuan_video --task t2v --fp8_encoders --to", str(tmp_path / "models")
    assert_one_message(code, said, "mp_rank_00_model_states.pt is missing", "--download", *words)


@pytest.mark.parametrize("words", [["rm", "-rf", "x"], ["python", "../x.py"], ["python"]])
def test_only_commands_of_ours_are_run(words: list[str], collected: Path, tmp_path: Path) -> None:
    text = (collected / "run.toml").read_text(encoding="utf-8")
    [line] = [line for line in text.splitlines() if line.startswith("commands")]
    (tmp_path / "run.toml").write_text(text.replace(line, f"commands = [[], {words}]"), encoding="utf-8")
    assert_one_message(*run_here("run_project.py", tmp_path, folder=tmp_path), "is no command", "Correct")


@pytest.mark.parametrize("text", [None, "", "[reelsmith]\ncommands = 3", "\x00"])
def test_a_folder_that_is_not_described_is_one_message(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    remedy = "Describe the folder first: python new_project.py" if text is None else "run `new` again"
    assert_one_message(*run_here("run_project.py", tmp_path, folder=tmp_path), "run.toml", remedy)


def test_a_dry_run_shows_the_download_of_what_is_missing(collected: Path, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        (collected / "run.toml").read_text(encoding="utf-8").replace("pocket/dit", "pocket/missing"),
        encoding="utf-8",
    )

    said = run_script("run_project.py", tmp_path, "--dry_run").stdout

    assert "tools/download.py" in said
    assert "--config_file" in said


def test_the_first_failure_ends_the_run(collected: Path, tmp_path: Path) -> None:
    folder = Path(
        shutil.copytree(
            collected, tmp_path / "clips", ignore=shutil.ignore_patterns("cache", "output", "b.txt")
        )
    )
    run_script("new_project.py", folder, *MODEL, "--overwrite")
    done = run_script("run_project.py", folder, check=False)
    assert done.returncode == 1
    assert done.stdout.count("$ python") == 1
    assert "b.mkv" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is a signal to the group elsewhere")
def test_ctrl_c_ends_the_command_and_the_run(collected: Path) -> None:
    words = [sys.executable, str(ROOT / "reelsmith.py"), "run", str(collected)]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **QUIET},
        process_group=0,
    ) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("tokenizer") or line.startswith("Files"))
        os.killpg(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "$ python wan_cache_latents.py" not in said
