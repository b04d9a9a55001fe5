"""Turn a command line into a program of this project, and run it so that it outlives the server.

`python -m browser.jobs.launch` is the process that runs a job: it reads from standard input the program, its
working folder and the file for its exit code, and leads the process group of the job.
"""

import contextlib
import functools
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil  # comes with accelerate

from browser.jobs.earlier_jobs import EarlierJob, may_be_created
from downloads.catalogue import model_sets
from modules.atomic_write import write_text
from modules.command import did_you_mean, quote_command
from modules.control_codes import escape_control_codes, shorten
from modules.error_output import extract_error_message
from modules.errors import OptionError, OutputError
from modules.extension_words import split_extensions
from modules.extensions import list_named, split_names
from modules.installation import (
    EXTENSIONS_FLAG,
    FROM_QUEUE,
    FRONT_SCRIPT,
    LONGEST_NAME,
    ONLY_OPTIONS,
    PREFIX,
    ROOT,
    SCRIPT_ROOMS,
    TELLS_UNUSED,
    find_script,
    program_environment,
    program_words,
)
from modules.pages.language import join, refusal, say
from modules.paths import explain_missing
from modules.text_files import bad_character, real_path
from package.reelsmith.commands import ScriptCommand, find_commands

QUOTED = re.compile(r"""'[^']*'|"(?:\\"|[^"])*"|\\.""")
CD_PREFIX = re.compile(r"cd\s++(.+?)&&\s*+(.*)", re.DOTALL)  # `&&` is allowed only after `cd`
TILDE = re.compile(rf"({QUOTED.pattern})|(?<!\S)~(?=[/\s]|$)")  # outside quotes
SHELL_CHARACTERS = re.compile(r"[;&|<>()`$*?\0]|(?<!\S)[~#]")
# Options of `accelerate launch` that a job may have -> the shape of their values; None: it has no value.
# A job runs on this machine alone: a rendezvous at another address sends pickled state, which torch
# unpickles, and a file of settings can name such an address.
LAUNCHER_OPTIONS = {
    **dict.fromkeys(("--quiet", "--multi_gpu", "--cpu", "--same_network"), None),
    **dict.fromkeys(("--num_processes", "--num_cpu_threads_per_process", "--max_restarts"), r"\d{1,4}"),
    "--num_machines": "1",
    "--machine_rank": "0",
    "--main_process_port": r"\d{1,5}",
    "--rdzv_backend": "static",
    "--gpu_ids": r"all|\d{1,3}(,\d{1,3})*",
    "--mixed_precision": "no|fp16|bf16|fp8",
}
_VALUE_DESCRIPTIONS = {  # shape of a value -> description
    **dict.fromkeys((name for name, shape in LAUNCHER_OPTIONS.items() if shape is None), "no value"),
    "--num_machines": "1",
    "--machine_rank": "0",
    "--rdzv_backend": "static",
    "--gpu_ids": "all, or numbers with commas between them",
    "--mixed_precision": "no, fp16, bf16 or fp8",
}
# -P: import no modules from the working folder, which may come from somebody else
ACCELERATE = ["-P", "-m", "accelerate.commands.launch"]
# how scripts' messages continue after the path of a missing file
NO_SUCH_FILE = re.compile(r"(there is )?no such (file|folder)")
logger = logging.getLogger(__name__)
_find_commands = functools.cache(find_commands)


