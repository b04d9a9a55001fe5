"""Pairs through the commands that users type, on tiny models of video and picture families."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modules.media.writing import write_video
from tests.faults.messages import assert_one_message, run_here
from tests.tiny.families import family_called
from tests.tiny.runs import RUN, TinyProject, make_project
from tests.training.toy import metadata_of, same

EXACT = ("--learning_rate", "1e-2", "--preference", "2000")
SMALL = ("--gradient_checkpointing", "--blocks_to_swap", "1")
KINDS = [
    "wan t2v-1.3B",
    "z_image",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux", "krea2", "anima")),
]


def add_pairs(project: TinyProject) -> None:
    """Give each clip or picture a worse one, and the table its folder."""
    rejected = project.folder / "worse"
    rejected.mkdir()
    random = numpy.random.default_rng(7)
    for path in sorted((project.folder / "clips").iterdir()):
        if path.suffix == ".png":
            pixels = random.integers(0, 256, (48, 48, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(rejected / path.name)
        elif path.suffix == ".mp4":
            frames = random.integers(0, 256, (9, 48, 48, 3), dtype=numpy.uint8)
            write_video(rejected / path.name, list(frames), 16)
    config = project.folder / "dataset.toml"
    text = config.read_text(encoding="utf-8").rstrip()
    config.write_text(f'{text}\nworse_directory = "{rejected.as_posix()}"\n', encoding="utf-8")


@pytest.fixture(scope="module", params=KINDS)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """With pairs, which are not cached yet."""
    made = make_project(family_called(request.param), tmp_path_factory.mktemp("a project"))
    made.train("plain", "--learning_rate", "1e-2")
    add_pairs(made)
    return made


def test_old_caches_are_noticed_and_made_again(project: TinyProject) -> None:
    said = run_here(*project.family.train, *RUN, "--output_dir", "x", *EXACT, folder=project.folder)
    message = assert_one_message(*said, "it has no latents of a worse one")
    assert "_cache_latents.py" in message

    before = {path: load_file(path)[name] for path, name in latents_of(project, "latents_")}
    project.run(*project.family.cache_latents)

    for path, name in latents_of(project, "latents_worse_"):
        tensors = load_file(path)
        better = name.replace("latents_worse_", "latents_")
        assert torch.equal(tensors[better], before[path])
        assert tensors[name].shape == tensors[better].shape
        assert not torch.equal(tensors[name], tensors[better])
    times = {path: path.stat().st_mtime_ns for path in before}
    project.run(*project.family.cache_latents)
    assert {path: path.stat().st_mtime_ns for path in before} == times


def latents_of(project: TinyProject, start: str) -> list[tuple[Path, str]]:
    """Return the caches of latents and the names of their tensors that begin so."""
    found = []
    for path in sorted((project.folder / "cache").glob("*.safetensors")):
        names = sorted(name for name in load_file(path) if name.startswith(start))
        names = [name for name in names if start != "latents_" or name[len(start)].isdigit()]
        found += [(path, name) for name in names]
    assert found
    return found


@pytest.mark.slow_cases("z_image")
def test_pairs_are_learned_and_resumed_with_equal_bytes(project: TinyProject) -> None:
    project.run(*project.family.cache_latents)
    full = project.train("whole", *EXACT, "--save_state", "--save_every_n_steps", "2")

    assert not same(full, load_file(project.folder / "plain" / "x.safetensors"))
    resume = ("--resume", "whole/x-step00000002-state")
    assert same(project.train("resumed", *EXACT, *resume), full)
    small = project.train("small", *EXACT, *SMALL)
    for name, tensor in full.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-3, atol=1e-5)
    metadata = metadata_of(project.folder / "whole" / "x.safetensors")
    assert metadata["ss_preference"] == "2000.0"
    lines = (project.folder / "whole").rglob("*.jsonl")
    events = [json.loads(line) for path in lines for line in path.read_text("utf-8").splitlines()]
    first = next(event for event in events if "pairs" in event)
    assert {"preference/better", "preference/worse", "preference/right"} == first["pairs"].keys()
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    project.run(*project.family.train, *RUN, "--output_dir", "planned", *EXACT, "--plan", "24")
    project.run(*project.family.train, *RUN, "--output_dir", "checked", *EXACT, "--check")
    assert same(
        project.train("unused", "--learning_rate", "1e-2"),
        load_file(project.folder / "plain" / "x.safetensors"),
    )


def test_pairs_of_a_list_are_those_of_folders(project: TinyProject) -> None:
    """Its lines name the worse ones as worse_path; one line without is refused."""
    project.run(*project.family.cache_latents)
    folder = project.folder
    rows = []
    for path in sorted((folder / "clips").iterdir()):
        if path.suffix not in {".png", ".mp4"}:
            continue
        key = "image_path" if path.suffix == ".png" else "video_path"
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        rejected = (folder / "worse" / path.name).as_posix()
        rows.append({key: path.as_posix(), "caption": caption, "worse_path": rejected})
    text = (folder / "dataset.toml").read_text(encoding="utf-8")
    table = re.sub(r"(?m)^(?:image|video)_directory.*$", 'jsonl_file = "pairs.jsonl"', text)
    kind = "image" if "image_path" in rows[0] else "video"
    table = table.replace("jsonl_file", f"{kind}_jsonl_file")
    table = re.sub(r"(?m)^worse_directory.*$", "", table)
    table = re.sub(r"(?m)^(cache_directory = ).*$", r'\1"listed"', table)
    (folder / "listed.toml").write_text(table, encoding="utf-8")
    listed = ("--dataset_config", "listed.toml")

    write_rows(folder / "pairs.jsonl", rows)
    project.run(*with_config(project.family.cache_latents), *listed)
    project.run(*with_config(project.family.cache_texts), *listed)
    command = (*with_config(project.family.train), *listed, *RUN, *EXACT)
    project.run(*command, "--output_dir", "listed lora")

    for path, name in latents_of(project, "latents_worse_"):
        assert torch.equal(load_file(folder / "listed" / path.name)[name], load_file(path)[name])
    del rows[0]["worse_path"]
    write_rows(folder / "pairs.jsonl", rows)
    said = run_here(*with_config(project.family.cache_latents), *listed, folder=folder)
    assert_one_message(*said, "no worse_path, while others have", remedy=False)


def with_config(words: Sequence[str]) -> list[str]:
    """Return a command without its dataset file."""
    place = words.index("--dataset_config")
    return [*words[:place], *words[place + 2 :]]


def write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def test_a_pair_of_two_sizes_and_a_missing_one_are_told(project: TinyProject) -> None:
    rejected = project.folder / "worse"
    kept = project.folder / "kept"
    shutil.copytree(rejected, kept)
    path = min(rejected.iterdir())
    try:
        if path.suffix == ".png":
            Image.new("RGB", (40, 48)).save(path)
        else:
            write_video(path, [numpy.zeros((48, 40, 3), numpy.uint8)] * 9, 16)
        said = run_here(*project.family.cache_latents, folder=project.folder)
        assert "both of a pair need one size" in "".join(map(str, said))
        path.unlink()
        said = run_here(*project.family.cache_latents, folder=project.folder)
        assert "has no worse one for it" in "".join(map(str, said))
    finally:
        shutil.rmtree(rejected)
        kept.rename(rejected)
