"""A script started with the wrong Python or without packages, and the steps of the quickstart."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file

import quickstart
import run_tests
from browser.jobs.launch import find_program
from modules import installation
from modules.command import typed_words
from modules.environment import TORCH
from modules.errors import INTERRUPTED, InstallationError, UserError
from modules.extension_words import add_extensions, split_extensions
from modules.installation import (
    CHECKOUT_SCRIPTS,
    EXTENSIONS,
    FRONT_SCRIPT,
    IMPORTED_AS,
    command_words,
    find_front_words,
    own_name,
    read_requirements,
    requirement_name,
)
from modules.media.writing import write_video
from package.reelsmith.commands import ScriptCommand, find_commands
from tests.commands import ROOT, assert_user_error, run_program, run_python
from tests.tiny.families import family_called
from tests.tiny.project import moving_square, write_animations

SCRIPTS = sorted(command.path.relative_to(ROOT).as_posix() for command in find_commands(ROOT))
FRONT_DOORS = [*SCRIPTS, *(f"{name}.py" for name in sorted(CHECKOUT_SCRIPTS))]
OLDEST = (3, 8)  # that a distribution may still have
OLDER = [found for minor in (10, 9, 8) if (found := shutil.which(f"python3.{minor}")) is not None]


@pytest.mark.parametrize("script", FRONT_DOORS)
def test_nothing_of_ours_is_imported_before_the_interpreter_is_checked(script: str) -> None:
    before = []
    for name in (script, "modules/__init__.py", "modules/interpreter.py"):
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=OLDEST)
        checks = [place for place, node in enumerate(tree.body) if isinstance(node, ast.If)]
        is_interpreter = name == "modules/interpreter.py"
        for node in tree.body[: checks[-1]] if is_interpreter else tree.body:
            if isinstance(node, ast.Import) and node.names[0].name == "modules.interpreter":
                break
            if isinstance(node, ast.Import):
                before += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                before.append(str(node.module))
        else:
            assert name != script, "it does not import modules.interpreter"
    assert {name.partition(".")[0] for name in before} <= set(sys.stdlib_module_names)
    assert "tomllib" not in before


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 15, 0)])
def test_every_script_names_the_pythons_it_runs_with(version: tuple[int, int, int]) -> None:
    others = f"""
import runpy, sys
sys.version_info, sys.version = {(*version, "final", 0)}, "{".".join(map(str, version))} (main)"
sys.modules.update(tomllib=None)  # as 3.10 has none
for script in {FRONT_DOORS!r}:
    for name in [name for name in sys.modules if name.startswith("modules")]:
        del sys.modules[name]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        print(script, end.code.splitlines()[0])