def split_arguments(line: str) -> list[str]:
    """Split a command line into arguments. Quotes and (except on Windows) backslashes work as in a shell.

    A `~/` at the beginning of a word is expanded.

    Raises OptionError for characters that only a shell understands, for an open quote, and for a backslash
    that looks like a separator in a Windows path.
    """
    # group 1 is text to keep unchanged, such as quotes; otherwise ~ was matched
    line = TILDE.sub(lambda found: found[1] or shlex.quote(str(Path.home())), line)
    shell_character = SHELL_CHARACTERS.search(QUOTED.sub("''", line))
    if shell_character:
        raise refusal(
            "%(mark)s in %(line)s: this line is not read by a shell. Quote the argument, or "
            "omit the character",
            mark=f"{shell_character[0]!r}",
            line=f"{line!r}",
        )
    escapes = [part for part in QUOTED.findall(line) if re.fullmatch(r"\\[\w.-]", part)]
    if escapes and os.name != "nt":
        raise refusal(
            "%(escapes)s in %(line)s: here a backslash escapes the next character. Write / "
            "between folders, or put the argument in single quotes",
            escapes=escapes[0],
            line=f"{line!r}",
        )
    lexer = shlex.shlex(line.replace("\\\n", " "), posix=True)  # a backslash at the end continues a line
    lexer.whitespace_split = True
    lexer.commenters = ""
    if os.name == "nt":
        lexer.escape = ""  # a backslash separates folders
    try:
        return list(lexer)
    except ValueError as error:
        raise OptionError(f"{line!r}: {error}") from None


def command_part(line: str) -> str:
    """Return a line without a `cd FOLDER &&` at its start."""
    match = CD_PREFIX.fullmatch(line.strip())
    return line if match is None else match[2]


def split_folder(line: str, folder: Path) -> tuple[str, Path]:
    """Return a line without a `cd FOLDER &&` at its start, and the folder in which its command runs.

    `folder` is the working folder of a line without `cd`. Raises OptionError if the named folder does not
    exist.
    """
    match = CD_PREFIX.fullmatch(line.strip())
    if match is None:
        return line, folder
    argv = split_arguments(match[1])
    if len(argv) != 1:
        raise OptionError(f"cd {match[1]}: pass one folder; quote a name that contains spaces")
    target = folder / Path(argv[0])
    try:
        is_there = target.is_dir()
    except (OSError, ValueError):  # too long, or an invalid name
        is_there = False
    if not is_there:
        raise refusal(
            "cd %(words)s: there is no such folder in %(folder)s", words=shorten(argv[0], 80), folder=folder
        )
    return match[2], target


def find_program(argv: Sequence[str], folder: Path) -> tuple[ScriptCommand, list[str]]:
    """Return this project's command that a command line names, and the program to start without a shell.

    Args:
        argv: `python SCRIPT ...`, `SCRIPT ...`, `reelsmith train wan ...`, or `accelerate launch [options]
            SCRIPT ...`; `reelsmith` may be followed by `--extensions NAMES`.

    Raises:
        OptionError: For any other command; the message names the wrong argument.
    """
    for word in argv:
        reason = bad_character(word)
        if reason is not None:
            raise OptionError(
                f"{shorten(word, 80)!r} contains {reason}. It cannot be passed to a program: omit it"
            )
    # the line without its Python, which is replaced by the one that runs this program
    script_argv = [*argv[1:]] if argv[:1] in (["python"], ["python3"]) else [*argv]
    launcher: list[str] = []
    if script_argv[:2] == ["accelerate", "launch"]:
        num_launcher_arguments = _count_launcher_arguments(script_argv)
        launcher = [*ACCELERATE, *script_argv[2:num_launcher_arguments]]
        script_argv = script_argv[num_launcher_arguments:]
    names, script_argv = split_extensions(script_argv)
    # a job gets the page's extensions, and brings none: its command may come from somebody's file
    missing = [name for name in split_names(names) if name not in list_named()]
    if missing:
        started_with = ",".join([*list_named(), *missing])
        raise refusal(
            "%(names)s: this page was started without this extension. End it, and start it with: %(command)s",
            names=join(", ", missing),
            command=quote_command(["python", FRONT_SCRIPT, EXTENSIONS_FLAG, started_with, "browser"]),
        )
    command, num_name_words = _find_command(script_argv, folder)
    script = program_words(command.path.relative_to(ROOT))
    return command, [sys.executable, *launcher, *script, *script_argv[num_name_words:]]


