"""The recipes in docs/clusters: bash runs each with programs that note their words, and parsers of the real
programs read those; the recipe of torchrun trains in two local groups that stand for machines.
"""

import json
import os
import runpy
import shlex
import socket
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch.distributed.run import get_args_parser

from dataset.options import CachingOptions, read_latent_caching
from modules.script_options import parse_options
from project.run_options import RunOptions
from project.unpacking import UnpackOptions
from protocols.families import FAMILIES
from tests.commands import QUIET, ROOT
from tests.faults.messages import succeed_here
from tests.tiny.project import lay_out_models, write_clips
from tests.waiting import PATIENCE
from training.options import TrainedNetworkOptions, read_training

FOLDER = ROOT / "docs" / "clusters"
FILES = sorted(path.name for path in FOLDER.iterdir())
WAN = FAMILIES["wan"]
NOTING = """import json, os, sys
with open(os.environ["NOTED"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[1]), *sys.argv[2:]]) + chr(10))
"""
# a line that names a program has no room for a blank in its path
NOTE = f'#!/bin/bash\nexec {shlex.quote(sys.executable)} -c {shlex.quote(NOTING)} "$0" "$@"\n'
PROGRAMS = {
    "torchrun": NOTE,
    "python": NOTE,
    # runs the words behind its options, as srun does on each machine
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/bash\necho head\necho other\n",
}
GIVEN = {  # what who starts a recipe sets
    "torchrun.sh": {"HEAD": "head", "MACHINES": "2"},
    "cache.sh": {"PARTS": "8", "PART": "3"},
    "train.sbatch": {"SLURM_JOB_NODELIST": "head,other", "SLURM_NNODES": "2", "SLURM_JOB_ID": "17"},
    "cache.sbatch": {"SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_ID": "3"},
    "train.sky.yaml": {"SKYPILOT_NODE_IPS": "head\nother", "SKYPILOT_NUM_NODES": "2"},
    "cache.sky.yaml": {"SKYPILOT_NUM_NODES": "8", "SKYPILOT_NODE_RANK": "3"},
}
CHANGES = {"ln", "cp"}  # commands on files, for a bucket that is not here


def run_recipe(name: str, folder: Path) -> list[list[str]]:
    """Run a recipe; return the words of each program that it starts."""
    programs = folder / "programs"
    programs.mkdir()
    for program, text in {**PROGRAMS, **dict.fromkeys(CHANGES, "#!/bin/bash\n")}.items():
        (programs / program).write_text(text, encoding="utf-8")
        (programs / program).chmod(0o755)
    text = (FOLDER / name).read_text(encoding="utf-8")
    if name.endswith(".yaml"):
        text = "set -eu\n" + yaml.safe_load(text)["run"]
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **GIVEN[name], "PATH": path, "NOTED": str(folder / "noted")}
    done = subprocess.run(
        ["bash", "-c", text], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (folder / "noted").read_text(encoding="utf-8").splitlines()]


def test_every_recipe_is_on_the_page_and_tried_here() -> None:
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("clusters.md", "rented.md")]
    assert [name for name in FILES if f"](clusters/{name})" not in "".join(pages)] == []
    assert {*FILES} == {*GIVEN, "two_cards.yaml", "rented.sh", "modal_train.py"}


# a python3 that makes an environment whose Python notes its words, and makes the folder for `unpack`
MAKES_ENVIRONMENT = """#!/bin/bash
mkdir -p "$3/bin"
cp noting "$3/bin/python"
"""
NOTES_OF_RENTED = NOTE.replace("exec ", 'if [ "$2" = unpack ]; then mkdir "$4"; fi\nexec ', 1)


def run_rented(checkout: Path, *words: str, **environment: str) -> list[list[str]]:
    """Run the recipe of rented cards in a checkout; return the words of each Python that it starts."""
    notes = checkout / "noted"
    notes.write_text("", encoding="utf-8")
    (checkout / "noting").write_text(NOTES_OF_RENTED, encoding="utf-8")
    (checkout / "python3").write_text(MAKES_ENVIRONMENT, encoding="utf-8")
    for name in ("noting", "python3"):
        (checkout / name).chmod(0o755)
    path = f"{checkout}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(FOLDER / "rented.sh"), *words],
        cwd=checkout,
        env={**os.environ, "PATH": path, "NOTED": str(notes), **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="a recipe for Linux")