"""
    said = run_python("-c", others, folder=ROOT).stdout.splitlines()
    number = ".".join(map(str, version))
    assert said == [
        f"{script} Python {number} ({sys.executable}) is not supported: use 3.11 to 3.14."
        for script in FRONT_DOORS
    ]


def test_a_python_of_32_bit_is_refused() -> None:
    code = "import sys; sys.maxsize = 2**31 - 1; import modules.interpreter"
    done = run_python("-c", code, folder=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"This Python ({sys.executable}) is 32-bit, and PyTorch supports only 64-bit."
    )
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.skipif(not OLDER, reason="no older Python on PATH")
@pytest.mark.parametrize("python", OLDER, ids=lambda path: Path(path).name)
def test_an_older_python_is_refused_in_two_lines(python: str) -> None:
    if subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip("a name without a Python behind it")
    for script in FRONT_DOORS:
        done = subprocess.run([python, script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 1
        assert "use 3.11 to 3.14." in done.stderr
        assert len(done.stderr.splitlines()) == 2


# all begin with the same import, see above
@pytest.mark.parametrize("script", ["merge_lora.py", "wan_train_network.py"])
def test_without_torch_a_script_says_how_to_get_to_it(script: str) -> None:
    needed = {"merge_lora.py": ["--dit", "a", "--save_merged_model", "b"]}  # what is missing is told first
    done = run_python("-S", ROOT / script, *needed.get(script, []), check=False)  # -S: no packages at all
    assert_user_error(done, f"torch is not installed in this Python ({sys.executable})", "Activate")
    assert len(done.stderr.splitlines()) <= 3
    assert "usage:" in run_python("-S", ROOT / script, "--help").stdout


def test_every_requirement_is_known_by_the_name_it_is_imported_by() -> None:
    for line in read_requirements():
        name = requirement_name(line)
        imported = IMPORTED_AS.get(name, name.replace("-", "_"))
        assert importlib.util.find_spec(imported) is not None, f"{line}: not imported as {imported}"


def test_what_the_quickstart_installs_is_in_the_range_of_torch() -> None:
    torch = next(Requirement(line) for line in read_requirements() if requirement_name(line) == "torch")
    (installed,) = Requirement(TORCH).specifier
    assert installed.operator == "=="
    assert installed.version in torch.specifier
    assert "2.6.0" not in torch.specifier  # it has no float8_e8m0fnu


def test_recorded_tests_run_with_a_second_torch_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(run_tests.SECOND, sys.executable)
    assert run_tests._second_python() == [Path(sys.executable)]
    monkeypatch.setenv(run_tests.SECOND, "nowhere")
    with pytest.raises(UserError, match="nowhere: there is no such file"):
        run_tests._second_python()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse4_2 avx2", ["default"]),
        ("fpu avx2 avx512f avx512dq", ["default"]),  # torch's kernels need four of its parts
        ("fpu avx2 avx512f avx512dq avx512bw avx512vl", ["default", "avx512"]),
        (None, ["default"]),  # not Linux
    ],
)
def test_recorded_tests_run_as_on_other_processors(
    flags: str | None, expected: list[str], tmp_path: Path
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n", encoding="utf-8")

    settings = run_tests._processors(cpuinfo)

    assert [setting["ATEN_CPU_CAPABILITY"] for setting in settings] == expected


@pytest.mark.skipif(shutil.which("git") is None, reason="it needs git")
def test_on_other_processors_only_changed_rooms_are_compared(tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=Jo", "-c", "user.email=jo@example.org"]

    def commit(path: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{path}\n", encoding="utf-8")
        subprocess.run([*git, "add", "."], cwd=tmp_path, check=True)
        subprocess.run([*git, "commit", "--quiet", "--message", path], cwd=tmp_path, check=True)

    assert run_tests._changed_rooms(tmp_path) == [*run_tests.COMPARED]  # there is no clone
    subprocess.run([*git, "init", "--quiet"], cwd=tmp_path, check=True)
    commit("wan/model.py")
    for number in range(run_tests.NUM_COMMITS - 3):
        commit(f"docs/{number}.md")
    commit("tests/flux/test_model.py")
    commit("browser/wan.py")
    assert run_tests._changed_rooms(tmp_path) == ["wan", "flux"]
    commit("README.md")
    assert run_tests._changed_rooms(tmp_path) == ["flux"]  # wan is older
    (tmp_path / "wan" / "model.py").write_text("edited, not committed", encoding="utf-8")
    assert run_tests._changed_rooms(tmp_path) == ["wan", "flux"]
    commit("tests/golden/case.json")
    assert run_tests._changed_rooms(tmp_path) == [*run_tests.COMPARED]


@pytest.mark.parametrize(
    ("passes", "code"),
    [
        ("False", run_tests.TESTS_FAILED),
        ("SEEN.exists()", 0),  # it passes alone: something else disturbed it
        ("SEEN.exists() and LATER.exists()", run_tests.TESTS_FAILED),
    ],
)
def test_a_test_that_fails_alone_too_fails_the_run(
    passes: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"""from pathlib import Path
SEEN, LATER = Path("seen"), Path("later")
def test_well(): pass
def test_ill():
    passes = {passes}
    SEEN.touch()
    assert passes