def find_job_program(argv: Sequence[str], folder: Path) -> list[str]:
    """Return the program's argv. Raises OptionError if it is not this project's, or never ends."""
    command, program = find_program(argv, folder)
    reject_endless(command, argv)
    return program


def _count_launcher_arguments(argv: Sequence[str]) -> int:
    """Return how many arguments at the start of `argv` belong to `accelerate launch` and its options."""
    position = 2  # after `accelerate launch`
    while position < len(argv) and argv[position].startswith("-") and argv[position] != "-m":
        name, equals_sign, value = argv[position].partition("=")
        if name not in LAUNCHER_OPTIONS:
            raise OptionError(
                f"{shorten(name, 80)}: in a job `accelerate launch` takes only {', '.join(LAUNCHER_OPTIONS)} "
                "and a script, all on this machine. Start the command in a terminal if it needs more"
            )
        position += 1
        pattern = LAUNCHER_OPTIONS[name]  # None for a switch, which has no value
        if pattern is not None and not equals_sign:
            value = "".join(argv[position : position + 1])
            position += 1
        if re.fullmatch(pattern or "", value, re.ASCII) is None:  # a switch must not have a value
            raise OptionError(
                f"{name} {shorten(value, 80)}: a job runs on this machine alone, and {name} takes "
                f"{_VALUE_DESCRIPTIONS.get(name, 'a whole number')} there. For several machines start the "
                "command in a terminal"
            )
    return position