def test_a_rented_card_installs_unpacks_and_trains_once_and_then_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "reelsmith"
    checkout.mkdir()
    pack = tmp_path / "my clips-pack.zip"
    pack.touch()
    typed = ("../my clips-pack.zip", "true ends")

    torch, others, unpack, run = (words[1:] for words in run_rented(checkout, *typed))

    assert torch[:4] == ["-m", "pip", "install", "torch==2.13.0"]
    assert others == ["-m", "pip", "install", "-r", "requirements.txt"]
    assert (unpack[:2], run[:2]) == (["reelsmith.py", "unpack"], ["reelsmith.py", "run"])
    monkeypatch.chdir(checkout)
    (unpacked,) = parse_options(None, unpack[2:], UnpackOptions)
    (trained,) = parse_options(None, run[2:], RunOptions)
    assert (unpacked.folder, unpacked.models) == (Path("../my clips"), Path("../models"))
    assert (trained.folder, trained.models, trained.download) == (unpacked.folder, unpacked.models, True)
    assert trained.end_words == ["true", "ends"]
    assert run_rented(checkout, *typed) == [["python", *run]]
    without_end = run[:-2]
    assert run_rented(checkout, typed[0], PYTHON=str(checkout / "noting")) == [["noting", *without_end]]


@pytest.mark.skipif(sys.platform != "linux", reason="a recipe for Linux")
def test_a_packed_file_whose_name_begins_with_a_line_is_no_option(tmp_path: Path) -> None:
    (tmp_path / "-x-pack.zip").touch()
    _, _, unpack, run = (words[1:] for words in run_rented(tmp_path, "-x-pack.zip"))
    assert unpack[2:] == ["./-x-pack.zip", "./-x", "--models", "./models"]
    assert run[2] == "./-x"


@pytest.mark.skipif(sys.platform != "linux", reason="a recipe for Linux")
@pytest.mark.parametrize("words", [(), ("../clips.zip",), ("../none-pack.zip",)])
def test_a_rented_card_installs_nothing_for_a_file_that_is_no_packed_folder(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "clips.zip").touch()
    checkout = tmp_path / "reelsmith"
    checkout.mkdir()
    command = ["bash", str(FOLDER / "rented.sh"), *words]

    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=PATIENCE)

    assert (done.returncode, [*checkout.iterdir()]) == (2, [])
    assert f"rented.sh: '{''.join(words)}' is not a packed folder" in done.stderr