"""
    (tmp_path / "test_some.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)

    found = run_tests._run_check(run_tests.Check(Path(sys.executable), ["pytest", "-n", "2"]))

    assert found == code


def test_a_run_that_breaks_off_fails_even_if_the_failed_test_passes_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk once ended pytest in the middle: what had failed passed alone, and the rest never ran."""
    (tmp_path / "test_some.py").write_text(
        "from pathlib import Path\n"
        "def test_ill():\n"
        "    seen = Path('seen').exists()\n"
        "    Path('seen').touch()\n"
        "    assert seen\n",
        encoding="utf-8",
    )
    (tmp_path / "conftest.py").write_text(
        "from pathlib import Path\n"
        "def pytest_runtest_logfinish():\n"
        "    if not Path('full').exists():\n"
        "        Path('full').touch()\n"
        "        raise OSError('the disk is full')\n"
        "def pytest_internalerror():\n"
        "    raise OSError('the disk is full')\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)

    found = run_tests._run_check(run_tests.Check(Path(sys.executable), ["pytest"]))

    assert found not in (0, run_tests.TESTS_FAILED)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_modules_are_found_in_the_project_not_in_the_folder_a_test_goes_to(
    workers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "hostile.py").touch()
    (tmp_path / "ours.py").touch()
    (tmp_path / "test_some.py").write_text(
        "import importlib.util\n"
        "def test_path(monkeypatch):\n"
        "    monkeypatch.chdir('elsewhere')\n"
        "    assert importlib.util.find_spec('hostile') is None\n"
        "    assert importlib.util.find_spec('ours') is not None\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)

    command = ["pytest", "--import-mode=importlib", "-n", workers]
    assert run_tests._run_check(run_tests.Check(Path(sys.executable), command)) == 0


@pytest.mark.parametrize(("line", "is_failed"), [("x: int = 1", False), ('x: int = "1"', True)])
def test_what_the_type_checker_says_comes_last_and_fails_the_run(
    line: str,
    is_failed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "some.py").write_text(f"{line}\n", encoding="utf-8")
    (tmp_path / "mypy.ini").write_text("[mypy]\nfiles = some.py\n", encoding="utf-8")
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    types = run_tests.Check(Path(sys.executable), run_tests.TYPES)
    other = run_tests.Check(Path(sys.executable), ["this"])

    failed = run_tests._run_checks([types, other])

    assert failed == ([types] if is_failed else [])
    said = capfd.readouterr().out
    assert said.index("== this") < said.index("Beautiful") < said.index("== mypy")
    assert ("some.py:1: error" in said) == is_failed


def test_no_folder_of_tests_changes_what_is_collected_in_others() -> None:
    """pytest hands the tests of all folders to this hook of each `conftest.py`: one that marked tests of its
    own as slow took others out of the whole run.
    """
    hook = "pytest_collection_modifyitems"
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("conftest.py")}
    assert [path for path, text in texts.items() if hook in text] == [ROOT / "tests" / "conftest.py"]


@pytest.mark.skipif(
    os.name == "nt" or not (ROOT / ".ci").exists(), reason="the package has no .ci; Windows has no bash"
)
@pytest.mark.parametrize("number", range(3))
def test_ci_tests_the_commit_in_a_clone_with_one_of_three_names(tmp_path: Path, number: int) -> None:
    """Which one follows from the commit's hash; its path has a blank and an umlaut."""
    git = ["git", "-c", "user.name=Jo", "-c", "user.email=jo@example.org"]
    checkout = tmp_path / "checkout"
    (checkout / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci" / "run")
    (checkout / "file").write_text("committed", encoding="utf-8")
    subprocess.run([*git, "init", "--quiet"], cwd=checkout, check=True)
    subprocess.run([*git, "add", "."], cwd=checkout, check=True)
    for trial in range(100):  # until the hash chooses the name
        words = ["commit", "--quiet", "--amend"] if trial else ["commit", "--quiet"]
        subprocess.run([*git, *words, "--message", str(trial)], cwd=checkout, check=True)
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], cwd=checkout, text=True)
        if int(commit[:6], 16) % 3 == number:
            break
    (checkout / "file").write_text("not committed", encoding="utf-8")
    stand_in = tmp_path / "bin" / "python3"  # it says where it runs and with what, and ends with 7
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\npwd\ncat file\necho " $*"\nexit 7\n', encoding="utf-8")
    stand_in.chmod(0o755)
    (tmp_path / "tmp").mkdir()
    path = os.pathsep.join([str(stand_in.parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "TMPDIR": str(tmp_path / "tmp"), "GIT_DIR": "nowhere"}

    done = subprocess.run(
        ["bash", ".ci/run", "-k", "one"], cwd=checkout, env=environment, capture_output=True, encoding="utf-8"
    )

    folder, text = done.stdout.splitlines()
    assert done.returncode == 7, done.stderr
    name = ("reelsmith", "run", "a b ü")[number]
    assert Path(folder).name == name
    assert Path(folder).parent.name.startswith("a b ü.")
    assert f"is called {name}" in done.stderr
    assert text == "committed run_tests.py -k one"
    assert [*(tmp_path / "tmp").iterdir()] == []


def test_in_a_checkout_a_module_is_imported_by_the_name_that_was_typed() -> None:
    assert own_name("networks.lora_wan") == "networks.lora_wan"
    assert own_name("lycoris.kohya") == "lycoris.kohya"
    words = ["python", "wan_train_network.py", "--seed", "1"]
    assert command_words(words) == words


@pytest.mark.parametrize(
    ("typed", "folder"),
    [
        ("wan_train_network.py", ""),
        ("./wan_train_network.py", ""),
        (f"{ROOT}/wan_train_network.py", f"{ROOT}/"),
        ("{root}/blissful_tuner/upscaler.py", "{root}/"),
        ("{root}/wan_train_network.py", "{root}/"),
        ("/usr/bin/pytest", ""),
    ],
)
@pytest.mark.parametrize("launcher", [["python"], ["accelerate", "launch", "--quiet"]])
def test_printed_commands_start_where_this_one_was_typed(
    typed: str, folder: str, launcher: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT.parent)
    root = ROOT.relative_to(ROOT.parent)
    monkeypatch.setattr(sys, "argv", [typed.format(root=root)])

    words = command_words([*launcher, "wan_generate_video.py", "--dit", "convert_lora.py"])

    script = Path(folder.format(root=root)) / "wan_generate_video.py"
    assert words == [*launcher, str(script), "--dit", "convert_lora.py"]


EVERY_COMMAND = find_commands(ROOT)


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=lambda command: command.name)
def test_every_command_names_the_extensions_that_are_on(
    command: ScriptCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the front script takes them; its words mean the same script."""
    words = ["python", command.path.relative_to(ROOT).as_posix(), "--x", "y"]
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert typed_words(words) == words
    monkeypatch.setenv(EXTENSIONS, "glow,half")

    typed = typed_words(words)

    assert typed == ["python", FRONT_SCRIPT, "--extensions", "glow,half", *command.words, "--x", "y"]
    assert typed_words(typed) == typed  # once
    assert find_program(typed, ROOT)[0] == command
    launched = add_extensions(["accelerate", "launch", "--num_processes", "2", *words[1:]])
    assert launched == ["accelerate", "launch", "--num_processes", "2", *typed[1:]]
    assert split_extensions(typed) == ("glow,half", ["python", FRONT_SCRIPT, *command.words, "--x", "y"])


def test_the_help_of_a_command_with_extensions_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["python", "reelsmith.py", "--extensions", "glow", "train", "wan", "--seed", "1"]
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "argv", ["wan_train_network.py", "--seed", "1"])

    assert find_front_words() == words[1:6]


def test_the_installed_package_names_them_behind_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "PREFIX", "reelsmith.")
    monkeypatch.setenv(EXTENSIONS, "glow")
    front = ["--extensions", "glow", "train", "wan", "--x"]

    assert typed_words(["python", "wan_train_network.py", "--x"]) == ["reelsmith", *front]
    launched = typed_words(["accelerate", "launch", "--quiet", "wan_train_network.py", "--x"])
    assert launched == ["accelerate", "launch", "--quiet", "-m", "reelsmith", *front]


def test_other_programs_get_no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXTENSIONS, "glow")
    for words in (["python", "-c", "pass"], ["hf", "download", "x"], ["python", "quickstart.py"]):
        assert add_extensions(words) == words


# Ctrl-C as often as a module is looked for
CTRL_C = """
import os, signal, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["STOP_AT"]:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Stop())
"""
IMPORTED_EARLY = ("argparse", "modules.options", "protocols.families")


@pytest.mark.parametrize("script", ["new_project.py", "wan_train_network.py", "tools/run_browser.py"])
@pytest.mark.parametrize("module", [*IMPORTED_EARLY, "torch"])
def test_ctrl_c_while_modules_are_imported_is_one_word(script: str, module: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CTRL_C, encoding="utf-8")
    words = {"new_project.py": [tmp_path, "--family", "wan"], "tools/run_browser.py": [tmp_path]}
    (tmp_path / "dataset.toml").write_text("[general]\n", encoding="utf-8")
    environment = {"PYTHONPATH": str(tmp_path), "STOP_AT": module}
    training = ["--dataset_config", "dataset.toml", "--output_dir", "out", "--output_name", "x", "--dit", "x"]
    front = ["reelsmith.py", "new"] if script == "new_project.py" else [script]

    done = run_program(
        sys.executable,
        *(ROOT / front[0], *front[1:], *words.get(script, training)),
        folder=tmp_path,
        environment=environment,
        check=False,
    )

    assert (done.returncode, done.stderr) == (INTERRUPTED, "Interrupted.\n")


def test_a_program_that_imports_reelsmith_keeps_its_own_hook(tmp_path: Path) -> None:
    program = tmp_path / "mine.py"
    program.write_text("import sys, reelsmith; print(sys.excepthook is sys.__excepthook__)", encoding="utf-8")

    done = run_program(sys.executable, program, folder=tmp_path, environment={"PYTHONPATH": str(ROOT)})

    assert done.stdout == "True\n"


def test_every_step_is_announced_with_its_number_and_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "FOLDER", tmp_path)
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)

    quickstart.take_steps(planned := quickstart.Runner(None))
    assert not capsys.readouterr().err

    runner = quickstart.Runner(Path(sys.executable), len(planned.commands))
    runner.run("Doing nothing", ["-c", "pass"])
    runner.run("Doing no more", ["-c", "pass"])

    total = len(planned.commands)
    assert total > 10
    assert capsys.readouterr().err.splitlines() == [
        f"Step 1 of {total}: Doing nothing",
        f"Step 2 of {total}: Doing no more",
    ]


MISSING = ("av", "diffusers", "bitsandbytes", "ftfy", "imageio", "flash_attn", "xformers", "sageattention")
PROGRAM = f"""
import importlib, json, sys
from accelerate.state import AcceleratorState
from modules.installation import hide_packages
with hide_packages(*{MISSING}):
    for script, *arguments in json.loads(sys.argv[1]):
        AcceleratorState._reset_state(reset_partial_state=True)
        importlib.import_module(script.removesuffix(".py")).main(arguments)
    assert not [name for name in {MISSING} if sys.modules.get(name)]
"""


def run_without(folder: Path, *commands: list[str]) -> None:
    """Run root scripts one after the other in a process that has none of the packages."""
    run_program(
        sys.executable,
        "-c",
        PROGRAM,
        json.dumps(commands),
        folder=folder,
        environment={"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.slow
def test_caching_training_resuming_and_generation_of_latents_need_none_of_them(tmp_path: Path) -> None:
    family = family_called("wan t2v-1.3B")
    family.prepare(tmp_path, write_animations)
    train = [*family.train, "--seed", "1", "--max_data_loader_n_workers", "0", "--output_dir", "output"]
    latents = ["--prompt", "a cat", "--negative_prompt", "dull", "--seed", "7", "--output_type", "latent"]
    size = ["--video_size", "32", "32", "--infer_steps", "2", "--device", "cpu", "--save_path", "made"]

    run_without(
        tmp_path,
        family.cache_latents,
        family.cache_texts,
        [*train, "--output_name", "half", "--max_train_steps", "1", "--save_state"],
        [*train, "--output_name", "x", "--max_train_steps", "2", "--resume", "output/half-state"],
        [*family.generate, *size, *latents, "--lora_weight", "output/x.safetensors"],
    )

    (path,) = (tmp_path / "made").glob("*_latent.safetensors")
    assert torch.isfinite(load_file(path)["latent"]).all()


def test_a_video_without_ffmpeg_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InstallationError, match="pip install av"):
        write_video(tmp_path / "clip.mp4", moving_square(2, 32, 32, 1), 8)
    assert not list(tmp_path.iterdir())
