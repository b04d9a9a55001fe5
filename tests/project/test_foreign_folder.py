"""A folder of somebody else: no code of it runs, and `run` writes below it, and sends nothing."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from modules.installation import RUN_CHECKS, RUN_GOES_ON
from modules.options import override_options
from modules.run_limits import limit_run
from project.run_options import RunOptions
from project.running import run_project
from tests.commands import ROOT
from tests.faults.messages import assert_one_message, run_here

HOSTILE = """open({ran!r}, "w").close()
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler
class Fast(SGD): pass
class Slow(LRScheduler): pass
def make(*args, **more): open({ran!r}, "w").close()
create_network = make
"""
POCKET = [*("--dit", ROOT / "pocket" / "dit.safetensors"), *("--vae", ROOT / "pocket" / "vae.safetensors")]
DEFAULT = {"task": "t2v-1.3B", "dataset_config": "dataset.toml", "output_dir": "output", "output_name": "new"}
DATASET = '[[datasets]]\nimage_directory = "."\ncache_directory = "cache"\nresolution = [64, 64]\n'
# names in a file, and what is said of them
IMPORTED = [
    ("optimizer_type", "hostile.Fast", "the package hostile is not installed"),
    ("optimizer_type", "packed.hostile.Fast", "the package packed is not installed"),
    ("optimizer_type", "os.system", "os is not a module of an installed package"),
    ("optimizer_type", "subprocess.Popen", "not a module of an installed package"),
    ("optimizer_type", "torch.save", "not an optimizer class"),
    ("optimizer_type", "torch.nn.Linear", "not an optimizer class"),
    ("optimizer_type", "tests.project.test_foreign_folder.Fast", "not a module of an installed package"),
    ("lr_scheduler_type", "hostile.Slow", "the package hostile is not installed"),
    ("lr_scheduler_type", "antigravity.Slow", "not a module of an installed package"),
    ("lr_scheduler_type", "unittest.__main__.Slow", "not a module of an installed package"),
    ("lr_scheduler_type", "torch.save", "not a learning-rate scheduler"),
    ("lr_scheduler_type", "transformers.dynamic_module_utils.get_class_in_module", "not a learning-rate"),
    ("lr_scheduler_type", "torch.optim.AdamW", "not a learning-rate scheduler"),
    ("network_module", "hostile", "the package hostile is not installed"),
    ("network_module", "packed.hostile", "the package packed is not installed"),
    ("network_module", "json.tool", "not a module of an installed package"),
    ("network_module", "torch.optim", "offers neither"),
]


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with code and a file of options; `ran` in the folder above says that the code ran."""
    folder = tmp_path / "foreign"
    (folder / "packed").mkdir(parents=True)
    for name in ("hostile.py", "packed/hostile.py", "sitecustomize.py"):
        (folder / name).write_text(HOSTILE.format(ran=str(tmp_path / "ran")), encoding="utf-8")
    (folder / "dataset.toml").write_text(DATASET, encoding="utf-8")
    return folder


def write_options(folder: Path, **more: Any) -> None:
    values = (
        DEFAULT
        | {word[2:]: path.as_posix() for word, path in zip(POCKET[::2], POCKET[1::2], strict=True)}
        | more
    )
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    (folder / "run.toml").write_text("\n".join(["[training]", *lines, ""]), encoding="utf-8")


def describe(folder: Path, *commands: list[str], **more: Any) -> None:
    """Write run.toml with these commands, or the training alone."""
    write_options(folder, **{"max_train_steps": 1, **more})
    listed = [["python", "tools/download.py"], *(commands or [["python", "wan_train_network.py"]])]
    own = f"[reelsmith]\nfiles = []\ncommands = {json.dumps(listed)}\n"
    with (folder / "run.toml").open("a", encoding="utf-8") as file:
        file.write(own)


