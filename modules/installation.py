"""Determine whether this Reelsmith is a checkout or an installed package; import modules by name.

Standard library only. In the package, all of our code is below `reelsmith` (package/staging.py). Also
import modules that a user names in an option, and hide packages that a process has no use for.
"""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from modules.errors import InstallationError, OptionError
from modules.run_limits import is_limited
from modules.script_words import console_words, name_words
from modules.text_files import real_path

ROOT = Path(__file__).resolve().parent.parent
# "" in a checkout, "reelsmith." in the package
PREFIX = __name__.rpartition("modules.")[0]
FRONT_SCRIPT = "reelsmith.py"  # in a checkout; an installed package has the command `reelsmith` instead
SCRIPT_ROOMS = ("tools", "blissful_tuner", "networks", "finetune")  # folders that contain scripts too
LONGEST_NAME = 100  # maximum characters of a script's name, because file systems reject longer ones
MAX_BEFORE = 16  # maximum number of launcher arguments before the script
# our distribution name, which another program on the package index has too
DISTRIBUTION = "reelsmith-trainer"
NAMESAKE = "reelsmith"
# set for programs started by run_project.py, which starts the next command itself, so they print no hint
RUN_GOES_ON = "REELSMITH_RUN_GOES_ON"
# set for programs started by the browser's queue, whose commands come from a file
FROM_QUEUE = "REELSMITH_FROM_QUEUE"
# set for a generation with --interactive that exchanges JSON with the browser
DRIVEN = "REELSMITH_DRIVEN"
# set by the browser for a script that ends after reading its options
ONLY_OPTIONS = "REELSMITH_ONLY_OPTIONS"
# set by the browser for a training run that reports options without effect before torch loads
TELLS_UNUSED = "REELSMITH_TELLS_UNUSED"
# variable with the file to which a program writes its progress (modules/progress.py)
PROGRESS = "REELSMITH_PROGRESS"
# set by the browser for a `new` that prints the kinds of its lines (modules/line_kinds.py)
TELLS_KINDS = "REELSMITH_TELLS_KINDS"
# variable with the extensions that the user enables (modules/extensions.py)
EXTENSIONS = "REELSMITH_EXTENSIONS"
EXTENSIONS_FLAG = "--extensions"  # the same, before a command of the front script
# scripts that set up a checkout, and its door to the commands; the package has none of them
CHECKOUT_SCRIPTS = {"quickstart", "reelsmith", "run_tests", "set_up"}
RUN_CHECKS = "checks"  # value for a training run that only checks its options and files
SOURCES_LEFT_OUT = 4  # exit code of caching for `run`: all files are cached except faulty ones
# distribution -> import name, if it differs
IMPORTED_AS = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}
# module for an option -> its distribution on PyPI, which we have checked. Other names may be unregistered, so
# that anyone could take them; no install command is printed for these
DISTRIBUTIONS = {
    "adabelief_pytorch": "adabelief-pytorch",
    "adam_mini": "adam-mini",
    "adv_optm": "adv-optm",
    "aim": "aim",
    "apollo_torch": "apollo-torch",
    "bitsandbytes": "bitsandbytes",
    "came_pytorch": "came-pytorch",
    "comet_ml": "comet_ml",
    "dadaptation": "dadaptation",
    "galore_torch": "galore-torch",
    "heavyball": "heavyball",
    "lion_pytorch": "lion-pytorch",
    "lycoris": "lycoris-lora",
    "mlflow": "mlflow",
    "optimi": "torch-optimi",
    "prodigyopt": "prodigyopt",
    "prodigyplus": "prodigy-plus-schedule-free",
    "pytorch_optimizer": "pytorch-optimizer",
    "q_galore_torch": "q-galore-torch",
    "schedulefree": "schedulefree",
    "swanlab": "swanlab",
    "tensorboard": "tensorboard",
    "timm": "timm",
    "torch_optimizer": "torch-optimizer",
    "torchao": "torchao",
    "trackio": "trackio",
    "wandb": "wandb",
}


