"""Run the commands of a described folder, one after the other, until one fails."""

import contextlib
import io
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dataset.config import DatasetConfig
from dataset.options import CachingOptions
from dataset.scripts import cache_family_latents
from dataset.sources.media_source import Fault
from downloads.listing import gigabytes, print_lines, total_bytes
from downloads.naming import leave_out
from modules import installation
from modules.command import command_line, did_you_mean, quote_command
from modules.console import list_some, quiet
from modules.control_codes import shorten
from modules.error_output import extract_error_message
from modules.errors import INTERRUPTED, OptionError
from modules.option_tables import list_rows
from modules.option_values import option_argv
from modules.options import WRITES, replace_synonyms
from modules.output_files import check_output_name
from modules.paths import expand_path
from modules.run_limits import describe_outside, limit_run, reject_outside
from modules.text_files import parse_toml, read_safetensors_texts, read_text, real_path
from project.checked import remember_checked, was_checked
from project.kinds.composing import LORA, find_run_kind, kinds_by_script
from project.kinds.contract import RunKind
from project.model_sizes import list_transformers
from project.on_end import EndCommand, describe_run
from project.options import (
    CAPTION_MODEL,
    CAPTION_MODEL_SIZE,
    RUN_FILE,
    as_operand,
    find_models,
    find_own_script,
    make_caption_argv,
    own_command,
    script_family,
    typed_in,
)
from project.run_options import TRAINING_ROWS, RunOptions
from project.script_facts import read_script_options
from project.tracing import RunTrace, trace_run
from protocols.families import Script, identify, with_scripts
from training.config_options import PROJECT_TABLE
from training.reports.history import history_path, read_history, read_session
from training.saving.files import recover_states, state_pattern

ARCHITECTURE = "modelspec.architecture"  # metadata key of trained files
# kinds of errors that a check finds
NO_CAPTIONS = ("have no caption",)
BAD_CAPTIONS = ("have a caption that cannot be used",)
PLACES = ("output_dir", "output_name", "logging_dir")  # where a run writes, not how it trains
UNREADABLE = "cannot be read"  # kind of error that does not end a run: these files are left out


@dataclass(frozen=True)
class Project:
    """A training run described by run.toml: its commands, model files and output."""

    folder: Path  # working folder of the commands
    download_command: list[str]
    commands: list[list[str]]
    model_files: list[str]  # model files
    output_folder: Path
    log_folder: Path | None  # folder of TensorBoard logs
    output_name: str
    total_steps: int | None  # None: the length is set in epochs
    model_metadata: dict[str, str]  # metadata that identifies the model in its trained files
    kind: RunKind  # kind of run
    validation_split: tuple[float, int]  # fraction and seed

    @property
    def missing_model_files(self) -> list[str]:
        """Return the model files that the run needs and that do not exist."""
        return [name for name in self.model_files if not (self.folder / name).exists()]


class MediaCheck(NamedTuple):
    """Results of checking the media files."""

    fatal_error_kinds: list[str]  # kinds of errors that end the run; empty if it can start
    unreadable_files: list[str]  # files that the run leaves out


def run_project(options: RunOptions) -> None:
    """Run the commands of a project folder and record their progress. Exits if a command fails."""
    with EndCommand(options.end_words) as end, trace_run() as trace:
        run_commands(options, trace, end)


def run_commands(options: RunOptions, trace: RunTrace, end: EndCommand) -> None:
    """Run the commands of a project: check, download, cache and train; then print the path of its page.

    Unreadable media files are left out and listed at the end. Exits with the return code of the first command
    that fails.

    Raises:
        OptionError: If the folder has no project, or if model files are missing and may not be downloaded.
    """
    typed_options = {
        name: real_path(value) if isinstance(value, Path) else value
        for name, value in options.typed_for_training.items()
    }
    folder = options.folder.parent if options.folder.name == RUN_FILE else options.folder
    folders = [folder]
    folders += [
        value
        for name, value in options.typed_for_training.items()
        if TRAINING_ROWS[name].get("reach") == WRITES["reach"]
    ]
    folders += options.may_write
    if options.download:
        folders.append(options.models)
    # run.toml may come from a stranger: its commands can only write into these folders
    with limit_run(folders, typed_options.keys(), own_command(*options.as_arguments)):
        _run_or_check(options, read_project(options.folder, typed_options), trace, end)


