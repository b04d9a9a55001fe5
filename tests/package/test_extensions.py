"""Packages outside of the tree bring features, networks, optimizers, families, pages, if they are named."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from modules.extensions import GROUPS
from modules.installation import EXTENSIONS
from modules.media.writing import write_video
from tests.commands import ROOT, assert_user_error, run_program
from tests.tiny.families import FAMILIES
from tests.tiny.project import moving_square
from training.reports.history import history_path, read_history, read_session

PACKAGES = ROOT / "tests" / "data" / "extensions"
# what each example announces: group, value
ANNOUNCED = {
    "glow": ("reelsmith.features", "reelsmith_glow:GLOW"),
    "gradient_noise": ("reelsmith.features", "reelsmith_gradient_noise:GRADIENT_NOISE"),
    "rise": ("reelsmith.features", "reelsmith_rise:RISE"),
    "half": ("reelsmith.networks", "reelsmith_half:HALF"),
    "drift": ("reelsmith.optimizers", "reelsmith_drift:Drift"),
    "hello": ("reelsmith.pages", "reelsmith_hello:make_routes"),
    "dawn": ("reelsmith.families", "reelsmith_dawn"),
}
WAN = FAMILIES[0]
STEPS = ["--seed", "1", "--max_train_steps", "2", "--output_dir", "output"]


def install(target: Path, *names: str) -> None:
    """Install examples into a folder, with what pip writes next to a package."""
    for name in names:
        shutil.copytree(PACKAGES / name, target, dirs_exist_ok=True)
        group, value = ANNOUNCED[name]
        notes = target / f"reelsmith_{name}-1.0.dist-info"
        notes.mkdir()
        (notes / "METADATA").write_text(f"Metadata-Version: 2.1\nName: reelsmith-{name}\nVersion: 1.0\n")
        (notes / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")


def run(target: Path, folder: Path, *words: object, named: str = "", check: bool = True):  # type: ignore[no-untyped-def]
    """Run a script with the folder on the path, and extensions named."""
    environment = {"PYTHONPATH": os.pathsep.join([str(target), str(ROOT)]), EXTENSIONS: named}
    return run_program(sys.executable, *words, folder=folder, environment=environment, check=check)


def test_the_guide_shows_the_example_as_it_is() -> None:
    guide = (ROOT / "docs" / "extensions.md").read_text(encoding="utf-8")
    assert f"```python\n{(PACKAGES / 'glow' / 'reelsmith_glow.py').read_text(encoding='utf-8')}```" in guide


def test_each_group_has_an_example() -> None:
    assert {group for group, _ in ANNOUNCED.values()} == set(GROUPS)


@pytest.mark.slow
def test_a_feature_a_network_and_an_optimizer_act_in_a_training(tmp_path: Path) -> None:
    target = tmp_path / "site"
    install(target, "glow", "half", "drift")
    folder = tmp_path / "work"
    WAN.prepare(folder)
    for script, *words in (WAN.cache_latents, WAN.cache_texts):
        run(target, folder, ROOT / script, *words)
    training = [ROOT / WAN.train[0], *WAN.train[1:], *STEPS, "--output_name"]

    run(target, folder, *training, "plain")
    run(target, folder, *training, "silent", named="glow,half,drift")
    run(target, folder, *training, "glow", "--glow", "0.5", named="glow")
    run(target, folder, *training, "half", "--network_args", "half=True", named="half")
    drift = [ROOT / "reelsmith.py", "--extensions", "drift", "train", "wan", *WAN.train[1:], *STEPS]
    run(target, folder, *drift, "--output_name", "drift", "--optimizer_type", "drift")

    loras = {path.stem: load_file(path) for path in (folder / "output").glob("*.safetensors")}
    same = {name: all(lora[key].equal(loras["plain"][key]) for key in lora) for name, lora in loras.items()}
    assert same == {"plain": True, "silent": True, "glow": False, "half": False, "drift": False}
    with safe_open(folder / "output" / "glow.safetensors", "pt") as file:
        assert "0.5" in json.dumps(file.metadata())


def paste(target: Path, folder: Path, line: str, *more: str):  # type: ignore[no-untyped-def]
    """Type a printed line in a new terminal, in which no extension is named."""
    python, script, *words = shlex.split(line)
    assert python == "python", line
    return run(target, folder, ROOT / script, *words, *more)  # `run_program` leaves its folder out


def read_commands(output: Path, name: str) -> dict[str, str]:
    """The command lines on the page of a training, by title."""
    path = history_path(output, name)
    session = read_session(path)
    assert session is not None
    return {command.title: command.bash for command in read_history(path, session).commands}


@pytest.mark.slow
def test_what_a_run_with_extensions_prints_is_typed_as_it_is(tmp_path: Path) -> None:
    target, folder = tmp_path / "si te", tmp_path / "a b \u00fc"
    install(target, "glow", "drift")
    folder.mkdir()
    WAN.prepare(folder)
    for script, *words in (WAN.cache_latents, WAN.cache_texts):
        run(target, folder, ROOT / script, *words)
    front = [ROOT / "reelsmith.py", "--extensions", "glow,drift"]
    words = ["--optimizer_type", "drift", "--glow", "0.5", "--output_name", "lora"]

    done = run(target, folder, *front, "train", "wan", *WAN.train[1:], *STEPS, *words)

    lines = read_commands(folder / "output", "lora")
    assert "--extensions glow,drift generate wan" in " ".join(done.stderr.split())
    longer = "Train longer, as a new run from the trained file"
    paste(target, folder, lines[longer], "--overwrite")
    paste(target, folder, lines["This run, as it was started"], "--output_name", "again")
    small = ["--video_size", "32", "32", "--infer_steps", "1", "--video_length", "5"]
    paste(target, folder, lines["Generate with it"], *small)
    assert any((folder / "output" / "generated").iterdir())
    first, again = (load_file(folder / "output" / f"{name}.safetensors") for name in ("lora", "again"))
    assert first.keys() == again.keys()


@pytest.mark.slow
def test_what_new_and_run_print_is_typed_as_it_is(tmp_path: Path) -> None:
    """With the models, the output and the extension elsewhere than in the folder where it is typed."""
    target, place = tmp_path / "si te", tmp_path / "a b \u00fc"
    install(target, "glow")
    place.mkdir()
    for number in range(2):
        write_video(place / "my clips" / f"{number}.mp4", moving_square(9, 48, 32, number), fps=24)
    (place / "mo dels").mkdir()
    files = [f"{name}={ROOT / 'pocket' / name}.safetensors" for name in ("dit", "vae", "t5")]
    models = [word for file in files for word in ("--model_file", file)]
    front = [ROOT / "reelsmith.py", "--extensions", "glow"]
    chosen = ["--family", "wan", "--task", "t2v-1.3B", "--memory", "0", "--max_train_steps", "1"]
    words = [*chosen, "--models", "mo dels", *models]

    said = run(target, place, *front, "new", "my clips", *words).stdout
    again = next(line for line in said.splitlines() if "WORD" in line)
    said = paste(target, place, again.replace("WORD", "zorb")).stdout
    start = re.findall("^(python .*) checks, caches and trains$", said, re.MULTILINE)
    said = paste(target, place, start[0], "--check", "--output_dir", "out put").stdout
    start = re.findall("^The run can begin: (.*)$", said, re.MULTILINE)
    (place / "my clips" / "prompts.txt").write_text("a cat --w 32 --h 32 --f 5 --s 1\n", encoding="utf-8")
    paste(target, place, start[0])

    assert (place / "out put" / "my_clips.safetensors").is_file()
    generate = read_commands(place / "out put", "my_clips")["Generate with it"]
    assert "--extensions glow" in generate
    paste(target, place / "my clips", generate)

    recipe = run(target, place, *front, "recipe", "save", place / "out put").stdout
    (again,) = re.findall("^(python .*) trains another folder with it$", recipe, re.MULTILINE)
    shutil.copytree(place / "my clips", place / "FOLDER", ignore=shutil.ignore_patterns("run.toml"))
    said = paste(
        target, place, again, "--overwrite", "--memory", "0", *models, "--trigger_word", "zorb"
    ).stdout
    assert "network_dim = 32" in (place / "FOLDER" / "run.toml").read_text(encoding="utf-8")
    packed = run(target, place, *front, "pack", "my clips", "--output", "other/p k.zip").stdout
    (unpack,) = re.findall("^On the other machine: (.*)$", packed, re.MULTILINE)
    said = paste(target, place / "other", unpack).stdout
    (next_line,) = re.findall("^Next: (.*)$", said, re.MULTILINE)
    assert "--extensions glow run 'my clips'" in next_line
    paste(target, place / "other", next_line, "--dry_run")


def test_options_of_an_extension_are_in_the_help_and_are_checked(tmp_path: Path) -> None:
    install(tmp_path, "glow")
    script = ROOT / "wan_train_network.py"

    shown = run(tmp_path, tmp_path, script, "--help", named="glow").stdout
    wrong = run(tmp_path, tmp_path, script, "--glow", "5", "--sdpa", named="glow", check=False)
    unnamed = run(tmp_path, tmp_path, script, "--glow", "0.5", check=False)

    assert "--glow X" in shown
    assert_user_error(wrong, "--glow 5")
    assert_user_error(unnamed, "Unknown option --glow")


def test_what_is_installed_and_not_named_is_never_imported(tmp_path: Path) -> None:
    install(tmp_path, *ANNOUNCED)
    for path in tmp_path.rglob("*.py"):
        path.write_text("raise SystemExit('it ran')", encoding="utf-8")
    code = "import training.features, networks.kinds, protocols.families, sys; print(*sys.modules)"

    loaded = run(tmp_path, tmp_path, "-c", code).stdout.split()
    done = run(tmp_path, tmp_path, ROOT / "wan_train_network.py", "-h")

    assert not [name for name in loaded if "reelsmith_" in name]
    assert "modules.extensions" not in loaded
    assert "it ran" not in done.stdout + done.stderr


def test_wrong_names_and_broken_packages_are_named(tmp_path: Path) -> None:
    install(tmp_path, "glow", "half")
    script = ROOT / "wan_train_network.py"

    unknown = run(tmp_path, tmp_path, script, "-h", named="glwo", check=False)
    none = run(tmp_path / "none", tmp_path, script, "-h", named="glow", check=False)
    (tmp_path / "reelsmith_glow.py").write_text("import nothing_there", encoding="utf-8")
    broken = run(tmp_path, tmp_path, script, "-h", named="glow", check=False)

    assert_user_error(unknown, "extension glwo: no installed package provides it. Installed are glow, half")
    assert_user_error(none, "extension glow: no installed package provides it. None is installed")
    assert_user_error(broken, "extension glow (reelsmith_glow:GLOW) cannot be loaded", "--extensions")
    for front in (["train", "wan"], ["new", "."]):  # as it is while modules are imported
        words = [ROOT / "reelsmith.py", "--extensions", "glow", *front]
        assert_user_error(
            run(tmp_path, tmp_path, *words, check=False), "cannot be loaded: ModuleNotFoundError"
        )


def test_what_is_installed_and_not_named_is_told_where_its_name_is_typed(tmp_path: Path) -> None:
    install(tmp_path, "glow", "half", "drift")
    front = [ROOT / "reelsmith.py", "--extensions", "half", "train", "wan"]
    optimizer = ["--dataset_config", "x.toml", "--output_dir", "o", "--output_name", "x", "--dit", "x"]
    config = tmp_path / "config.toml"
    config.write_text("glow_strength = 1\n", encoding="utf-8")

    option = run(tmp_path, tmp_path, *front, "--glow", "1", check=False)
    value = run(tmp_path, tmp_path, *front, *optimizer, "--optimizer_type", "drift", check=False)
    in_file = run(tmp_path, tmp_path, ROOT / "wan_train_network.py", "--config_file", config, check=False)
    other = run(tmp_path, tmp_path, ROOT / "wan_train_network.py", "--glo", "1", check=False)
    behind = run(tmp_path, tmp_path, ROOT / "wan_train_network.py", "--extensions", "half", check=False)

    advice = (
        "The extension {} is installed, but not switched on. Switch it on: python reelsmith.py --extensions"
    )
    assert_user_error(option, f"Unknown option --glow. {advice.format('glow')} half,glow train wan")
    assert_user_error(value, f"drift: unknown. {advice.format('drift')} half,drift train wan")
    assert_user_error(in_file, f"called glow_strength. {advice.format('glow')} glow train wan")
    assert "is installed" not in other.stderr
    assert_user_error(behind, "It stands before the command: python reelsmith.py --extensions NAMES")


def test_two_packages_with_one_name_are_refused(tmp_path: Path) -> None:
    install(tmp_path, "glow")
    shutil.copytree(tmp_path / "reelsmith_glow-1.0.dist-info", tmp_path / "other-1.0.dist-info")
    metadata = tmp_path / "other-1.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")

    done = run(tmp_path, tmp_path, ROOT / "wan_train_network.py", "-h", named="glow", check=False)

    assert_user_error(done, "other and reelsmith-glow both provide one of this name")


PAGE = """
from pathlib import Path
from browser.runs.runs import Runs
from browser.core.server import make_app
routes = make_app(Runs([Path(".")]), read_only=True).app.routes
print([route.endpoint(None).body.decode() for route in routes if route.path == "/hello"])
"""


def test_a_page_is_served_behind_the_gate_if_it_is_named(tmp_path: Path) -> None:
    install(tmp_path, "hello")

    assert run(tmp_path, tmp_path, "-c", PAGE, named="hello").stdout == "['hello, 0 runs']\n"
    assert run(tmp_path, tmp_path, "-c", PAGE).stdout == "[]\n"


@pytest.mark.slow
def test_a_family_trains_by_its_own_script(tmp_path: Path) -> None:
    target = tmp_path / "site"
    install(target, "dawn")
    folder = tmp_path / "work"
    WAN.prepare(folder)
    for script, *words in (WAN.cache_latents, WAN.cache_texts):
        run(target, folder, ROOT / script, *words)
    training = [*WAN.train[1:], *STEPS, "--output_name", "lora"]

    done = run(target, folder, "-m", "reelsmith_dawn.train", *training, named="dawn")

    with safe_open(folder / "output" / "lora.safetensors", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "dawn"
    assert "python -m reelsmith_dawn.train --network_module" in done.stderr
    assert "generate" not in done.stderr  # the example has no script for it
    lines = read_commands(folder / "output", "lora")
    longer = shlex.split(lines["Train longer, as a new run from the trained file"])
    run(target, folder, *longer[1:], "--overwrite", named="dawn")


def test_a_module_of_a_checkout_has_one_copy_under_both_names() -> None:
    code = (
        "import modules.errors, reelsmith.modules.errors as other, reelsmith.wan.names, wan.names; "
        "print(other is modules.errors, reelsmith.wan.names.WAN is wan.names.WAN, other.__spec__.name)"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)

    assert done.stdout == "True True modules.errors\n"