class Recorded:
    """Stands in for a part of the package modal: notes what is called, and returns what it decorates."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...], dict[str, object]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*values: object, **named: object) -> Any:
            self.calls.append((name, values, named))
            return (lambda function: function) if name == "function" else self

        return call


def test_modal_trains_a_packed_folder_on_its_volume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    modal = types.ModuleType("modal")
    image, volume, app = Recorded(), Recorded(), Recorded()
    modal.__dict__.update(Image=image, Volume=volume, App=lambda name, image: app)
    monkeypatch.setitem(sys.modules, "modal", modal)
    started: list[tuple[list[str], dict[str, Any]]] = []
    monkeypatch.setattr(subprocess, "run", lambda words, **how: started.append((words, how)))

    train = runpy.run_path(str(FOLDER / "modal_train.py"))["train"]
    train("clips-pack.zip")

    ((words, how),) = started
    assert words == ["bash", "docs/clusters/rented.sh", "/disk/clips-pack.zip"]
    assert (how["cwd"], how["env"]["PYTHON"], how["check"]) == ("/reelsmith", "python", True)
    ((_, _, settings),) = app.calls
    assert settings["volumes"] == {"/disk": volume}
    assert settings["retries"] == 3
    made = {name: values for name, values, _ in image.calls}
    assert made["add_local_dir"] == (".", "/reelsmith")
    assert made["pip_install_from_requirements"] == ("requirements.txt",)
    assert [*made["pip_install"]] == [
        line for line in (FOLDER / "rented.sh").read_text().split() if "torch==" in line
    ]


@pytest.mark.parametrize("name", [name for name in GIVEN if "cache" not in name])
def test_recipes_of_trainings_give_options_that_torchrun_and_the_script_have(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (words,) = run_recipe(name, tmp_path)
    launch = get_args_parser().parse_args(words[1:])
    assert (words[0], launch.nnodes, launch.rdzv_endpoint) == ("torchrun", "2", "head:29400")
    assert (launch.rdzv_backend, launch.max_restarts, launch.nproc_per_node) == ("c10d", 3, "gpu")
    assert launch.training_script == "wan_train_network.py"
    monkeypatch.chdir(lay_out_files(tmp_path))
    options, *_ = read_training(
        None, WAN.options_record("Training"), launch.training_script_args, TrainedNetworkOptions, ()
    )
    assert (options.saving.resume, options.saving.save_state) == ("latest", True)


@pytest.mark.parametrize("name", [name for name in GIVEN if "cache" in name])
def test_recipes_of_caches_make_a_part_of_both(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, texts = run_recipe(name, tmp_path)
    assert latents[:2] == ["python", "wan_cache_latents.py"]
    assert texts[:2] == ["python", "wan_cache_text_encoder_outputs.py"]
    monkeypatch.chdir(lay_out_files(tmp_path))
    of_latents, *_ = read_latent_caching(None, WAN.options_record("LatentCaching"), latents[2:])
    of_texts, _ = parse_options(None, texts[2:], CachingOptions, WAN.options_record("TextCaching"))
    for options in (of_latents, of_texts):
        assert (options.shard.num_shards, options.shard.shard_index) == (8, 3)


def test_the_launchers_settings_are_those_of_two_plain_cards() -> None:
    config = load_config_from_file(str(FOLDER / "two_cards.yaml"))
    assert (config.distributed_type, config.num_processes, config.num_machines) == ("MULTI_GPU", 2, 1)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".sbatch")])
def test_jobs_of_slurm_begin_with_their_directives(name: str) -> None:
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    marked = [number for number, line in enumerate(lines) if line.startswith("#SBATCH --")]
    before = lines[: marked[-1]]
    assert all(line.startswith("#") for line in before)  # SLURM reads none behind a command


def lay_out_files(folder: Path) -> Path:
    """Write empty files by the names that recipes give; their options are read, nothing is loaded."""
    (folder / "models").mkdir()
    for name in ("wan2.1_t2v_1.3B_bf16.safetensors", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        (folder / "models" / name).touch()
    (folder / "dataset.toml").touch()
    return folder


DATASET = """[general]
resolution = [32, 32]
caption_extension = ".txt"
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [1, 5]
"""
SMALLER = ("--network_dim", "2", "--max_data_loader_n_workers", "0", "--max_train_epochs", "2", "--no_page")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a recipe for Linux")
def test_the_recipe_of_torchrun_trains_on_two_machines(tmp_path: Path) -> None:
    """Two groups of one process each, which share a folder, train what one of two processes trains."""
    lay_out_models(tmp_path / "models")
    write_clips(tmp_path / "clips", count=2)
    (tmp_path / "dataset.toml").write_text(DATASET, encoding="utf-8")
    for script, *words in cached_by(tmp_path):
        succeed_here(script, *words, folder=tmp_path)
    text = (FOLDER / "torchrun.sh").read_text(encoding="utf-8")
    text = text.replace("wan_train_network.py", shlex.quote(str(ROOT / "wan_train_network.py")))

    train(tmp_path, text, machines=2, cards=1, output="two")
    train(tmp_path, text, machines=1, cards=2, output="one")

    ours, theirs = (load_file(tmp_path / name / "my_lora.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def cached_by(folder: Path) -> list[list[str]]:
    """Return the commands of the recipe for caches, for one part."""
    GIVEN_ALONE = {**GIVEN["cache.sh"], "PARTS": "1", "PART": "0"}
    text = (FOLDER / "cache.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("python ")]
    for name, value in GIVEN_ALONE.items():
        lines = [line.replace(f'"${name}"', value) for line in lines]
    return [shlex.split(line)[1:] for line in lines]


def train(folder: Path, recipe: str, machines: int, cards: int, output: str) -> None:
    """Run the recipe once for each machine, all at the same time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, **QUIET, "HEAD": "localhost", "PORT": port, "OUTPUT": output}
    environment |= {"MACHINES": str(machines), "CARDS": str(cards)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words: Sequence[str] = ["bash", "-c", recipe, "torchrun.sh", *SMALLER]
    started = [
        subprocess.Popen(
            words, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        for _ in range(machines)
    ]
    try:
        for process in started:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, 9)
