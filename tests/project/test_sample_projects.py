"""`new --from` for a project of each kind, then `run` to its first step."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import stable_diffusion.family  # noqa: F401  # packages of it warn when they are imported
from modules.text_files import parse_toml
from project.options import RUN_FILE
from tests.faults.messages import run_here, succeed_here
from tests.project.foreign_samples import SAMPLES, Sample
from tests.project.test_foreign_runs import Described
from tests.project.test_kinds_of_folders import write_photos
from tests.tiny.new_models import write_new_model
from tests.tiny.project import write_clips
from training.config_options import PROJECT_TABLE


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny models ü")


def describe(sample: Sample, folder: Path, models: Path) -> Described:
    """Describe a folder of pictures for a sample project next to it, without typing the model."""
    photos = folder / "photos"
    if sample.media == "clips":
        write_clips(photos)
    else:
        write_photos(photos)
    if sample.media not in {"photos", "clips"}:
        place = {"edits": "control", "controls": "conditioning"}[sample.media]
        write_photos(photos / place, captions=False)
    for name, content in sample.files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    _, _, _, _, *words = write_new_model(sample.model, models / sample.model)  # without family and task
    command = ["photos", "--from", next(iter(sample.files)), *words, *sample.words]
    with (folder / "told").open("w+", encoding="utf-8") as told:
        code, said = run_here("new_project.py", *command, folder=folder, printed=told)  # type: ignore[arg-type]
        assert (code, said) == (0, "")
        told.seek(0)
        return Described(photos, told.read())


def is_equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return math.isclose(float(found), expected)
    return bool(found == expected)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_project_is_described_as_its_program_means_it(
    name: str, models: Path, tmp_path: Path
) -> None:
    sample = SAMPLES[name]
    described = describe(sample, tmp_path, models)
    assert described.script == sample.script
    for key, value in sample.training.items():
        assert is_equal(described.training.get(key), value), key
    for key, value in sample.general.items():
        assert is_equal(described.general.get(key), value), key
    for text in sample.told:
        assert text in described.told
    assert "would not begin" not in described.told


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_project_is_trained_to_its_first_step(name: str, models: Path, tmp_path: Path) -> None:
    sample = SAMPLES[name]
    describe(sample, tmp_path, models)
    photos = tmp_path / "photos"
    first, *_ = (photos / "prompts.txt").read_text(encoding="utf-8").splitlines()
    (photos / "prompts.txt").write_text(f"{first} --s 1\n", encoding="utf-8")
    run = photos / RUN_FILE
    text = run.read_text(encoding="utf-8")
    steps = parse_toml(text)["training"]["max_train_steps"]
    run.write_text(text.replace(f"max_train_steps = {steps}", "max_train_steps = 1"), encoding="utf-8")
    _, *commands = parse_toml(text)[PROJECT_TABLE]["commands"]
    for _, script, *words in commands:
        succeed_here(script, *words, folder=photos)

    (history,) = (photos / "output").glob("*-history.jsonl")
    rows = [json.loads(row) for row in history.read_text(encoding="utf-8").splitlines()]
    (started,) = [row["started"] for row in rows if "started" in row]
    in_use = dict([*started["changed"], *started["unchanged"]])
    for key, value in sample.training.items():
        if key != "max_train_steps":
            texts = value if isinstance(value, list) else [value]
            found = in_use[key].split(" ") if isinstance(value, list) else [in_use[key]]
            assert [*map(str, texts)] == found or math.isclose(float(found[0]), float(texts[0])), key
    assert [row for row in rows if row.get("step") == 1]