def _run_or_check(options: RunOptions, project: Project, trace: RunTrace, end: EndCommand) -> None:
    """Execute `run` for a project: check it, or start its commands one after the other until one fails."""
    if options.check:
        check_project(project, options)
        return
    trained_lines = _describe_finished_training(project, options)
    if trained_lines:
        print_lines(trained_lines)
        return
    # an interrupted run has saved its state: continue from the latest one
    if _has_saved_state(project):
        project = _extend_training(project, ["--resume", "latest"])
    commands = project.commands
    if project.missing_model_files:
        if not (options.download or options.dry_run):
            raise OptionError(_explain_missing(project, options.models))
        commands = [project.download_command, *commands]
    print_lines([f"In the folder {project.folder}:"])
    if options.dry_run:
        for argv in commands:
            _print_command(argv, project.folder)
    else:
        # Run commands until one fails, with a record of their progress, and print where the result is
        # `end` runs the user's command at the end of the run.
        # the command to repeat this run; the first two words are `run` and the folder as typed
        repeat_argv = ["run", str(project.folder), *options.as_arguments[2:]]
        end.arm(
            partial(
                describe_run, project.output_folder, project.output_name, project.total_steps, time.time()
            )
        )
        trace.begin(
            repeat_argv, output=project.output_folder, name=project.output_name, steps=project.total_steps
        )
        unreadable_files = _run_until_one_fails(commands, project, trace)
        # Print the files that could not be trained on, and the path of the run's HTML page
        if unreadable_files:
            lines = ["", f"Trained without {len(unreadable_files)} that cannot be read:"]
            lines += [f"  {text}" for text in unreadable_files]
            print_lines(lines)
        print_lines(["", f"The page of the training: {project.output_folder / project.output_name}.html"])


def _has_saved_state(project: Project) -> bool:
    """Return whether training can resume from a complete saved state."""
    recover_states(project.output_folder, project.output_name)
    pattern = state_pattern(project.output_name)
    names = [path.name for path in project.output_folder.iterdir()] if project.output_folder.is_dir() else []
    if not any(map(pattern.fullmatch, names)):
        return False
    from training.saving.states import find_latest  # loads torch, which a first run does not need

    return find_latest(project.output_folder, project.output_name) is not None


def _explain_missing(project: Project, models: Path) -> str:
    """Return the error message about missing model files, with the options that download them."""
    # `models` is the default download folder.
    size = _download_size(project.download_command)
    options = quote_command(_list_download_options(project, models))
    return (
        f"{project.missing_model_files[0]} is missing{size}. Add {options}, or run\n"
        f"  {quote_command(project.download_command)}\n"
        f"If it is elsewhere, correct its path in {project.folder / RUN_FILE}"
    )


def _print_command(argv: Sequence[str], folder: Path) -> None:
    print_lines(["", f"$ {typed_in(argv, folder)}"])
    sys.stdout.flush()