# Runs a script until it has read its options: it ends by ONLY_OPTIONS, else before torch loads, or
# before it writes, starts or asks anything, because the options may come from somebody else's file.
ENDING_BEFORE_TORCH = f"""
import builtins, os, runpy, sys
sys.dont_write_bytecode = True
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
reaching = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate")
reaching += ("os.chmod", "os.chown", "os.utime", "os.kill", "signal.pthread_kill", "sqlite3.connect")
reaching += ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile")
reaching += ("subprocess.Popen", "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo")
reaching += ("socket.gethostbyname", "socket.gethostbyaddr", "webbrowser.open")
def end_at_writing(event, arguments):
    opens = event == "open" and isinstance(arguments[2], int)  # path, mode, flags of os.open
    if event in reaching or opens and arguments[2] & writing:
        os._exit(0)
sys.addaudithook(end_at_writing)
load = builtins.__import__
def load_until_torch(name, *how, **more):
    if name.partition(".")[0] == "torch" and not os.environ.get("{ONLY_OPTIONS}"):
        raise SystemExit(0)
    return load(name, *how, **more)
builtins.__import__ = load_until_torch
del sys.argv[0]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
# commands that load torch, at the latest right after reading their options
COMMANDS_WITH_TORCH = ("train", "finetune", "cache", "generate", "compare", "gen-img-diffusers")
ENDINGS_WITH_TORCH = ("gen-img", "minimal-inference")  # endings after the name of a model
# functions that end a script by ONLY_OPTIONS after it has read its options
SUPPORTS_ONLY_OPTIONS = re.compile(
    r"\b(parse_options|plain_script|tool_script|caching_script|training_script|generation_script|begin_loading)\("
)
WARNING_LINE = re.compile(r"^WARNING: (.+)$", re.MULTILINE)  # as scripts print them
CHECK_SECONDS = 20
MIN_SIMILAR = 0.75  # similarity from which a script name is suggested
HELP = ("-h", "--help")
INTERACTIVE_OPTION = "--interactive"
# options that name input files, in addition to model files; `--lora_weight a b` names two files
INPUT_FILE_OPTIONS = {
    *("--lora_weight", "--lora_weight_high_noise", "--network_weights", "--network_weights_high_noise"),
    *("--ckpt", "--from_file", "--image_path", "--end_image_path", "--video_path"),
    *("--control_image_path", "--sample_prompts", "--dataset_config", "--config_file", "--lora", "--input"),
}
POSITIONAL = ""  # key for positional arguments
FILE_NAME = re.compile(
    r".*\.(safetensors|ckpt|pt|pth|gguf|png|jpe?g|webp|mp4|txt|toml|json|zip|html)", re.IGNORECASE
)


def check_options(
    argv: Sequence[str],
    folder: Path,
    earlier: Sequence[EarlierJob] = (),
    seconds: float = CHECK_SECONDS,
    checks_files: bool = True,
) -> list[str]:
    """Let a script check its options, and return its warnings about them.

    Args:
        earlier: Jobs that run before the command. Files that they may create need not exist yet.
        seconds: Time limit for the check; a script that takes longer counts as accepted.
        checks_files: Whether to also require files that the script opens only later.

    Raises:
        OptionError: If the script rejects its options, with the script's message.
    """
    command, program = find_program(argv, folder)
    if any(word in HELP for word in argv):  # the script prints its help and ends
        return []
    reject_endless(command, argv)
    if command.words[0] == "run":
        # The job itself checks for a run.toml when it starts, because an earlier job may still write it.
        is_script = [word.endswith(("run_project.py", "run_project")) for word in program]
        run_folder = "".join(program[is_script.index(True) + 1 :][:1])  # the word after the script
        is_typed = run_folder != "" and not run_folder.startswith("-")
        if (
            is_typed
            and not (folder / run_folder).exists()
            and not may_be_created(folder / run_folder, earlier)
        ):
            raise refusal(
                "%(described)s: there is no such folder in %(folder)s, where relative paths begin. "
                "Pass its absolute path",
                described=shorten(run_folder, 80),
                folder=folder,
            )
    try:
        process = _run_until_options_are_read(command, program, folder, min(seconds, CHECK_SECONDS))
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.debug("%s", argv, exc_info=error)
        return []  # undecided: the command counts as accepted
    if process is None:  # the script would continue after it has read its options
        return []
    if process.returncode and not _may_be_created_later(process.stderr, argv, folder, earlier):
        raise OptionError(extract_error_message(process.stderr))
    if checks_files:
        _check_files(argv, folder, earlier)
    return [escape_control_codes(text) for text in WARNING_LINE.findall(process.stderr)]


def _run_until_options_are_read(
    command: ScriptCommand, program: Sequence[str], folder: Path, seconds: float
) -> "subprocess.CompletedProcess[str] | None":
    """Run a script only until it has read and checked its options; return None if it would not end there."""
    # seconds: Time limit.
    environment = {FROM_QUEUE: "1", TELLS_UNUSED: "1"}  # TELLS_UNUSED: report options without effect
    name = command.words[0]
    if SUPPORTS_ONLY_OPTIONS.search(command.path.read_text(encoding="utf-8")):
        environment[ONLY_OPTIONS] = "1"
    elif name not in COMMANDS_WITH_TORCH and not name.endswith(ENDINGS_WITH_TORCH):
        return None  # nothing would end it, as it loads no torch
    python, *script_argv = program
    if script_argv[:3] == ACCELERATE:
        # without `accelerate launch` and its options
        script = program_words(command.path.relative_to(ROOT))
        script_start = script_argv.index(script[-1]) + 1 - len(script)
        script_argv = list(script_argv[script_start:])
    return subprocess.run(
        [python, "-P", "-c", ENDING_BEFORE_TORCH, *script_argv],
        cwd=folder,
        env=program_environment(**environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=seconds,
    )


def find_earlier_job(argv: Sequence[str], folder: Path) -> EarlierJob | None:
    """Return a job's command, to check jobs after it that may need its files; None if it is rejected."""
    with contextlib.suppress(OptionError):
        command, _ = find_program(argv, folder)
        return EarlierJob(command.path.relative_to(ROOT), argv, folder)
    return None


def _may_be_created_later(
    message: str, argv: Sequence[str], folder: Path, earlier: Sequence[EarlierJob]
) -> bool:
    """Return whether a script failed only because of files that jobs before it may still create."""
    if not earlier or not NO_SUCH_FILE.search(message):
        return False
    values = {value for word in argv for value in (word, word.rpartition("=")[2])} - {""}
    missing = [
        value for value in values if re.search(rf"{re.escape(value)}: {NO_SUCH_FILE.pattern}", message)
    ]
    return all(may_be_created(folder / value, earlier) for value in missing)


