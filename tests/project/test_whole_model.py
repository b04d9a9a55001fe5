"""`new --whole_model`, which is `--train whole`: a described folder trains the model itself."""

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from downloads.catalogue import ModelSet
from modules.text_files import parse_toml
from project.kinds.whole_model import FORMS, FULL
from project.options import RUN_FILE, find_models
from project.running import _list_run_scripts
from tests.faults.messages import assert_one_message, run_here
from tests.project.test_new import write_photos
from training.config_options import PROJECT_TABLE

# one model of each script, that learns pictures
MODELS: dict[Path, ModelSet] = {}
for _model in find_models():
    _script = FULL.find_script(_model)
    takes_photos = not _model.properties.get("from_image") and _model.task != "av"  # which needs sound
    if _script is not None and _model.properties["fp8"] and takes_photos:
        MODELS.setdefault(_script, _model)


def describe(
    folder: Path, model: ModelSet, *words: str, printed: io.StringIO | None = None
) -> tuple[int, str]:
    named = ["--family", model.family, "--task", model.task, "--whole_model"]
    return run_here("new_project.py", folder, *named, *words, folder=folder.parent, printed=printed)


def read_run(folder: Path) -> dict[str, Any]:
    return parse_toml((folder / RUN_FILE).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("memory", "is_slow"), [("0", True), ("24", False)])
def test_lines_say_that_a_cpu_is_slow_and_what_the_disk_has(
    memory: str, is_slow: bool, tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos")
    model = next(model for model in MODELS.values() if model.family == "stable_diffusion")
    printed = io.StringIO()

    assert describe(tmp_path / "photos", model, "--memory", memory, printed=printed)[0] == 0

    said = printed.getvalue()
    assert ("Slow on a CPU" in said) == is_slow
    free = shutil.disk_usage(tmp_path).free / 1e9
    (found,) = re.findall(r"([\d.]+) GB are free on the disk", said)
    assert abs(float(found) - free) < 2


@pytest.mark.parametrize("script", MODELS, ids=lambda script: script.stem)
def test_the_script_for_whole_models_takes_what_is_written(script: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    write_photos(folder)
    write_photos(folder / "control", captions=False)  # one that edits is among the models

    told = describe(folder, MODELS[script], "--memory", "24")
    code, said = run_here(str(script), "--config_file", RUN_FILE, "--check", folder=folder)

    assert told == (0, "")
    assert code == 1  # nothing is cached, and no file of the model is there
    known = "no such file", " downloads it.", "it gives no rights"
    assert not [line for line in said.splitlines() if not any(words in line for words in known)]
    run = read_run(folder)
    assert run[PROJECT_TABLE]["commands"][-1] == ["python", script.name, "--config_file", RUN_FILE]
    assert script in _list_run_scripts()
    values = run["training"]
    assert not [name for name in values if name.startswith(("network_", "lora_")) or name in FORMS]
    assert (values["full_bf16"], values["fused_backward_pass"], values["optimizer_type"]) == (
        True,
        True,
        "adafactor",
    )
    assert values["learning_rate"] <= 1e-5
    assert (values["save_every_n_steps"], values["save_last_n_steps"]) == (500, 500)


def test_on_a_cpu_the_weights_stay_in_float32(tmp_path: Path) -> None:
    write_photos(tmp_path / "p")
    [model] = [one for one in find_models() if (one.family, one.task) == ("qwen_image_21", "base")]
    describe(tmp_path / "p", model, "--memory", "0")
    values = read_run(tmp_path / "p")["training"]
    assert "full_bf16" not in values
    code, said = run_here(
        "qwen_image_21_train.py", "--config_file", RUN_FILE, "--check", folder=tmp_path / "p"
    )
    assert code == 1
    assert all("no such file" in line or "downloads it" in line for line in said.splitlines())


def test_it_is_told_how_much_memory_and_disk_it_takes(tmp_path: Path) -> None:
    write_photos(tmp_path / "p")
    [model] = [one for one in find_models() if (one.family, one.task) == ("flux_2", "klein-4b")]
    printed = io.StringIO()
    describe(tmp_path / "p", model, "--memory", "16", printed=printed)
    said = printed.getvalue()
    # 7,751,089,152 bytes of weights in bf16
    assert "Its weights: 7.2 GiB in bf16, which fits a card of 16 GiB" in said
    assert "Each saved file has 7.8 GB; with the states output takes about 38.8 GB" in said
    assert "was distilled to few steps, and plain training unlearns them. Train on klein-base-4b" in said
    assert "training_adapter" not in said
    assert "comment signs" not in said
    assert "teacher" not in (tmp_path / "p" / RUN_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "--family wan22 --task t2v-A14B --memory 80",
            "has two transformers, which are trained one at a time",
        ),
        (
            "--family ltx2 --task v --memory 80",
            "--whole_model: LTX-2 without audio has no script that trains it whole",
        ),
        ("--family h3 --task t2va-small --memory 80", "has weights in 8 bits"),
    ],
)
def test_what_cannot_be_trained_whole_is_refused(words: str, told: str, tmp_path: Path) -> None:
    write_photos(tmp_path / "p")
    answer = run_here("new_project.py", "p", "--whole_model", *words.split(), folder=tmp_path)
    assert_one_message(*answer, told, "Omit it to train a LoRA")
    assert not (tmp_path / "p" / RUN_FILE).exists()