def _run_until_one_fails(commands: Sequence[list[str]], project: Project, trace: RunTrace) -> list[str]:
    """Run the commands in order, without checks that passed before; return lines about skipped media."""
    # Exits with the return code of the first command that fails.
    unreadable_files: list[str] = []
    is_checked = was_checked(project.folder, project.commands, project.model_files)
    if is_checked:
        print_lines(["Checked already, and nothing has changed since: it is not checked again."])
    for argv in commands:
        if is_checked and "--check" in argv:
            continue
        _print_command(argv, project.folder)
        trace.note(argv)
        if _is_media_check(argv):
            # Check the training options and media files; return lines about files that the run leaves out
            # Exits with code 1 if an error would stop the run. `argv` is the command that checks media.
            _check_training(project)
            outcome = _check_media(argv, project.folder, project.validation_split)
            if outcome.fatal_error_kinds:
                _print_remedies(argv, project.folder, outcome.fatal_error_kinds)
                raise SystemExit(1)
            if outcome.unreadable_files:
                print_lines([f"Continuing without {len(outcome.unreadable_files)} that cannot be read."])
            unreadable_files = outcome.unreadable_files
        else:
            with trace.follow(argv) as progress:
                _run_or_exit(argv, project.folder, may_skip_files=bool(unreadable_files), progress=progress)
        # the download command is run only if files are missing, and must provide all of them
        if argv == project.download_command and project.missing_model_files:
            raise OptionError(
                f"{project.missing_model_files[0]} is still missing: "
                f"correct its path in {project.folder / RUN_FILE}"
            )
    return unreadable_files


def check_project(project: Project, options: RunOptions) -> None:
    """Run the checks that precede a training run, and print what they find; nothing is cached or trained.

    Exits with code 1 if an error would stop the run.

    Raises:
        OptionError: If a training option is wrong.
    """
    print_lines([f"In the folder {project.folder}:"])
    if project.missing_model_files:  # the training options are checked against these files
        size = _download_size(project.download_command)
        print_lines(
            [f"{project.missing_model_files[0]} is missing{size}: its options are checked once it exists."]
        )
    else:
        _check_training(project, is_alone=True)
    checks = [_run_check(argv, project) for argv in project.commands if "--check" in argv]
    if any(check.has_errors for check in checks):
        raise SystemExit(1)
    # `run` skips checks that have passed in full for unchanged files
    has_unreadable_files = any(check.has_unreadable_files for check in checks)
    if not has_unreadable_files and not project.missing_model_files:
        remember_checked(project.folder, project.commands, project.model_files)
    run_argv = options.as_arguments
    if project.missing_model_files and not options.download:
        run_argv += _list_download_options(project, options.models)
    print_lines(["", f"The run can begin: {own_command(*run_argv)}"])


class CheckOutcome(NamedTuple):
    """Whether a check has found errors that end the run, or files that the run leaves out."""

    has_errors: bool
    has_unreadable_files: bool = False


def _run_check(argv: Sequence[str], project: Project) -> CheckOutcome:
    """Run a command that only checks the dataset, and print how to fix the errors that it finds in media."""
    _print_command(argv, project.folder)
    if not _is_media_check(argv):
        return CheckOutcome(has_errors=bool(_run_here(argv, project.folder, mode="1")))
    outcome = _check_media(argv, project.folder, project.validation_split)
    if outcome.fatal_error_kinds:
        _print_remedies(argv, project.folder, outcome.fatal_error_kinds)
    return CheckOutcome(
        has_errors=bool(outcome.fatal_error_kinds), has_unreadable_files=bool(outcome.unreadable_files)
    )


def _run_or_exit(
    argv: Sequence[str], folder: Path, may_skip_files: bool, progress: Path | None = None
) -> None:
    """Run a command of the project; exit with its return code if it fails."""
    # With `may_skip_files`, a command that skips unreadable files has not failed, because the check has
    # already reported these files. `progress` is the file into which the command writes its progress.
    code = run_command(argv, folder, progress)
    has_skipped_files = code == installation.SOURCES_LEFT_OUT
    if code == 0 or (has_skipped_files and may_skip_files):
        return
    if code == INTERRUPTED:
        raise KeyboardInterrupt  # so the run ends as after Ctrl-C
    _print_remedies(argv, folder)
    raise SystemExit(1 if has_skipped_files else code)