def reject_endless(command: ScriptCommand, argv: Sequence[str]) -> None:
    """Raise OptionError for a command that never ends or waits for input, and so would block the queue."""
    if any(word in HELP for word in argv):  # the command prints its help and ends
        return
    options = [word.partition("=")[0] for word in argv if word.startswith("--")]
    if command.words[0] == "browser" and "--export" not in options:
        raise refusal(
            "%(name)s runs until somebody ends it, and all later jobs would wait. Type it in a terminal",
            name=command.name,
        )
    interactive_option = next(filter(_asks_for_prompts, options), None)
    if interactive_option is not None:
        raise refusal(
            "%(option)s asks for prompts in a terminal, and a job has none. Pass --prompt, "
            "or --from_file with a prompt in each line",
            option=interactive_option,
        )
    if command.words[0] == "new" and "--family" not in options:
        raise refusal(
            "new asks for a model in a terminal, and a job has none. Pass --family, and "
            "--task if the family has several"
        )


def _asks_for_prompts(option: str) -> bool:
    # argparse accepts abbreviations; `--in` and shorter ones may also mean other options, such as --input
    return INTERACTIVE_OPTION.startswith(option) and len(option) > len("--in")


@functools.cache
def _file_options() -> frozenset[str]:
    """Return the options that name the files a command reads."""
    parts = [part.option for model in model_sets() for part in model.components if part.option]
    return frozenset({*INPUT_FILE_OPTIONS, *parts})


def _check_files(argv: Sequence[str], folder: Path, earlier: Sequence[EarlierJob]) -> None:
    """Raise OptionError for the first input file that neither exists nor may be created by an earlier job."""
    input_options = {POSITIONAL, *_file_options()}
    if "--output_config" in argv:  # then a training run writes the file that --config_file names
        input_options.discard("--config_file")
    option = POSITIONAL  # the option to which the current word belongs
    for word in argv:
        if word.startswith("-"):  # --option or --option=word
            option, _, word = word.partition("=")
        is_input_file = option in input_options and FILE_NAME.fullmatch(word) is not None
        if is_input_file and not (folder / word).exists() and not may_be_created(folder / word, earlier):
            raise OptionError(
                say(
                    "%(option)s %(word)s: no such file in %(folder)s, where relative paths "
                    "begin.%(explain_missing)s Fix the path",
                    option=option,
                    word=shorten(word, 200),
                    folder=folder,
                    explain_missing=explain_missing(folder / word),
                ).lstrip()
            )


def _find_command(argv: Sequence[str], folder: Path) -> tuple[ScriptCommand, int]:
    """Return this project's command at the start of a command line, and the number of words in its name."""
    is_module = argv[:1] == ["-m"]
    num_words = 2 if is_module else 1
    name = " ".join(argv[:num_words])
    script = _find_script_by_name(name, is_module, folder)
    if name in ("reelsmith", FRONT_SCRIPT) or script == Path(FRONT_SCRIPT):
        command = _find_front_command(argv[1:])
        if command is not None:
            return command, 1 + len(command.words)
        name = " ".join((name, *argv[1:3]))  # for the message
    command = None if script is None else _find_script_command(script)
    if command is not None:
        return command, num_words
    typed = name.rpartition("/")[2]
    known_names = [command.path.name for command in _find_commands(ROOT)]
    if name.startswith("reelsmith "):
        typed = argv[1]
        known_names = [command.words[0] for command in _find_commands(ROOT)]
    hint = did_you_mean(typed[:LONGEST_NAME], known_names, MIN_SIMILAR)
    raise refusal(
        "%(word)s is not a command of this program.%(hint)s A job is a line such as "
        "python wan_train_network.py ..., with `accelerate launch ...` before it if needed",
        word=f"{shorten(name, 80)!r}",
        hint=hint,
    )