def find_namesake() -> str | None:
    """Return a sentence about another distribution named `reelsmith` in this Python; None if there is none.

    Its package and its command have the same names as ours, so whichever is installed last replaces files of
    the other one.
    """
    folders = [ROOT.parent] if PREFIX else map(Path, sys.path)
    notes = (note for folder in folders for note in folder.glob(f"{NAMESAKE}-*.dist-info"))
    note = next(notes, None)
    if note is None:
        return None
    version = note.name.removeprefix(f"{NAMESAKE}-").removesuffix(".dist-info")
    remedy = (
        f"uninstall both (pip uninstall {NAMESAKE} {DISTRIBUTION}), then install Reelsmith again"
        if PREFIX
        else f"here, type python {FRONT_SCRIPT}, never {NAMESAKE}"
    )
    return f"{NAMESAKE} {version} is installed too, another program with the same command: {remedy}"


def import_own(name: str) -> ModuleType:
    """Import a module of this program by its name in a checkout, also when the package is installed.

    A module of an extension is imported by its own name.
    """
    return importlib.import_module(own_name(name) if PREFIX else name)


def own_name(name: str) -> str:
    """Return the name to import: in the package, its prefix is added to modules of this program."""
    if not PREFIX or not re.fullmatch(r"\w+(\.\w+)*", name):
        return name
    file = ROOT.joinpath(*name.split("."))
    return PREFIX + name if file.with_suffix(".py").is_file() or (file / "__init__.py").is_file() else name


def command_words(argv: Sequence[str]) -> list[str]:
    """Convert a command of this program to the form that the user types in this installation.

    `argv` is the command in a checkout: `python wan_train_network.py ...` or `accelerate launch ...
    wan_train_network.py ...`. In the package it becomes `wan_train_network ...` (for scripts without a model,
    `reelsmith compare ...`) or `accelerate launch ... -m reelsmith.wan_train_network ...`.
    """
    argv = list(argv)
    if not PREFIX:
        return _locate_script(argv)
    if argv[:2] == ["python", FRONT_SCRIPT]:
        return ["reelsmith", *argv[2:]]
    if argv[:1] == ["python"] and len(argv) > 1 and find_script(argv[1]) is not None:
        return [*console_words(Path(argv[1]).stem), *argv[2:]]
    if argv[:2] == ["accelerate", "launch"]:
        for index, word in enumerate(argv):
            if word == FRONT_SCRIPT:
                return [*argv[:index], "-m", PREFIX.rstrip("."), *argv[index + 1 :]]
            script = find_script(word)
            if script is not None:
                return [*argv[:index], *program_words(script), *argv[index + 1 :]]
    return argv


def _locate_script(argv: list[str]) -> list[str]:
    """Return a checkout's command with a path of the script that works in the user's working folder."""
    # The checkout's folder is spelled as in the command that runs now: `python ../x/a.py` gives `../x/b.py`.
    if argv[:1] not in (["python"], ["accelerate"]):
        return argv
    running = Path(sys.argv[0])
    try:
        in_checkout = real_path(running).relative_to(ROOT)
    except ValueError:
        in_checkout = Path(running.name)
    checkout = Path()  # "." if no script of the checkout is running
    if find_script(in_checkout.as_posix()) is not None:
        checkout = running.parent if len(in_checkout.parts) == 1 else running.parent.parent
    for index, word in enumerate(argv[:MAX_BEFORE]):
        script = find_script(word)
        if script is not None:
            return [*argv[:index], str(checkout / script), *argv[index + 1 :]]
    return argv