def read_project(path_or_folder: Path, typed_options: Mapping[str, Any]) -> Project:
    """Return the project in a folder's run.toml, after checking its paths."""
    # a path to its run.toml stands for the folder
    if path_or_folder.name == RUN_FILE and not path_or_folder.is_dir():
        folder = path_or_folder.parent
    elif path_or_folder.is_file():
        raise OptionError(
            f"{path_or_folder} is a file. Pass the folder that `new` described, or its {RUN_FILE}"
        )
    else:
        folder = path_or_folder
    path = folder / RUN_FILE
    try:
        project = _parse_project(folder, parse_toml(read_text(path)), typed_options)
    except FileNotFoundError:
        if not folder.is_dir():
            raise OptionError(f"{folder}: there is no such folder. Correct the path") from None
        new_command = own_command("new", as_operand(folder))
        raise OptionError(
            f"{path}: there is no such file. Describe the folder first: {new_command}"
        ) from None
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise OptionError(
            f"{path} is not in the form that `new` writes ({reason}). Fix it, or run `new` again."
        ) from None
    # Raise OptionError if a run would write outside of its folders or start a script of another program
    name_option = f"{path}: output_name"
    # `name_option` is the option that sets the output name, for messages.
    # before history_path, which makes a path of the name; checked again below if the run is new
    check_output_name(name_option, project.output_name, is_new=False)
    reject_outside("output_dir", project.output_folder)
    has_begun = history_path(project.output_folder, project.output_name).exists()
    check_output_name(name_option, project.output_name, is_new=not has_begun)
    if project.log_folder is not None:
        reject_outside("logging_dir", project.log_folder)
    for argv in (project.download_command, *project.commands):
        _require_script(argv)
    typed_argv = option_argv({f"--{name}": value for name, value in typed_options.items()})
    return _extend_training(replace(project, folder=real_path(folder)), typed_argv)


def _extend_training(project: Project, argv: Sequence[str]) -> Project:
    """Append arguments to the training command, which is the last command of the project."""
    *first_commands, training = project.commands
    return replace(project, commands=[*first_commands, [*training, *argv]])


def _parse_project(folder: Path, tables: Mapping[str, Any], typed_options: Mapping[str, Any]) -> Project:
    """Return the project that the tables of run.toml describe."""
    # `typed_options` override its training options.
    project_table = tables[PROJECT_TABLE]  # commands and model files
    training_options = {**tables["training"], **typed_options}
    # the first command is always the download
    download_command, *commands = [list(map(str, argv)) for argv in project_table["commands"]]
    output_folder = expand_path(str(training_options["output_dir"]), folder)
    output_name = str(training_options["output_name"])
    log_folder = None
    if training_options.get("logging_dir"):
        log_folder = expand_path(str(training_options["logging_dir"]), folder)
    model_files = [str(file) for file in project_table["files"]]
    model_metadata = _make_model_metadata(training_options, commands)
    seed = int(training_options.get("validation_seed", training_options.get("seed", 0)))
    validation_split = (float(training_options.get("validation_split", 0)), seed)
    total_steps = None
    if "max_train_epochs" not in training_options:
        total_steps = int(training_options["max_train_steps"])
    if not commands:
        raise ValueError("there is no command")
    return Project(
        folder=folder,
        download_command=download_command,
        commands=commands,
        model_files=model_files,
        output_folder=output_folder,
        log_folder=log_folder,
        output_name=output_name,
        total_steps=total_steps,
        model_metadata=model_metadata,
        kind=find_run_kind(commands),
        validation_split=validation_split,
    )


def _make_model_metadata(values: Mapping[str, Any], commands: Sequence[Sequence[str]]) -> dict[str, str]:
    """Return the metadata that trained files use to name their model: `ss_` keys such as `ss_task`."""
    names = ("network_module", "task", "model_version", "ltx_mode")
    chosen = {name: str(values[name]) for name in names if name in values}
    for argv in commands:
        with contextlib.suppress(KeyError, IndexError):
            rows = list_rows(f"{with_scripts()[script_family(argv)].training_script}.py")
            chosen = replace_synonyms({name: row.get("noted", {}) for name, row in rows.items()}, chosen)
    return {f"ss_{name}": value for name, value in chosen.items()}