@pytest.mark.parametrize(("option", "name", "told"), IMPORTED)
@pytest.mark.parametrize("limited", [False, True], ids=["typed", "run"])
def test_a_file_names_classes_of_installed_packages_alone(
    option: str, name: str, told: str, limited: bool, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {f"{option.removesuffix('_type').removesuffix('_module')}_args": ["module_path=hostile.py"]}
    write_options(foreign, **{option: name, **arguments})
    (foreign / "cat.txt").write_text("a cat", encoding="utf-8")
    monkeypatch.setenv(RUN_GOES_ON, RUN_CHECKS)  # options and files are checked, and no more
    with limit_run([foreign], []) if limited else nullcontext():
        code, said = run_here("wan_train_network.py", "--config_file", "run.toml", folder=foreign)
    assert_one_message(code, said, told, name)
    assert not (foreign.parent / "ran").exists()
    assert [*foreign.parent.iterdir()] == [foreign]


@pytest.mark.parametrize("words", [["--optimizer_type", "hostile.Fast"], ["--network_module", "hostile"]])
def test_words_of_the_commands_of_a_run_are_from_a_file_too(words: list[str], foreign: Path) -> None:
    write_options(foreign)
    with limit_run([foreign], []):
        code, said = run_here("wan_train_network.py", "--config_file", "run.toml", *words, folder=foreign)
    assert_one_message(code, said, "hostile is not installed", "start the training itself")
    assert not (foreign.parent / "ran").exists()


OUTSIDE = [
    ({"output_dir": "/elsewhere"}, "--output_dir /elsewhere"),
    ({"output_dir": "../../x"}, "--output_dir"),
    ({"logging_dir": "../../x"}, "--logging_dir"),
    ({"logging_dir": "~/x"}, "--logging_dir"),
]


@pytest.mark.parametrize(("keys", "typed"), OUTSIDE)
def test_a_run_writes_nowhere_else_unasked(keys: dict[str, str], typed: str, foreign: Path) -> None:
    describe(foreign, **keys)
    code, said = run_here("run_project.py", foreign, folder=foreign.parent)
    assert_one_message(code, said, "is outside of", f"run {foreign} {typed}")
    assert [*foreign.parent.iterdir()] == [foreign]


def test_what_is_to_be_typed_keeps_what_was_typed(foreign: Path) -> None:
    describe(foreign, output_dir="../../x")
    words = [foreign, "--may_write", "a", "b c", "--may_write", "d"]
    code, said = run_here("run_project.py", *words, folder=foreign.parent)
    assert_one_message(code, said, f"run {foreign} --may_write a 'b c' d --output_dir ")
    options = RunOptions(folder=Path("x"), download=True, output_dir=Path("o"), dry_run=True)
    assert options.going_on.endswith("reelsmith.py run x --download --output_dir o")


COMMANDS = [
    (
        ["wan_cache_latents.py", "--dataset_config", "dataset.toml", "--check", "--html", "../x.html"],
        "may_write",
    ),
    (["wan_train_network.py", "--config_file", "run.toml", "--output_d", "../x"], "output_dir"),
    (["wan_train_network.py", "--config_file", "run.toml", "--log_tracker_config", "hostile.py"], "typ"),
    (["wan_train_network.py", "--config_file", "run.toml", "--log_with", "wandb"], "--log_with wandb"),
    (["wan_train_network.py", "--config_file", "run.toml", "--huggingface_repo_id", "a/b"], "repo_id a/b"),
    (["wan_train_network.py", "--config_file", "run.toml", "--resume_from_huggingface"], "unasked"),
    (["wan_generate_video.py", "--prompt", "a", "--save_path", "../x"], "may_write"),
    (["download.py", "--family", "wan", "--to", "../x"], "--models"),
]


@pytest.mark.parametrize(("words", "told"), COMMANDS)
def test_nor_does_a_command_of_it(words: list[str], told: str, foreign: Path) -> None:
    write_options(foreign)
    more = POCKET if words[0] == "wan_generate_video.py" else []
    script = "tools/download.py" if words[0] == "download.py" else words[0]
    with limit_run([foreign], []):
        code, said = run_here(script, *words[1:], *more, folder=foreign)
    assert_one_message(code, said, "unasked", told)
    assert [*foreign.parent.iterdir()] == [foreign]


@pytest.mark.parametrize("cache", ["/elsewhere", "../x", "linked/cache", None])
def test_nor_does_its_dataset(cache: str | None, foreign: Path) -> None:
    """Without a cache directory caches lie beside the pictures, which are elsewhere here."""
    (foreign / "linked").symlink_to("..", target_is_directory=True)
    key = "" if cache is None else f'cache_directory = "{cache}"\n'
    text = f'[[datasets]]\nimage_directory = ".."\nresolution = [64, 64]\n{key}'
    (foreign / "dataset.toml").write_text(text, encoding="utf-8")
    words = ["--dataset_config", "dataset.toml", "--check"]
    with limit_run([foreign], []):
        code, said = run_here("wan_cache_latents.py", *words, folder=foreign)
    assert_one_message(code, said, "cache_directory", "is outside of", "--may_write")
    with limit_run([foreign, foreign.parent, Path("/elsewhere")], []):
        assert "lies outside" not in run_here("wan_cache_latents.py", *words, folder=foreign)[1]


def test_typed_folders_take_the_place_of_those_in_the_file(
    foreign: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    describe(foreign, output_dir="/elsewhere", logging_dir="/logs")
    monkeypatch.chdir(foreign.parent)
    typed = {"output_dir": Path("my results"), "logging_dir": Path("logs"), "log_with": "wandb"}
    run_project(override_options(RunOptions(folder=foreign, dry_run=True), typed))
    here = foreign.parent
    places = f"--output_dir '{here / 'my results'}' --logging_dir {here / 'logs'} --log_with wandb"
    (training,) = [line for line in capsys.readouterr().out.splitlines() if "wan_train_network.py" in line]
    assert training.endswith(places)
