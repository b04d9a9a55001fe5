"""Run the commands of a described folder, one after the other, until one fails."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset.scripts import cache_family_latents
from downloads.catalogue import ModelSet
from downloads.listing import gigabytes, print_lines, total_bytes
from modules import installation
from modules.command import INTERRUPTED, as_typed, message_of
from modules.control_codes import shorten
from modules.errors import OptionError
from modules.families import with_scripts
from modules.option_values import option_words
from modules.output_files import check_output_name
from modules.paths import expand_path, path_from
from modules.run_limits import OF_TRAINING, describe_outside, limit_run, refuse_outside
from modules.text_files import parse_toml, read_safetensors_texts, read_text, real_path
from project.choosing import script_family, transformers_of
from project.options import RUN_FILE, RunOptions, find_models, own_command
from project.tracing import RunTrace, trace_run
from training.config_options import OTHERS_TABLE
from training.saving.states import find_latest

# small, and of a kind that tools/caption_dataset.py is tested with
CAPTION_MODEL, CAPTION_MODEL_SIZE = "Qwen/Qwen2-VL-2B-Instruct", "4.4 GB"
WRITE_CAPTIONS = [
    *("python", "tools/caption_dataset.py", "--dataset_config", "dataset.toml", "--model", CAPTION_MODEL)
]
# kinds of faults of a check
NO_CAPTIONS, BAD_CAPTIONS = ("have no caption",), ("have a caption that cannot be used",)
UNREADABLE = "cannot be read"  # kind of the faults that a run goes on with: the files are left out


@dataclass(frozen=True)
class Project:
    """Content of run.toml."""

    folder: Path  # in which the commands run
    download: list[str]
    commands: list[list[str]]
    files: list[str]  # of the model
    output: Path
    name: str
    steps: int | None  # None: epochs say how long it is
    model: dict[str, str]  # metadata that differ in files of other models
    validation: tuple[float, int]  # share and seed

    @property
    def missing(self) -> list[str]:
        return [name for name in self.files if not (self.folder / name).exists()]


def run_project(options: RunOptions) -> None:
    """Run a described folder, with a trace for the browser. Raises and exits as `run_commands`."""
    with trace_run() as trace:
        run_commands(options, trace)


def run_commands(options: RunOptions, trace: RunTrace) -> None:
    """Check, download, cache and train; end with the path of the training's page.

    Files that cannot be read are left out, and listed at the end. Raises OptionError if the folder is not
    described, or if files of the model are missing and may not be downloaded. Exits with the code of the
    first command that fails.
    """
    typed = {name: value for name in OF_TRAINING if (value := getattr(options, name)) is not None}
    typed |= {name: real_path(value) for name, value in typed.items() if isinstance(value, Path)}
    places = [options.output_dir, options.logging_dir, *options.may_write]
    places += [options.models] if options.download else []
    folder = options.folder.parent if options.folder.name == RUN_FILE else options.folder
    folders = [folder, *(place for place in places if place is not None)]
    with limit_run(folders, typed.keys(), own_command(*options.words)):
        _run_within_limits(options, _read_project(options.folder, typed), trace)


def _run_within_limits(options: RunOptions, project: Project, trace: RunTrace) -> None:
    if _tell_trained(project, options):
        return
    if find_latest(project.output, project.name) is not None:
        commands = [*project.commands[:-1], [*project.commands[-1], "--resume", "latest"]]
        project = replace(project, commands=commands)
    if project.missing and not (options.download or options.dry_run):
        size, add = _download_size(project.download), _download_words(project, options.models)
        raise OptionError(
            f"{project.missing[0]} is missing{size}. Add {add}, or run\n"
            f"  {as_typed(project.download)}\n"
            f"If it lies elsewhere, correct its path in {project.folder / RUN_FILE}"
        )
    print_lines([f"In the folder {project.folder}:"])
    if not options.dry_run:
        again = ["run", str(project.folder), *options.words[2:]]
        trace.begin(again, output=project.output, name=project.name, steps=project.steps)
    left_out: list[str] = []
    for words in [project.download] * bool(project.missing) + project.commands:
        print_lines(["", f"$ {typed_in(words, project.folder)}"])
        sys.stdout.flush()
        if options.dry_run:
            continue
        trace.note(words)
        if _is_check_of_media(words):
            _check_training(project)
            code, left_out = _check_media(words, project.folder, project.validation)
            if code:
                _explain(words, project.folder, left_out)
                raise SystemExit(code)
            if left_out:
                print_lines([f"Going on without {len(left_out)} that cannot be read."])
        else:
            code = run_command(words, project.folder)
        if code and not (left_out and code == installation.SOURCES_LEFT_OUT):  # the check has found which
            if code == INTERRUPTED:
                raise KeyboardInterrupt
            _explain(words, project.folder)
            raise SystemExit(1 if code == installation.SOURCES_LEFT_OUT else code)
        if words == project.download and (still := project.missing):
            raise OptionError(f"{still[0]} is still missing: correct its path in {project.folder / RUN_FILE}")
    if left_out:
        print_lines(
            ["", f"Trained without {len(left_out)} that cannot be read:", *(f"  {one}" for one in left_out)]
        )
    if not options.dry_run:
        print_lines(["", f"The page of the training: {project.output / project.name}.html"])


def _read_project(folder: Path, typed: Mapping[str, Any]) -> Project:
    """Read the run.toml of a folder. typed: options of its training, which count before those of the file.

    Raises OptionError if it is not as `new` writes it, or if results would lie outside of what is allowed.
    """
    given = folder
    if folder.name == RUN_FILE and not folder.is_dir():
        folder = folder.parent
    elif folder.is_file():
        raise OptionError(f"{given} is a file. Give the folder that `new` described, or its {RUN_FILE}")
    path = folder / RUN_FILE
    try:
        tables = parse_toml(read_text(path))
        own, values = tables[OTHERS_TABLE], {**tables["training"], **typed}
        download, *commands = [[str(word) for word in words] for words in own["commands"]]
        output, name = expand_path(str(values["output_dir"]), folder), str(values["output_name"])
        logs = [expand_path(str(values["logging_dir"]), folder)] if values.get("logging_dir") else []
        files = [str(file) for file in own["files"]]
        names = ("network_module", "task", "model_version", "ltx2_mode")
        model = {f"ss_{name}": str(values[name]) for name in names if name in values}
        seed = int(values.get("validation_seed", values.get("seed", 0)))
        validation = float(values.get("validation_split", 0)), seed
        steps = None if "max_train_epochs" in values else int(values["max_train_steps"])
        if not commands:
            raise ValueError("there is no command")
    except FileNotFoundError:
        if not folder.is_dir():
            raise OptionError(f"{folder}: there is no such folder. Correct the path") from None
        words = own_command("new", str(folder))
        raise OptionError(f"{path}: there is no such file. Describe the folder first: {words}") from None
    except (OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise OptionError(
            f"{path} is not as `new` writes it ({why}). Correct it, or run `new` again."
        ) from None
    check_output_name(f"{path}: output_name", name)
    refuse_outside("output_dir", output)
    for place in logs:
        refuse_outside("logging_dir", place)
    for command in (download, *commands):
        _require_script(command)
    commands[-1] += option_words({f"--{name}": value for name, value in typed.items()})
    return Project(real_path(folder), download, commands, files, output, name, steps, model, validation)


def _tell_trained(project: Project, options: RunOptions) -> bool:
    """Return whether the run is finished, and if so print what can be done next. Loads nothing."""
    file = project.output / f"{project.name}.safetensors"
    try:
        texts = read_safetensors_texts(file)
        made = int(texts.get("ss_steps", "0")[:12])
    except (OSError, ValueError):
        return False
    released = {one.path.name for model in find_models() for one in transformers_of(model)}
    own, told = released & {Path(name).name for name in project.files}, texts.get("ss_sd_model_name", "")
    others = [told] if own and told in released - own else []
    others += [texts[key] for key, value in project.model.items() if texts.get(key, value) != value]
    if others:
        raise OptionError(
            f"{file} is of another model ({shorten(others[0], 80)}). Set another output_name in "
            f"{project.folder / RUN_FILE}, or move that file and its states away"
        )
    if project.steps is None or made < project.steps or options.dry_run:
        return False
    print_lines(
        [
            f"{file} is trained already: {made} of {project.steps} steps.",
            f"- Train longer: raise max_train_steps in {project.folder / RUN_FILE}, then run this again.",
            f"- Generate: the commands are on its page, {project.output / project.name}.html",
            f"- Train anew under another name: set output_name in {RUN_FILE}.",
        ]
    )
    return True


def _download_words(project: Project, models: Path) -> str:
    """Return the options of `run` that let it download. models: the folder that --download alone may fill."""
    values = dict(zip(project.download, project.download[1:], strict=False))
    to = project.folder / values.get("--to", "models")
    is_allowed = real_path(to).is_relative_to(real_path(models)) or describe_outside(to) is None
    return "--download" if is_allowed else as_typed(["--download", "--models", str(to)])


def _download_size(words: Sequence[str]) -> str:
    values = dict(zip(words, words[1:], strict=False))
    sets: list[ModelSet] = find_models("--fp8_encoders" in words)
    named = [one for one in sets if (one.family, one.task) == (values.get("--family"), values.get("--task"))]
    return f" ({gigabytes(total_bytes(named[0].components))} for the whole model)" if named else ""


def typed_in(words: Sequence[str], folder: Path) -> str:
    """Return a command as it can be typed in a folder."""
    script = installation.find_script("".join(words[1:2])) if words[:1] == ["python"] else None
    if script is None or installation.PREFIX:
        return as_typed(words)
    near, far = path_from(folder, installation.ROOT / script), str(installation.ROOT / script)
    return as_typed([words[0], min(near, far, key=len), *words[2:]])


def _is_check_of_media(words: Sequence[str]) -> bool:
    with contextlib.suppress(KeyError, IndexError):
        return "--check" in words and bool(script_family(words))
    return False


def _check_training(project: Project) -> None:
    """Let the training script check its options and files before hours of caching. Raises OptionError."""
    words = project.commands[-1]
    done = subprocess.run(
        [sys.executable, *installation.program_words(_require_script(words)), *words[2:]],
        cwd=project.folder,
        env=installation.program_environment(**{installation.RUN_GOES_ON: installation.RUN_CHECKS}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise OptionError(message_of(done.stderr))


def _check_media(
    words: Sequence[str], folder: Path, validation: tuple[float, int] = (0.0, 0)
) -> tuple[int, list[str]]:
    """Check media with the script that caches latents. Returns 0 and the unreadable files; if there are other
    faults, 1 and their kinds.

    validation: share and seed of the training.
    """
    faults: list[Any] = []

    def check(family: Any, config: Any, options: Any, *_: Any) -> None:
        checks = installation.import_own("data_tools.report.check")
        workers = installation.import_own("dataset.caching.prefetch").workers_of(options)
        result = checks.check_caching(
            family, config, workers, options.skip_existing, options.verify, validation=validation
        )
        result = replace(result, counters=checks.TOKENS_ELSEWHERE)
        checks.tell_check(result, family, config, options.page, workers)
        faults.extend(fault for table in result.tables for fault in table.faults)

    with contextlib.chdir(folder):
        cache_family_latents(script_family(words), None, list(words[2:]), check)
    others = [fault for fault in faults if fault.kind != UNREADABLE and fault.ends_run]
    if others:
        return 1, list(dict.fromkeys(fault.kind for fault in others))
    return 0, [fault.text for fault in faults]


def _explain(words: Sequence[str], folder: Path, kinds: Sequence[str] = ()) -> None:
    """Print what helps if a check fails. kinds: of the faults that it found."""
    if "--check" not in words:
        return
    print_lines(["", f"Correct what is listed above in the folder {folder}, then run this again."])
    if any(kind in BAD_CAPTIONS for kind in kinds):
        print_lines(
            [
                "Captions in another encoding are converted by this, in that folder:",
                f"  {typed_in([*words, '--repair_captions'], folder)}",
            ]
        )
    if any(kind in NO_CAPTIONS for kind in kinds):
        print_lines(
            [
                f"Captions that are missing are written by a model ({CAPTION_MODEL}, {CAPTION_MODEL_SIZE} to "
                "download), in that folder:",
                f"  {typed_in(WRITE_CAPTIONS, folder)}",
                'or add class_tokens = "WORD" to the table in dataset.toml: a made-up word in their place.',
            ]
        )


def _require_script(words: Sequence[str]) -> Path:
    """Return the script of a command. Raises OptionError if it is not one that a run needs: run.toml may come
    from somebody else.
    """
    script = installation.find_script("".join(words[1:2])) if words[:1] == ["python"] else None
    known = {installation.find_script("download")}
    for entry in with_scripts().values():
        names = f"{entry.cache}_latents", f"{entry.cache}_text_encoder_outputs", entry.generation_script
        known |= {Path(f"{name}.py") for name in (*names, f"{entry.script}_train_network")}
        known |= {Path(f"{entry.script}_train.py")}
    if script is None or script not in known:
        raise OptionError(
            f"{as_typed(words)} is no command of a run, which downloads, caches, trains and generates. "
            f"Correct {RUN_FILE}."
        )
    return script


def run_command(words: Sequence[str], folder: Path) -> int:
    """Run one of our scripts as a program in a folder and return its exit code.

    The terminal sends Ctrl-C to it directly; SIGTERM is passed on; this process waits for its end. Raises
    OptionError if it is not one of our scripts.
    """
    script = _require_script(words)
    interrupts: list[int] = []
    environment = installation.program_environment(**{installation.RUN_GOES_ON: "1"})
    program = [sys.executable, *installation.program_words(script), *words[2:]]
    with subprocess.Popen(program, cwd=folder, env=environment) as process:

        def end(*_: Any) -> None:
            interrupts.append(0)
            process.terminate()

        # set after the start: a program inherits ignored signals
        kept = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
        ended = signal.signal(signal.SIGTERM, end)
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGINT, kept)
            signal.signal(signal.SIGTERM, ended)
    return INTERRUPTED if interrupts else abs(code)