def find_front_words() -> list[str]:
    """Return `reelsmith.py` and its subcommand, such as `train wan`, if they started this script, else []."""
    if not any(Path(word).name == FRONT_SCRIPT for word in sys.orig_argv):
        return []
    index = len(sys.orig_argv) - len(sys.argv)  # index of the word after reelsmith.py, if that was started
    names = name_words(Path(sys.argv[0]).stem).split()
    index -= len(names)
    extensions = []
    if sys.orig_argv[max(index - 1, 0) : index] == [EXTENSIONS_FLAG]:
        extensions = sys.orig_argv[index - 1 : index + 1]
        index -= 2
    is_front = index > 0 and Path(sys.orig_argv[index]).name == FRONT_SCRIPT
    typed = sys.orig_argv[index + 1 + len(extensions) :]
    typed = [word for word in typed if word not in ("help", "-h", "--help")]
    is_shown = is_front and typed[: len(names)] == names
    return [FRONT_SCRIPT, *extensions, *names] if is_shown else []


def find_script(word: str) -> Path | None:
    """Return the path, relative to ROOT, of the script that a word names; None if there is none."""
    shape = rf"(({'|'.join(SCRIPT_ROOMS)})/)?\w{{1,{LONGEST_NAME}}}(\.py)?"
    if re.fullmatch(shape, word, re.ASCII) is None:
        return None
    name = f"{word.removesuffix('.py')}.py"
    return next((Path(room, name) for room in ("", *SCRIPT_ROOMS) if (ROOT / room / name).is_file()), None)


def program_words(script: Path) -> list[str]:
    """Return the arguments of `python` that run a script: its path, or `-m` and its module in the package."""
    return ["-m", PREFIX + ".".join(script.with_suffix("").parts)] if PREFIX else [str(ROOT / script)]


def program_environment(**variables: str) -> dict[str, str]:
    """Return the environment variables for starting one of our programs.

    In the package, they keep `python -m` from importing from the working folder, maybe somebody else's.
    """
    return {**os.environ, **variables, **({"PYTHONSAFEPATH": "1"} if PREFIX else {})}


def read_requirements() -> list[str]:
    """Return the requirements in requirements.txt, without comments."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def requirement_name(requirement: str) -> str:
    """Return the package name in a requirement: `torch` for `torch>=2.7`."""
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def check_requirements() -> None:
    """Raise InstallationError if a package of requirements.txt is missing; import none of them."""
    names = [requirement_name(line) for line in read_requirements() if ";" not in line]
    missing = [
        name
        for name in names
        if importlib.util.find_spec(IMPORTED_AS.get(name, name.replace("-", "_"))) is None
    ]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        # without torch this is the wrong Python: do not list the other packages
        subject = "torch is" if "torch" in missing else f"{', '.join(missing)} {verb}"
        raise InstallationError(
            f"{subject} not installed in this Python ({sys.executable}).\n  {_describe_remedy(missing)}"
        )


def _describe_remedy(missing: Sequence[str]) -> str:
    """Return how to get missing packages: install them, or activate the environment that has them."""
    python = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    if PREFIX:
        return f"Install what is missing: {python} -m pip install {' '.join(missing)}"
    if "torch" not in missing:
        return f'Install it: {python} -m pip install -r "{ROOT / "requirements.txt"}"'
    folder = ROOT / ".venv"
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    if folder.is_dir() and not Path(sys.prefix).is_relative_to(folder):
        return (
            f'Activate the environment: . "{commands / "activate"}"\n'
            f'  (PowerShell: & "{commands / "Activate.ps1"}"), then run the command again.'
        )
    quickstart = " ".join(command_words(["python", "quickstart.py"]))
    return (
        f"Activate the environment that has it, or set one up: {quickstart} makes one in .venv and shows it "
        "at work;\n  docs/install.md has the commands for each system and GPU."
    )


def describe_missing(error: ImportError) -> str:
    """Return which module or package is missing and, for a package, how to install it."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return str(error)
    package, _, inner = error.name.removeprefix(PREFIX).partition(".")
    if inner:
        return f"{package} has no module {inner}. Fix the name, or install the version that has it"
    if package in DISTRIBUTIONS:
        return f"the package {package} is not installed. Run: pip install {DISTRIBUTIONS[package]}"
    return (
        f"the package {package} is not installed. Fix the name, or install the package that has the module "
        f"{package}; it may have another name"
    )


