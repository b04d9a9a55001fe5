"""The wheel: what is in it, and that it does what the checkout does."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Mapping
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from modules.installation import EXTENSIONS, NAMESAKE
from modules.script_words import console_words, has_own_command
from modules.version import VERSION
from package.staging import find_own_names, find_rooms
from tests.commands import MAX_SECONDS, ROOT, assert_user_error, run_program, run_python, run_script
from tests.package.test_extensions import install as install_examples
from tests.test_imports import HEAVY, SCRIPTS, TOOLS
from tests.tiny.families import FAMILIES
from tests.tiny.wan_dit import tiny_state, write_dit

BUILD = "import sys; from package import backend; to = sys.argv[1]; backend.build_{kind}(to)"


@dataclass(frozen=True)
class Installed:
    """An environment with the package, and an empty folder to work in."""

    python: Path
    packages: Path  # its site-packages
    folder: Path

    def run(
        self,
        *words: object,
        environment: Mapping[str, str] | None = None,
        check: bool = True,
        max_seconds: float = MAX_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run a console command, or `python`, in the empty folder."""
        program = self.python.with_name(str(words[0]))
        clean = {"PYTHONPATH": "", **(environment or {})}
        return run_program(
            program,
            *words[1:],
            folder=self.folder,
            environment=clean,
            check=check,
            max_seconds=max_seconds,
        )


def build(kind: str, folder: Path) -> Path:
    """Build the wheel or the sdist of the checkout into `folder`. Returns the file."""
    run_python("-c", BUILD.format(kind=kind), folder, folder=ROOT)
    (path,) = folder.iterdir()
    return path


