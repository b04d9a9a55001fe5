"""One tiny project for all tests of faults: models, clips, caches, a training. Tests read it and damage
copies of what is in it.
"""

import functools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.commands import ROOT, run_python
from tests.dataset.making import make_clip
from tests.faults.messages import succeed_here
from tests.faults.mistakes import COMMANDS
from tests.faults.runs import (
    DYING,
    FAMILIES,
    WAN,
    Scripts,
    Undisturbed,
    assert_whole,
    write_project,
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test that needs a project runs for every family, unless its module says FAMILIES.

    Those of other families than Wan are slow: many processes each, through code that all families share.
    """
    if "scripts" in metafunc.fixturenames:
        families = getattr(metafunc.module, "FAMILIES", FAMILIES)
        cases = [
            pytest.param(family, id=family.name, marks=[] if family is WAN else [pytest.mark.slow])
            for family in families
        ]
        metafunc.parametrize("scripts", cases, indirect=True, scope="session")


@pytest.fixture(scope="session")
def scripts(request: pytest.FixtureRequest) -> Scripts:
    """The commands of the family whose turn it is."""
    found: Scripts = request.param
    return found


# pytest drops a fixture as soon as a test of another family comes: these two keep what they made
@pytest.fixture(scope="session")
def make_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Scripts], Path]:
    """Make a folder in which every command of a family works, once."""

    @functools.cache
    def make(scripts: Scripts) -> Path:
        folder = tmp_path_factory.mktemp("project")
        write_project(folder, scripts)
        succeed_here(*scripts.cache_latents, folder=folder)
        succeed_here(*scripts.cache_texts, folder=folder)
        return folder

    return make


@pytest.fixture(scope="session")
def train_undisturbed(
    make_project: Callable[[Scripts], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Scripts], Undisturbed]:
    """Train a family, once."""

    @functools.cache
    def train(scripts: Scripts) -> Undisturbed:
        folder = tmp_path_factory.mktemp("undisturbed")
        started, counts, output = time.monotonic(), folder / "passed.json", folder / "out"
        script, *words = scripts.train
        command = (DYING, "count", counts, ROOT / script, *words, "--output_dir", output)
        run_python(*command, folder=make_project(scripts))
        seconds = time.monotonic() - started
        assert_whole(output)
        return Undisturbed(output, json.loads(counts.read_text(encoding="utf-8")), seconds)

    return train


@pytest.fixture(scope="session")
def project(scripts: Scripts, make_project: Callable[[Scripts], Path]) -> Path:
    return make_project(scripts)


@pytest.fixture(scope="session")
def undisturbed(scripts: Scripts, train_undisturbed: Callable[[Scripts], Undisturbed]) -> Undisturbed:
    return train_undisturbed(scripts)


@pytest.fixture(scope="session")
def made_projects(make_project: Callable[[Scripts], Path]) -> dict[str, Path]:
    """For each family a folder in which the good commands work."""
    found = {scripts.name: make_project(scripts) for scripts in FAMILIES}
    for scripts in FAMILIES:
        folder = found[scripts.name]
        text = (folder / "dataset.toml").read_text(encoding="utf-8").replace('/cache"', '/none"')
        (folder / "uncached.toml").write_text(text, encoding="utf-8")
        words = (*COMMANDS[scripts.train_script].words, "--max_train_steps", "1")
        succeed_here(*words, "--output_name", "lora", "--output_dir", ".", folder=folder)
        for name in ("second", "latent"):  # that one is never read
            shutil.copy(folder / "lora.safetensors", folder / f"{name}.safetensors")
    return found


@pytest.fixture(scope="session")
def bad(made_projects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that no option can take."""
    folder = tmp_path_factory.mktemp("bad files")
    (folder / "folder").mkdir()
    texts = {
        "lfs": "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
        "page": "\ufeff\n<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>",
        "empty": "",
    }
    for name, text in texts.items():
        for suffix in (".safetensors", ".json"):
            (folder / f"{name}{suffix}").write_text(text, encoding="utf-8")
    for name, text in {
        "text.txt": "nothing",
        "text.toml": "nothing",
        "prompts.md": "a cat",
        "samples.txt": "a bird\na cat --w abc\na dog --s x",
        "none_in.toml": "learning_rate = None",
        "typo.toml": "learning_rat = 1e-4",
        "section.toml": '[run]\nmax_train_steps = "ten"',
        "switch.toml": 'sdpa = "yes"',
        "choice.toml": 'mixed_precision = "bf61"',
    }.items():
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("utf16.txt", "utf16.toml"):
        (folder / name).write_text("a cat", encoding="utf-16")
    make_clip(folder / "clip.mp4", 3).rename(folder / "clip.png")
    full = (made_projects["wan"] / "model" / "dit.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(full[: len(full) * 2 // 3])
    (folder / "three").mkdir()
    for name in "abc":
        (folder / "three" / f"{name}.safetensors").write_bytes(full)
    tensors = load_file(made_projects["wan"] / "lora.safetensors")
    other = {name.replace("_blocks_", "_layers_"): tensor for name, tensor in tensors.items()}
    save_file(other, folder / "other_lora.safetensors")
    return folder