def _find_script_by_name(name: str, is_module: bool, folder: Path) -> Path | None:
    """Return the script that the first words of a command line name, relative to the project."""
    # the installed package is run as `python -m reelsmith.tools.mask`
    script_name = name.removeprefix("-m reelsmith.").replace(".", "/") if is_module else name
    script = find_script(script_name)
    if script is None and name.endswith(".py"):
        script = _find_script_file(folder / name)
    return script


def _find_front_command(words: Sequence[str]) -> ScriptCommand | None:
    """Return the command of `reelsmith train wan`, or of the same after `python reelsmith.py`."""
    for command in _find_commands(ROOT):
        if tuple(words[: len(command.words)]) == command.words:
            return command
    return None


def _find_script_command(script: Path) -> ScriptCommand | None:
    """Return the command of a script at the root, or of the same script in one of the folders of scripts."""
    if script.parent.as_posix() not in (".", *SCRIPT_ROOMS):
        return None
    return next((command for command in _find_commands(ROOT) if command.path.name == script.name), None)


def _find_script_file(path: Path) -> Path | None:
    """Return the path of a script relative to the project; None if it is outside the project."""
    path = real_path(path)
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else None


def prepare_process(log: Path, **variables: str) -> "subprocess.Popen[bytes]":
    """Start a process that waits for a job's command on its stdin, and ends if none arrives.

    It gets its own process group, so that the job can be stopped without the server.

    Args:
        **variables: Environment variables, for the job too.

    Raises:
        OSError: If the log is a link.
    """
    # O_NOFOLLOW: a link could lead the output out of the folder; O_APPEND: an earlier log stays
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with os.fdopen(handle, "ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", f"{PREFIX}browser.jobs.launch"],
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )


def send_job(waiting: "subprocess.Popen[bytes]", program: Sequence[str], folder: str, code: Path) -> None:
    """Let a waiting process, started by `prepare_process`, run `program`; `code` is its exit code's file."""
    assert waiting.stdin is not None
    with contextlib.suppress(BrokenPipeError), waiting.stdin:
        waiting.stdin.write(json.dumps([program, folder, str(code)]).encode())


def interrupt_processes(number: int) -> None:
    """Send Ctrl-C to a job's process group, so that a training run saves and ends.

    `number` is the id of the process that runs the job.
    """
    with contextlib.suppress(OSError):  # it has just ended, or on Windows has another console
        if sys.platform == "win32":
            os.kill(number, signal.CTRL_BREAK_EVENT)
        else:
            os.killpg(number, signal.SIGINT)


def kill_processes(number: int) -> None:
    """Kill a job and all processes that it has started, even in other process groups."""
    with contextlib.suppress(psutil.NoSuchProcess):
        leader = psutil.Process(number)
        for process in [leader, *leader.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def main() -> None:
    """Read a job from stdin, run it, and write its exit code to a file."""
    job = sys.stdin.buffer.read()  # JSON: program, folder, file for the exit code
    if not job:  # the server was killed before it stored this process
        return
    signals: list[int] = []
    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):  # the job gets them too; this process waits for its end
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: signals.append(number))
    program, folder, path = json.loads(job)
    try:
        process = subprocess.Popen(
            program, cwd=folder, env=program_environment(**{FROM_QUEUE: "1"}), stdin=subprocess.DEVNULL
        )
    except OSError as error:
        write_code(Path(path), 1)
        raise SystemExit(f"{folder}: no job can be started there: {error.strerror}") from None
    if signals and sys.platform != "win32":  # signals arrived before the job was started
        process.send_signal(signals[0])
    write_code(Path(path), process.wait())


def write_code(path: Path, code: int) -> None:
    """Write the exit code of a job.

    A write error is ignored, because its message would hide the last output of the job.
    """
    try:
        write_text(path, str(code))
    except OutputError:
        with contextlib.suppress(OSError):  # without the code, log and history show the state
            path.write_text(str(code), encoding="utf-8")


if __name__ == "__main__":
    main()
