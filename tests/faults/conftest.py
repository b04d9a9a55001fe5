"""One tiny project for all tests of faults: models, clips, caches, a training. Tests read it and damage
copies of what is in it.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.commands import ROOT, run_python, run_script
from tests.faults.messages import succeed_here
from tests.faults.mistakes import COMMANDS, PROJECTS
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
    """Every test that needs a project runs for every family, unless its module says FAMILIES."""
    if "scripts" in metafunc.fixturenames:
        families = getattr(metafunc.module, "FAMILIES", FAMILIES)
        metafunc.parametrize(
            "scripts", families, ids=lambda scripts: scripts.name, indirect=True, scope="session"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of other families than Wan as slow, before slow ones are left out: many processes each,
    through code that all families share.
    """
    for item in items:
        found = getattr(item, "callspec", None)
        scripts = None if found is None else found.params.get("scripts")
        if scripts not in (None, WAN):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def scripts(request: pytest.FixtureRequest) -> Scripts:
    """The commands of the family whose turn it is."""
    found: Scripts = request.param
    return found


@pytest.fixture(scope="session")
def projects() -> dict[str, Path]:
    """What `project` made, by family: pytest drops a fixture as soon as a test of another family comes."""
    return {}


@pytest.fixture(scope="session")
def trainings() -> dict[str, Undisturbed]:
    """What `undisturbed` made, by family."""
    return {}


@pytest.fixture(scope="session")
def project(scripts: Scripts, projects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of `scripts` works."""
    if scripts.name not in projects:
        folder = tmp_path_factory.mktemp("project")
        write_project(folder, scripts)
        run_script(*scripts.cache_latents, folder=folder)
        run_script(*scripts.cache_texts, folder=folder)
        projects[scripts.name] = folder
    return projects[scripts.name]


@pytest.fixture(scope="session")
def undisturbed(
    scripts: Scripts,
    project: Path,
    trainings: dict[str, Undisturbed],
    tmp_path_factory: pytest.TempPathFactory,
) -> Undisturbed:
    """A training that nothing happened to."""
    if scripts.name not in trainings:
        folder = tmp_path_factory.mktemp("undisturbed")
        started, counts = time.monotonic(), folder / "passed.json"
        script, *words = scripts.train
        run_python(
            DYING, "count", counts, ROOT / script, *words, "--output_dir", folder / "out", folder=project
        )
        seconds = time.monotonic() - started
        assert_whole(folder / "out")
        passed = json.loads(counts.read_text(encoding="utf-8"))
        trainings[scripts.name] = Undisturbed(folder / "out", passed, seconds)
    return trainings[scripts.name]


@pytest.fixture(scope="session")
def made_projects(projects: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each family a folder in which the good commands work."""
    for name, scripts in PROJECTS.items():
        if name not in projects:
            folder = tmp_path_factory.mktemp("project")
            write_project(folder, scripts)
            for command in (scripts.cache_latents, scripts.cache_texts):
                succeed_here(*command, folder=folder)
            projects[name] = folder
        folder = projects[name]
        text = (folder / "dataset.toml").read_text(encoding="utf-8").replace('/cache"', '/none"')
        (folder / "uncached.toml").write_text(text, encoding="utf-8")
        if not (folder / "lora.safetensors").exists():
            words = (*COMMANDS[scripts.train_script].words, "--max_train_steps", "1")
            succeed_here(*words, "--output_name", "lora", "--output_dir", ".", folder=folder)
        shutil.copy(folder / "lora.safetensors", folder / "second.safetensors")
        if not (folder / "latent.safetensors").exists():
            shutil.copy(folder / "lora.safetensors", folder / "latent.safetensors")  # never read
    return {name: projects[name] for name in PROJECTS}


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
    whole = (made_projects["wan"] / "model" / "dit.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "three").mkdir()
    for name in "abc":
        (folder / "three" / f"{name}.safetensors").write_bytes(whole)
    tensors = load_file(made_projects["wan"] / "lora.safetensors")
    other = {name.replace("_blocks_", "_layers_"): tensor for name, tensor in tensors.items()}
    save_file(other, folder / "other_lora.safetensors")
    return folder
