"""What `new` writes about a folder, for every model."""

import shlex
import shutil
from pathlib import Path

import pytest

from dataset.config import load_dataset_config
from downloads.catalogue import ModelSet
from modules.text_files import parse_toml
from project.options import find_models
from tests.commands import run_script
from tests.faults.messages import assert_one_message, run_here
from tests.project.folder import write_folder

MODELS = find_models()
FILES = ["dataset.toml", "prompts.txt", "run.toml"]


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected") / "my clips"
    write_folder(folder)
    return folder


@pytest.fixture
def folder(collected: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(collected, tmp_path / "my clips"))


def describe(folder: Path, *words: object, model: ModelSet = MODELS[0]) -> tuple[int, str]:
    names = ["--family", model.family, "--task", model.task]
    return run_here("new_project.py", folder, *names, *words, folder=folder.parent)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.family} {model.task}")
def test_every_model_takes_what_is_written(model: ModelSet, folder: Path) -> None:
    data, step = model.data, model.data.get("frame_step", 4)
    script = next(word for word in shlex.split(model.commands["train"]) if word.endswith(".py"))

    told = describe(folder, "--memory", 12, "--trigger_word", "mrsfluff", model=model)
    code, said = run_here(script, "--config_file", folder / "run.toml", "--check", folder=folder.parent)

    assert told == (0, "")
    assert code == 1  # nothing is cached
    # models that are recognised by their file miss it
    known = "are animated", "no such file", " downloads it."
    assert not [line for line in said.splitlines() if not any(words in line for words in known)]
    tables = load_dataset_config(folder / "dataset.toml").datasets
    assert all(table.trigger_word == "mrsfluff" for table in tables)
    for table in (table for table in tables if table.kind == "video"):
        assert (table.source_fps == "auto") is (data["frames"] > 1)
        assert table.target_frames[-1] % step == 1
        assert min(data["frames"], 1 + step) <= table.target_frames[-1] <= data["frames"]
        assert (1 in table.target_frames) is (not data.get("from_image"))
    assert {table.kind for table in tables} == ({"video"} if data.get("from_image") else {"video", "image"})
    prompts = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert [line.startswith("mrsfluff, ") for line in prompts] == [True, True, False]


@pytest.mark.parametrize("memory", [0, 8, 12, 24, 80])
def test_options_follow_from_the_card(memory: int, folder: Path) -> None:
    [large] = [model for model in MODELS if (model.family, model.task) == ("wan", "t2v-14B")]
    describe(folder, "--memory", memory, model=large)
    values = parse_toml((folder / "run.toml").read_text(encoding="utf-8"))["training"]
    assert values.get("blocks_to_swap") == ("auto" if memory else None)
    assert ("fp8_scaled" in values) is (0 < memory < 53)  # of 26.6 GiB of weights
    assert ("gradient_checkpointing_cpu_offload" in values) is (0 < memory <= 16)
    assert ("fp8" in values["t5"]) is (0 < memory < 16)


def test_what_does_not_fit_is_told(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "b.txt").unlink()
    (folder / "a.mp4").write_bytes(b"no clip")
    shutil.copytree(folder, folder / "more")
    shutil.copytree(folder, folder / "cache")

    done = run_script("new_project.py", folder, "--family", "wan", "--task", "i2v-14B-480p", "--memory", "0")

    said = done.stdout
    assert f"{folder}: 14 clips and 8 pictures. wan i2v-14B-480p at 96x64, 21 frames, on a CPU" in said
    assert f"no video in {folder / 'a.mp4'}" in said or str(folder / "a.mp4") in said
    assert "b.mkv, b.mkv: without a caption" in said
    assert "i.png, j.jpg, k.webp and 5 more: pictures, of which this model learns nothing" in said
    assert load_dataset_config(folder / "dataset.toml").datasets[1].directory == folder / "more"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--family", "wan"], "--task is missing: give one of t2v-1.3B, "),
        (["--task", "t2v-1.3B"], "--family is missing: give one of wan, "),
        (["--family", "won"], "Did you mean wan?"),
        (
            ["--family", "lumina", "--model_file", "vae=x"],
            "--model_file vae=x: give NAME=PATH with one of dit, ",
        ),
        (["--family", "framepack", "--task", "f1"], "--task f1 learns from clips of at least 1.2 seconds"),
    ],
)
def test_what_cannot_be_written_is_one_message(words: list[str], told: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "short", seconds=0.5)
    code, said = run_here("new_project.py", "short", *words, folder=tmp_path)
    assert_one_message(code, said, told)
    assert not set(FILES) & {path.name for path in (tmp_path / "short").iterdir()}


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_replaced_unasked(name: str, folder: Path) -> None:
    (folder / name).write_text("mine", encoding="utf-8")
    assert_one_message(*describe(folder), name, "--overwrite")
    assert (folder / name).read_text(encoding="utf-8") == "mine"
    assert describe(folder, "--overwrite") == (0, "")
    assert (folder / name).read_text(encoding="utf-8") != "mine"