def rejects_code() -> str | None:
    """Return why code from the working folder must not be run; None if the user types commands.

    In `run` and the queue, names of modules come from a file that may be somebody else's.
    """
    if os.environ.get(RUN_GOES_ON):
        return "`run` takes no code from its folder: if it is yours, start the training itself"
    if os.environ.get(FROM_QUEUE):
        return "The queue takes no code from a folder: if it is yours, start the command in a terminal"
    return None


def is_started_by_file() -> bool:
    """Return whether this process was started by `run` with a folder, or by the browser's queue."""
    return is_limited() or bool(os.environ.get(RUN_GOES_ON) or os.environ.get(FROM_QUEUE))


def reject_starting(option: str, effect: str = "starts a program") -> None:
    """Raise OptionError if a file instead of the user sets an option that starts another program.

    The file is the run.toml of `run`, whose folder may be somebody else's, or a job in the browser's queue.
    `effect` describes what the option does, for the message.
    """
    if os.environ.get(RUN_GOES_ON):
        remedy = f"Remove it from run.toml; or, if you want it, type --{option} after `run FOLDER`"
    elif os.environ.get(FROM_QUEUE):
        remedy = "Remove it from the job; or, if you want it, start the command in a terminal"
    else:
        return
    raise OptionError(f"--{option} {effect}, which no file may do: the option has to be typed. {remedy}")


def reject_in_queue(option: str) -> None:
    """Raise OptionError if the current command is a job of the browser's queue.

    Args:
        option: Name of an option whose file no page shows, and which can make a library send data away.
    """
    if os.environ.get(FROM_QUEUE):
        raise OptionError(
            f"--{option}: a job takes no settings of other libraries from a file: they can name any server. "
            "Remove it from the job; or, if you want it, start the command in a terminal"
        )


def reject_standard_module(option: str, name: str, module: str) -> None:
    """Raise OptionError if a module that an option names is in Python's standard library.

    Such a module is never meant, and importing some has effects (antigravity opens a browser). `name` is
    the text that the user typed for the option.
    """
    if module.split(".")[0] in sys.stdlib_module_names:
        raise OptionError(
            f"{option} {name}: {module} is a module of Python's standard library, which has nothing for this "
            "option and is not imported. Pass a module of an installed package, or a file of your own"
        )


def import_user_module(option: str, name: str, example: str, remedy: str) -> ModuleType:
    """Import a module by the name that a user gave to an option.

    The working folder is searched too, but only if the user has typed the name.

    Args:
        option: The option.
        name: Name of the module.
        example: A valid name, for messages.
        remedy: More words for the error if the module is not found.

    Raises:
        OptionError: If the module cannot be imported.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise OptionError(f"{option} {name} is not an import path. Write package.module, as {example}.")
    reject_standard_module(option, name, name)
    rejection = rejects_code()  # why the working folder is not searched; None if the user typed the name
    working_folder = str(Path.cwd())
    if rejection is None and working_folder not in sys.path:
        sys.path.append(working_folder)
    try:
        return importlib.import_module(own_name(name))
    except ImportError as error:
        reason = describe_missing(error)
        if rejection is not None:
            reason += f". {rejection}"
        raise OptionError(f"{option} {name} cannot be imported: {reason}.{remedy}") from error
    except Exception as error:  # the module may run any code
        raise OptionError(f"{option} {name} cannot be imported: {type(error).__name__}: {error}") from error


@contextmanager
def hide_packages(*names: str) -> Iterator[None]:
    """Hide installed packages from imports in the block; packages that are already loaded stay loaded.

    A package that is imported in the block and looks for a hidden one continues without it. After the block,
    hidden packages can be imported again. It works because Python refuses to import a module whose entry in
    `sys.modules` is None.
    """
    hidden: dict[str, ModuleType | None] = {name: None for name in names if name not in sys.modules}
    sys.modules.update(hidden)  # type: ignore[arg-type]  # it takes None
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