def _describe_finished_training(project: Project, options: RunOptions) -> list[str]:
    """Return lines about a training run that has already finished; [] if it has not, or in a dry run."""
    file = project.output_folder / f"{project.output_name}.safetensors"
    if not file.exists():  # in diffusers' layout, the U-Net's file has the metadata
        file = project.output_folder / project.output_name / "unet" / "diffusion_pytorch_model.safetensors"
    try:
        metadata = read_safetensors_texts(file)
        # only 12 digits, because a damaged file may contain any number of them
        trained_steps = int(metadata.get("ss_steps", "0")[:12])
    except (OSError, ValueError):
        return []
    difference = _find_model_difference(project, metadata)
    if difference is not None:
        raise OptionError(
            f"{file} belongs to a different model ({shorten(difference, 80)}). Set another output_name in "
            f"{project.folder / RUN_FILE}, or move that file and its states away"
        )
    is_whole = project.total_steps is not None and trained_steps >= project.total_steps
    if options.dry_run or not (is_whole or "ss_ended_early" in metadata):
        return []
    changes = _list_changes_since(project)
    changed = [f"- {RUN_FILE} has changed since: {list_some(changes)}. This has no effect on {file.name}."]
    return [
        f"{file} is trained already: {trained_steps} of {project.total_steps} steps.",
        *(changed if changes else []),
        f"- Train longer: raise max_train_steps in {project.folder / RUN_FILE}, then run this again.",
        f"- Generate: the commands are on its page, {project.output_folder / project.output_name}.html",
        f"- Train anew under another name: set output_name in {RUN_FILE}.",
    ]


def _list_changes_since(project: Project) -> list[str]:
    """Return the options whose values in run.toml differ from those of the last run: NAME OLD -> NEW."""
    path = history_path(project.output_folder, project.output_name)
    try:
        session = read_session(path)
        start = None if session is None else read_history(path, session).start
        training = parse_toml(read_text(project.folder / RUN_FILE))["training"]
    except (OSError, ValueError, KeyError):
        return []
    if start is None:
        return []
    trained_with = {**dict(start.unchanged), **dict(start.changed)}  # as texts
    known = read_script_options(project.commands[-1][1]).accepted
    changes = []
    for name, value in training.items():
        if name in PLACES:
            continue
        if name not in known:
            meant = did_you_mean(name, known, min_similar=0.9)
            changes += [f"{name} (no option:{meant.lower()})"] if meant else []
        elif not _is_same_value(trained_with.get(name, known[name].default), value):
            changes.append(f"{name} {trained_with.get(name, known[name].default)} -> {value}")
    return changes


def _is_same_value(before: Any, now: Any) -> bool:
    """Return whether an option's value in a history, which is a text, is that of a run.toml."""
    texts = [
        " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        for value in (before, now)
    ]
    try:
        return float(texts[0]) == float(texts[1])
    except ValueError:
        return texts[0] == texts[1]


def _find_model_difference(project: Project, metadata: Mapping[str, str]) -> str | None:
    """Return the model in a trained file's metadata if it differs from the project's model, else None."""
    released = {part.path.name for model in find_models() for part in list_transformers(model)}
    transformers = released & {Path(name).name for name in project.model_files}
    trained_name = metadata.get("ss_sd_model_name", "")
    if transformers and trained_name in released - transformers:
        return trained_name
    architecture = metadata.get(ARCHITECTURE, "")
    if project.kind is not LORA and architecture.partition("/")[2] != project.kind.architecture_suffix:
        return architecture
    for key, expected in project.model_metadata.items():
        if metadata.get(key, expected) != expected:
            return metadata[key]
    return None


def _list_download_options(project: Project, models: Path) -> list[str]:
    """Return the options that let `run` download missing files."""
    # `models` is the default folder of --download; any other folder has to be named.
    target = project.folder / _list_typed_values(project.download_command).get("--to", "models")
    is_allowed = real_path(target).is_relative_to(real_path(models)) or describe_outside(target) is None
    return ["--download"] if is_allowed else ["--download", "--models", str(target)]