def install(wheel: Path, folder: Path) -> Installed:
    """Install a wheel into a new environment in `folder`."""
    home = folder / "an environment"
    venv.create(home, symlinks=os.name != "nt")
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run_program(python, "-c", ask).stdout.strip())
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "shared.pth").write_text("\n".join(shared), encoding="utf-8")
    run_python("-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    empty = folder / "an empty folder ü"
    empty.mkdir()
    return Installed(python, packages, empty)


MODULES = [script.removesuffix(".py").replace("/", ".") for script in (*SCRIPTS, *TOOLS)]
NAMES = [module.rpartition(".")[2] for module in MODULES]
# {script: help}, with nothing heavy to import; wide, so that no line is broken
HELP = f"""
import contextlib, io, json, importlib, sys
sys.modules.update(dict.fromkeys({HEAVY!r}))
said = {{}}
for module in {MODULES!r}:
    name = module.rpartition(".")[2]
    sys.argv = [name, "--help"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module("PREFIX" + module).main()
    said[name] = text.getvalue()
print(json.dumps(said))
"""
SHOW = """
from reelsmith.modules.command import quote_command
print(quote_command(["python", "wan_generate_video.py", "--prompt", "merge_lora.py"]))
print(quote_command(["accelerate", "launch", "--num_processes", "2", "wan_train_network", "--seed", "1"]))
print(quote_command(["git", "lfs", "pull"]))
print(quote_command(["merge_lora"]))
print(quote_command(["python", "reelsmith.py", "new", "clips"]))
print(quote_command(["python", "tools/compare.py", "--lora", "x"]))
print(quote_command(["python", "merge_lora.py", "--lora", "x"]))
from reelsmith.modules.installation import own_name
print(*map(own_name, ("modules.seeds", "networks.mine", "lycoris.kohya")))
"""
WIDE = {"COLUMNS": "9999"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install(wheel, tmp_path_factory.mktemp("installed"))


def test_the_wheel_has_one_top_level_name_and_every_file_of_the_rooms(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0] for name in names} == {
        "reelsmith",
        f"reelsmith_trainer-{VERSION}.dist-info",
    }
    folders = {folder for name in names for folder in name.split("/")[:-1]}
    assert not {"tests", "pocket", "__pycache__"} & folders
    assert not {"reelsmith/quickstart.py", "reelsmith/run_tests.py"} & names
    for room in find_rooms(ROOT):
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert f"reelsmith/{path.relative_to(ROOT).as_posix()}" in names


def imported_tops(source: str) -> set[str]:
    """The top-level names of all absolute imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.slow
def test_nothing_in_the_wheel_imports_a_name_of_the_checkout(wheel: Path) -> None:
    ours = find_own_names(ROOT)
    imported: dict[str, set[str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                text = archive.read(name).decode()
                imported[name] = imported_tops(text) & ours
                assert not [script for script in SCRIPTS if f" {script}" in text], name
    assert {name: tops for name, tops in imported.items() if tops} == {}
    assert len(imported) > 200
    assert imported_tops((ROOT / "wan" / "family.py").read_text(encoding="utf-8")) & ours  # they are seen


def test_every_script_of_a_model_is_a_console_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"reelsmith_trainer-{VERSION}.dist-info/entry_points.txt").decode()
    parser = ConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # GIMMVFI keeps its capital letters
    parser.read_string(text)
    scripts = {
        name: f"reelsmith.{module}:run"
        for name, module in zip(NAMES, MODULES, strict=True)
        if has_own_command(name)
    }
    assert dict(parser["console_scripts"]) == {"reelsmith": "reelsmith.commands:main", **scripts}


@pytest.mark.slow
def test_commands_have_the_options_and_help_of_the_scripts(installed: Installed) -> None:
    ours = json.loads(
        installed.run("python", "-c", HELP.replace("PREFIX", "reelsmith."), environment=WIDE).stdout
    )
    code = HELP.replace("PREFIX", "")
    scripts = json.loads(run_python("-c", code, folder=ROOT, environment=WIDE).stdout)
    for name in NAMES:
        expected = scripts[name]
        for tool in TOOLS:
            shown = " ".join(console_words(Path(tool).stem))
            expected = expected.replace(f"python {tool}", shown).replace(tool, shown)
        for other in NAMES:
            shown = " ".join(console_words(other))
            expected = expected.replace(f"python {other}.py", shown)
            expected = expected.replace(f"usage: {other} ", f"usage: {shown} ")
            expected = re.sub(rf"(?<![\w/]){other}\.py\b", shown, expected)
        assert "--" in expected
        assert ours[name] == expected


def test_the_package_runs_in_an_empty_folder(installed: Installed) -> None:
    dit = write_dit(installed.folder, tiny_state("t2v"), name="dit")
    words = ("--input", dit, "--output", "x.safetensors", "--target", "other")

    wrong = installed.run("reelsmith", "convert", *words, check=False)
    mistyped = installed.run("python", "-m", "reelsmith.wan_train_network", "--tusk", check=False)
    bare = {"PYTHONPATH": str(installed.packages)}  # with -S: no other package
    start = "from reelsmith.merge_lora import run; run()"
    lacking = installed.run("python", "-S", "-c", start, environment=bare, check=False)

    assert_user_error(lacking, "torch is not installed", "-m pip install torch accelerate")
    assert_user_error(wrong, "it is a Wan transformer")  # `families.identify` found the family's module
    assert mistyped.stderr.startswith("wan_train_network: error: Unknown option --tusk")
    assert f"reelsmith {VERSION}" in installed.run("reelsmith", "--version").stdout
    assert "train wan " in installed.run("reelsmith", "--all").stdout
    assert "  new " in installed.run("reelsmith").stdout


def test_the_package_names_its_own_modules_and_commands(installed: Installed) -> None:
    assert installed.run("python", "-c", SHOW).stdout.splitlines() == [
        "wan_generate_video --prompt merge_lora.py",
        "accelerate launch --num_processes 2 -m reelsmith.wan_train_network --seed 1",
        "git lfs pull",
        "merge_lora",
        "reelsmith new clips",
        "reelsmith compare --lora x",
        "reelsmith merge --lora x",
        "reelsmith.modules.seeds networks.mine lycoris.kohya",
    ]


# what these tests start, or compare with, lies in the checkout
OF_THE_CHECKOUT = (
    *("a_line_of_ours_becomes_a_program", "the_browser_never_loads_torch", "ended_process"),
    *("it_prints_an_address", "a_run_appears_grows", "is_accessible"),
    *("every_file_that_parses_what_others_made_has_a_row", "a_page_is_deleted_with_its_folder"),
)


@pytest.mark.slow
def test_the_pages_of_the_package_pass_the_tests_of_those_of_the_checkout(
    installed: Installed, tmp_path: Path
) -> None:
    for name in ("tests", "pocket"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    words = ["-p", "tests.package.installed_names", "--rootdir", tmp_path, "-p", "no:cacheprovider"]
    words += ["-k", f"not ({' or '.join(OF_THE_CHECKOUT)})", tmp_path / "tests" / "browser"]
    environment = {"PYTHONPATH": str(tmp_path)}

    done = installed.run(
        "python", "-m", "pytest", *words, environment=environment, check=False, max_seconds=6 * MAX_SECONDS
    )

    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout or "100%" in done.stdout


@pytest.mark.slow
def test_no_module_is_taken_from_the_folder_of_a_run(installed: Installed) -> None:
    folder = installed.folder / "of somebody else"
    folder.mkdir()
    for name in ("reelsmith", "torch", "argparse"):
        (folder / f"{name}.py").write_text("open('it ran', 'w').close()", encoding="utf-8")
    words = "['python', 'tools/download.py', '--list'], Path('of somebody else')"
    load = "from pathlib import Path; from reelsmith.project.running import run_command"

    done = installed.run("python", "-c", f"{load}; print(run_command({words}))")

    assert done.stdout.endswith("0\n")
    assert not (folder / "it ran").exists()


@pytest.mark.slow
def test_it_caches_trains_and_generates_as_the_checkout_does(installed: Installed, tmp_path: Path) -> None:
    """To the same LoRA, by `reelsmith`, by `accelerate launch -m`, and with spawned workers."""
    family = FAMILIES[0]
    network = ["--network_module", "networks.lora_wan", "--network_dim", "4"]
    assert network == family.train[-6:-2]
    steps = [
        *("--seed", "1", "--max_train_steps", "3", "--output_dir", "output"),
        *("--max_data_loader_n_workers", "2"),
    ]
    family.prepare(tmp_path)
    family.prepare(installed.folder)
    train = [*family.train, *steps, "--output_name", "lora"]
    for script, *options in (family.cache_latents, family.cache_texts, train):
        run_script(script, *options, folder=tmp_path)

    installed.run("reelsmith", "cache", "latents", "wan", *family.cache_latents[1:])
    installed.run("wan_cache_text_encoder_outputs", *family.cache_texts[1:])
    training = [*family.train[1:], *steps, "--output_name"]
    launch = ["python", "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "-m"]
    installed.run(*launch, "reelsmith.wan_train_network", *training, "launched")
    installed.run("reelsmith", "train", "wan", *training, "direct")
    spawning = (
        "import multiprocessing, runpy, sys; multiprocessing.set_start_method('spawn'); "
        "runpy.run_module('reelsmith.wan_train_network', run_name='__main__', alter_sys=True)"
    )
    installed.run("python", "-c", spawning, *training, "spawned")
    generate = [*family.generate[1:], "--prompt", "a cat", "--video_size", 32, 32, "--infer_steps", 2]
    made = ["--lora_weight", "output/direct.safetensors", "--save_path", "videos"]
    installed.run("reelsmith", "generate", "wan", *generate, *made)

    words = [*training, "called"]
    called = {name[2:]: value for name, value in zip(words, words[1:], strict=False) if name[:2] == "--"}
    called["sdpa"] = True
    code = f"import reelsmith; print(reelsmith.train('wan', **{called!r}).wait().saved)"
    assert "called.safetensors" in installed.run("python", "-c", code).stdout

    expected = load_file(tmp_path / "output" / "lora.safetensors")
    for name in ("launched", "direct", "spawned", "called"):
        made = load_file(installed.folder / "output" / f"{name}.safetensors")
        assert made.keys() == expected.keys()
        assert all(tensor.equal(expected[key]) for key, tensor in made.items()), name
    assert list((installed.folder / "videos").glob("*.mp4"))


@pytest.mark.slow
def test_an_extension_that_is_named_brings_its_options_and_its_family(
    installed: Installed, tmp_path: Path
) -> None:
    install_examples(tmp_path, "glow", "dawn")
    environment = {"PYTHONPATH": str(tmp_path)}

    feature = installed.run(
        "reelsmith", "--extensions", "glow", "train", "wan", "--help", environment=environment
    )
    family = installed.run(
        "python", "-m", "reelsmith_dawn.train", "--help", environment={**environment, EXTENSIONS: "dawn"}
    )

    assert "--glow X" in feature.stdout
    assert "Train a LoRA for Dawn." in family.stdout
    assert "--glow" not in installed.run("reelsmith", "train", "wan", "--help").stdout
    words = ["reelsmith", "train", "wan", "--glow", "1"]
    unnamed = installed.run(*words, environment=environment, check=False)
    assert "Switch it on: reelsmith --extensions glow train wan ..." in unnamed.stderr


@pytest.mark.slow
def test_pip_builds_the_same_wheel_from_the_sdist(wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", tmp_path / "sdist")
    flags = ["--no-deps", "--no-index", "--no-build-isolation", "-q", "-w", tmp_path / "again"]
    run_python("-m", "pip", "wheel", *flags, sdist, folder=tmp_path)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(tmp_path / "again" / wheel.name) as other:
        assert {name: one.getinfo(name).CRC for name in one.namelist() if "RECORD" not in name} == {
            name: other.getinfo(name).CRC for name in other.namelist() if "RECORD" not in name
        }


def test_the_installed_command_warns_of_it(installed: Installed) -> None:
    assert installed.run("reelsmith", "--version").stderr == ""
    namesake = installed.packages / f"{NAMESAKE}-0.2.1.dist-info"
    namesake.mkdir()
    try:
        said = installed.run("reelsmith", "--version").stderr
    finally:
        namesake.rmdir()
    assert said == (
        "Warning: reelsmith 0.2.1 is installed too, another program with the same command: uninstall both "
        "(pip uninstall reelsmith reelsmith-trainer), then install Reelsmith again.\n"
    )