def _download_size(argv: Sequence[str]) -> str:
    """Return the download size of a command's model in brackets; "" if unknown."""
    typed_options = _list_typed_values(argv)
    for model in find_models("--fp8_encoders" in argv):
        if (model.family, model.task) == (typed_options.get("--family"), typed_options.get("--task")):
            behind = itertools.dropwhile(lambda word: word != "--without", argv)
            names = itertools.takewhile(
                lambda word: not word.startswith("--"), itertools.islice(behind, 1, None)
            )
            unreadable_files = list(names)
            parts = leave_out(model, unreadable_files).components
            what = "without the files that you have" if unreadable_files else "for the whole model"
            return f" ({gigabytes(total_bytes(parts))} {what})"
    return ""


def _list_typed_values(argv: Sequence[str]) -> dict[str, str]:
    """Return each argument of a command with the argument after it, to look up the values of options."""
    return dict(itertools.pairwise(argv))


def _is_media_check(argv: Sequence[str]) -> bool:
    with contextlib.suppress(KeyError, IndexError):
        return "--check" in argv and bool(script_family(argv))
    return False


def _check_training(project: Project, is_alone: bool = False) -> None:
    """Let the training script check its options and files, before hours of caching."""
    # With `is_alone`, nothing follows: this process may keep what the check leaves on a GPU, and loads torch
    # once for all checks. Otherwise the check is a process of its own.
    argv = project.commands[-1]  # the last command trains
    if is_alone:
        errors = io.StringIO()
        with quiet(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            code = _run_here(argv, project.folder, mode=installation.RUN_CHECKS)
        if code:
            raise OptionError(extract_error_message(errors.getvalue()))
        return
    process = subprocess.run(
        [sys.executable, *installation.program_words(_require_script(argv)), *argv[2:]],
        cwd=project.folder,
        env=installation.program_environment(**{installation.RUN_GOES_ON: installation.RUN_CHECKS}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if process.returncode:
        raise OptionError(extract_error_message(process.stderr))


def _run_here(argv: Sequence[str], folder: Path, mode: str) -> int:
    """Run one of our scripts in this process, and return its exit code; `mode` is for RUN_GOES_ON."""
    main: Script = installation.import_own(".".join(_require_script(argv).with_suffix("").parts)).main
    interrupt = signal.getsignal(signal.SIGINT)
    os.environ[installation.RUN_GOES_ON] = mode
    try:
        with contextlib.chdir(folder):
            command_line(partial(main, argv[2:]), explain=partial(identify, family=main.family))
    except SystemExit as end:
        code = 0 if end.code is None else int(end.code)
        if code == INTERRUPTED:
            raise KeyboardInterrupt from None
        return code
    finally:
        del os.environ[installation.RUN_GOES_ON]
        signal.signal(signal.SIGINT, interrupt)  # `command_line` has set it for the end of a process
    return 0


def _check_media(argv: Sequence[str], folder: Path, validation: tuple[float, int] = (0.0, 0)) -> MediaCheck:
    """Check the media files with the script that caches latents; return errors or unreadable files."""
    # `validation` is the training run's fraction of validation files and the seed that selects them.
    media_faults: list[Fault] = []

    # the caching script loads the family and the dataset, and then calls this function instead of encoding
    def check_instead_of_caching(
        family: Any, config: DatasetConfig, options: CachingOptions, *_: object
    ) -> None:
        # Check the media as caching would read them, print the findings, and return the errors
        # imported here because they load torch, which most project commands do not need
        from data_tools.report.check import TOKENS_ELSEWHERE, check_caching, print_check
        from dataset.caching.prefetch import count_workers

        workers = count_workers(options)
        findings = check_caching(
            family,
            config,
            workers=workers,
            skip_existing=options.skip_existing,
            verify=options.verify,
            validation=validation,
        )
        # captions are checked by the command that encodes them
        findings = replace(findings, counters=TOKENS_ELSEWHERE)
        print_check(findings, family, config, page=options.page, workers=workers)
        media_faults.extend([error for table in findings.tables for error in table.errors])

    with contextlib.chdir(folder):
        cache_family_latents(script_family(argv), None, list(argv[2:]), check_instead_of_caching)
    fatal_kinds = [error.kind for error in media_faults if error.kind != UNREADABLE and error.is_fatal]
    if fatal_kinds:
        return MediaCheck(fatal_error_kinds=list(dict.fromkeys(fatal_kinds)), unreadable_files=[])
    return MediaCheck(fatal_error_kinds=[], unreadable_files=[error.text for error in media_faults])


def _print_remedies(argv: Sequence[str], folder: Path, kinds: Sequence[str] = ()) -> None:
    """Print how to correct the errors that a failed check has found."""
    # `kinds` are the kinds of errors.
    if "--check" not in argv:
        return
    print_lines(["", f"Fix the problems listed above in the folder {folder}, then run this again."])
    if any(kind in BAD_CAPTIONS for kind in kinds):
        print_lines(
            [
                "To convert captions that are not UTF-8, run this in that folder:",
                f"  {typed_in([*argv, '--repair_captions'], folder)}",
            ]
        )
    if any(kind in NO_CAPTIONS for kind in kinds):
        print_lines(
            [
                f"Missing captions are written by a model ({CAPTION_MODEL}, {CAPTION_MODEL_SIZE} to "
                "download), in that folder:",
                f"  {typed_in(make_caption_argv([argv]), folder)}",
                'or add class_tokens = "WORD" to the table in dataset.toml: a made-up word in their place.',
            ]
        )


def _require_script(argv: Sequence[str]) -> Path:
    """Return the path of the script that a command starts."""
    script = find_own_script(argv)
    if script is None or script not in _list_run_scripts():
        raise OptionError(
            f"{quote_command(argv)} is not a command of a run, which downloads, caches, trains and "
            f"generates. Fix {RUN_FILE}."
        )
    return script


def _list_run_scripts() -> set[Path | None]:
    """Return all scripts that a run may start: download, caching, training and generation."""
    scripts = {installation.find_script("download")}
    for entry in with_scripts().values():
        names = [f"{entry.cache}_latents", f"{entry.cache}_text_encoder_outputs"]
        names += [entry.training_script, entry.generation_script]
        scripts |= {Path(f"{name}.py") for name in names}
    return scripts | {installation.find_script(name) for name in kinds_by_script()}


def run_command(argv: Sequence[str], folder: Path, progress: Path | None = None) -> int:
    """Run one of our scripts as a program in a folder and return its exit code.

    The program writes its progress to the file `progress`. It gets Ctrl-C directly from the terminal; this
    process forwards SIGTERM, and waits for the program to end.

    Raises:
        OptionError: If the command does not run one of our scripts.
    """
    script = _require_script(argv)
    interrupts: list[int] = []  # signal numbers that this process has received
    # the script prints no hint about the next command, which this process starts
    variables = {installation.RUN_GOES_ON: "1"}
    if progress is not None:
        variables[installation.PROGRESS] = str(progress)
    environment = installation.program_environment(**variables)
    program = [sys.executable, *installation.program_words(script), *argv[2:]]
    with subprocess.Popen(program, cwd=folder, env=environment) as process:

        def note_interrupt(number: int, _: Any) -> None:
            interrupts.append(number)

        def pass_on_termination(number: int, _: Any) -> None:
            interrupts.append(number)
            process.terminate()

        # set after the start, because a program inherits ignored signals
        default_interrupt = signal.signal(signal.SIGINT, note_interrupt)
        default_end = signal.signal(signal.SIGTERM, pass_on_termination)
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGINT, default_interrupt)
            signal.signal(signal.SIGTERM, default_end)
    if interrupts:
        return INTERRUPTED
    return abs(code)  # a negative code is the number of the signal that killed the program
