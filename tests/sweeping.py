"""Set single options of a script to other values, and see what each changes: files, what is said, nothing."""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import io
import json
import re
import runpy
import shutil
import struct
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any
from unittest.mock import patch

import av
import numpy as np
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from modules.media.reading import read_image, read_tags, video_frames
from modules.media.writing import write_png
from modules.options import Options, option_name, resolve_type_hints
from tests.commands import ROOT
from tests.faults.messages import run_here
from tests.tiny.families import TinyFamily, write_deep
from tests.tiny.runs import make_project

Words = tuple[str, ...]
RECORD = re.compile(r"^class \w+\(\w*Options\b", re.MULTILINE)  # of a file that declares options
NO_PRODUCT = {"tests", "pocket", "benchmarks", "docs", "extras"}
Info = Mapping[str, Any]
PROJECT, CLEAN = "project", "clean"  # folders of a swept family: where it runs, and what it begins with
# what says when something was made, or how long it took
_TIMES = re.compile(r"\d{8}-\d{6}|\d{4}-\d\d-\d\d[ T_-]\d\d[:_-]?\d\d[:_-]?\d\d|\d{14}")
# parts of files that repeat the command, or say when they were made
_REPEATING = (".reelsmith_commands.json@", "history.jsonl@", ".started.", ".commands", ".seconds")
_REPEATING += ("@modelspec.date", "@ss_training_started_at", "@ss_training_finished_at", "@ss_session_id")
_REPEATING += ("creation_timestamp", "@sshs_model_hash", "@sshs_legacy_hash", "@modelspec.hash_sha256")
_SAID = {"memory", "message", "doing", "level"}  # in lines of a history that repeat the log


class _ParserFound(BaseException):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a script builds, caught when it would parse."""

    def catch(self: argparse.ArgumentParser, *args: object, **settings: object) -> None:
        raise _ParserFound(self)

    with (
        patch.object(argparse.ArgumentParser, "parse_args", catch),
        patch.object(argparse.ArgumentParser, "parse_known_args", catch),
        patch.object(sys, "argv", [script]),
    ):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except _ParserFound as found:
            return found.parser
    raise AssertionError(f"{script} has no parser")


def options_of(script: str) -> list[argparse.Action]:
    """The options of a script that it takes; those that are refused or not needed say so themselves."""
    actions = parser_of(script)._actions
    return [one for one in actions if not hasattr(one, "rejection") and one.dest != "help"]


@dataclass
class Seen:
    """What a run of a script left and said."""

    code: int
    said: str
    files: dict[str, str]  # name of a file, or of something in it -> its value or a digest


@dataclass
class Swept:
    """A script of a family in its folder, with what its plain commands do."""

    script: str
    words: Words
    folder: Path  # it contains PROJECT and CLEAN
    _plain: dict[Words, tuple[Seen, frozenset[str]]] = field(default_factory=dict)

    def run(self, words: Iterable[object]) -> Seen:
        """Run the script in a fresh project."""
        project = self.folder / PROJECT
        shutil.rmtree(project, ignore_errors=True)
        shutil.copytree(self.folder / CLEAN, project)
        before = {path: path.stat().st_mtime_ns for path in _files(project)}
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            printed = io.StringIO()
            with patch.object(sys, "stdin", io.StringIO()):  # nobody types a prompt
                code, said = run_here(self.script, *words, folder=project, printed=printed)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        files: dict[str, str] = {}
        for path in _files(project):
            if before.pop(path, None) != path.stat().st_mtime_ns:
                files |= read_file(path, path.relative_to(project))
        files |= {f"without {path.relative_to(project)}": "" for path in before}
        files["printed"] = _digest(_TIMES.sub("", printed.getvalue()).encode("utf-8"))
        return Seen(code, said, files)

    def plain(self, words: Words) -> tuple[Seen, frozenset[str]]:
        """What the script does without an option, and the names of what is never the same."""
        if words not in self._plain:
            first, second = (self.run(words) for _ in range(2))
            assert first.code == 0, f"{self.script} {words}\n{first.said[-3000:]}"
            names = {*first.files, *second.files}
            unstable = {name for name in names if first.files.get(name) != second.files.get(name)}
            self._plain[words] = first, frozenset(unstable)
        return self._plain[words]


def write_project(family: TinyFamily, folder: Path, kind: str) -> None:
    """Lay out what the scripts of a kind begin with: models, data, caches, a LoRA with a state, odd files."""
    project = folder / PROJECT
    shutil.rmtree(folder, ignore_errors=True)
    project.mkdir(parents=True)
    write_deep(family, project)
    made = make_project(family, project, lambda *_: None)
    made.run(*family.cache_texts, "--empty_prompt")
    if kind in (LATENTS, TEXTS):
        caches = sorted((project / "cache").glob("*.safetensors"))
        for path in caches:
            if " 3" in path.name:
                shutil.copy(path, path.with_name(f"gone {path.name}"))
        for path in caches:
            if " 0" in path.name:
                path.unlink()
    else:
        steps = ("--max_train_steps", "2", "--save_state", "--no_page")
        made.train("given", *steps)
    (project / JUNK).write_text("junk", encoding="utf-8")
    (project / MISSING_FOLDER).mkdir()
    (project / "colours").mkdir()
    (project / "colours" / "colour.txt").write_text("red\nblue\n", encoding="utf-8")
    (project / "end.py").write_text("open('ended', 'w').close()\n", encoding="utf-8")
    (project / "scorer").mkdir()  # a folder that only looks like a model that scores samples
    for name in ("config.json", "model.onnx"):
        (project / "scorer" / name).write_text("{}", encoding="utf-8")
    (project / "options.toml").write_text("network_alpha = 2\n", encoding="utf-8")
    (project / "slider.toml").write_text(SLIDER, encoding="utf-8")
    dataset = project / "dataset.toml"
    if dataset.is_file():  # with a key of LTX-2
        keys = f'{dataset.read_text(encoding="utf-8")}\naudio_cond_mask_directory = "times"\n'
        (project / "given.toml").write_text(keys, encoding="utf-8")
    (project / "times").mkdir()
    for number in range(4):
        (project / "times" / f"clip {number}.txt").write_text("0.02 0.24", encoding="utf-8")
    (project / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    (project / "many.txt").write_text("".join(f"{number} dogs\n" for number in range(9)), encoding="utf-8")
    for name, line in LINES.items():
        (project / name).write_text(f"{line}\n", encoding="utf-8")
    write_png(project / "mask.png", np.pad(np.full((32, 16, 3), 255, np.uint8), ((0, 0), (0, 16), (0, 0))))
    models = [path for path in (project / "model").rglob("*.safetensors") if "dit" in path.name]
    if models:
        tensors = {name: 0.9 * tensor for name, tensor in load_file(models[0]).items()}
        save_file(tensors, project / "model" / "other.safetensors")
    project.rename(folder / CLEAN)


SIGN = '{"short_description":"a sign","text_render":[{"text":"SALE"}]}'  # a text that Fibo 2.0 is shown
# files of one prompt line
LINES = {
    "cat.txt": "a (cat:1.3) --n dull",
    "lines.txt": "a dog --d 3",
    "long.txt": "a cat " * 60,
    "unsized.txt": "a cat --d 7 --s 2",
    "plain.txt": "a cat --w 32 --h 32 --d 7 --s 2",
    "sign.txt": f"{SIGN} --w 32 --h 32 --d 7 --s 2",
    "larger.txt": "a cat --w 64 --h 64 --d 7 --s 2 --ci start.png",
}
# kinds of scripts
LATENTS, TEXTS, TRAINING, GENERATION = "latents", "texts", "training", "generation"
FULL, IMAGES = "whole training", "gen_img"
RECIPE = """[video]
[[video.conditions]]
type = "extend"
prefix = 1
"""
SLIDER = """[[sliders]]
positive = "a red square"
negative = "a blue circle"
neutral = "a square"
"""


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_file(path: Path, name: Path) -> dict[str, str]:
    """What is in a file, by names of its parts."""
    shown = _TIMES.sub("TIME", name.as_posix())
    ending = path.suffix.lower()
    values = {shown: ""}
    if ending == ".safetensors":
        values |= {f"{shown}#{part}": text for part, text in _read_tensors(path)}
    elif ending in {".png", ".webp", ".jpg"}:
        pixels = read_image(path)
        values[f"{shown}#pixels"] = f"{pixels.shape} {_digest(pixels.tobytes())}"
        values |= {f"{shown}@{key}": text for key, text in _flat(read_tags(path))}
        with path.open("rb") as file:
            values[f"{shown}#header"] = _digest(file.read(64))
    elif ending in {".mp4", ".mkv", ".mov", ".webm"}:
        values |= {f"{shown}#{part}": text for part, text in _read_video(path)}
    elif ending == ".jsonl":
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        records = [record for record in records if not _SAID & record.keys()]
        for number, record in enumerate(records):
            values |= {f"{shown}#{number}.{key}": text for key, text in _flat(record)}
    elif ending == ".json":
        values |= {f"{shown}@{key}": text for key, text in _flat(json.loads(path.read_text("utf-8")))}
    elif ".tfevents." in path.name:
        values = {f"{name.parent.as_posix()}/events": ""}
        values = {_TIMES.sub("TIME", key): value for key, value in values.items()}
    elif ending == ".html":  # its text repeats the command
        values[f"{shown}#pictures"] = str(path.read_text(encoding="utf-8").count("<img"))
    else:
        values[f"{shown}#bytes"] = _digest(path.read_bytes())
    return values


def _read_video(path: Path) -> Iterator[tuple[str, str]]:
    with av.open(path) as container:
        stream = container.streams.video[0]
        kinds = [one.type for one in container.streams]
        yield (
            "form",
            f"{container.format.name} {stream.codec.name} {stream.pix_fmt} {stream.average_rate} {kinds}",
        )
        for key, text in _flat(dict(container.metadata)):
            yield f"@{key}", text
        audios = [frame.to_ndarray() for frame in container.decode(audio=0)] if "audio" in kinds else []
    yield "sound", _digest(b"".join(audio.tobytes() for audio in audios))
    yield "pixels", _digest(b"".join(frame.tobytes() for frame in video_frames(path)))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read_tensors(path: Path) -> Iterator[tuple[str, str]]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    yield "tensors", _digest(json.dumps(header, sort_keys=True).encode("utf-8") + data[8 + length :])
    for key, text in _flat(metadata):
        yield f"@{key}", text


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the values in nested dictionaries, JSON texts too, by the names on the way to them."""
    if isinstance(value, str) and value[:1] in {"{", "["}:
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, str(value)


ACTS, METADATA, SAYS, REJECTS = "acts", "metadata", "says", "refuses"
FAILS, SILENT = "fails without its name", "silent"


def judge(swept: Swept, variation: "Variation") -> tuple[str, str]:
    """What an option does in a run, and what shows it."""
    plain, unstable = swept.plain(variation.plain)
    changed = swept.run(variation.words)
    flags = variation.flags
    lines = _lines(changed.said)
    telling = [line for line in lines if any(re.search(rf"{flag}(?![\w-])", line) for flag in flags)]
    if changed.code != 0:
        named = telling or [line for line in lines for word in variation.names if word in line]
        return (REJECTS, named[-1]) if named else (FAILS, changed.said[-1500:])
    names = {*plain.files, *changed.files} - unstable
    differ = sorted(one for one in names if plain.files.get(one) != changed.files.get(one))
    differ = [one for one in differ if not _repeats(one, variation)]
    acting = [one for one in differ if "@" not in one]
    if acting:
        return ACTS, ", ".join(acting[:3])
    if variation.shows and variation.shows in changed.said and variation.shows not in plain.said:
        return SAYS, variation.shows
    new = [line for line in telling if line not in _lines(plain.said)]
    if new:
        return SAYS, new[0]
    return (METADATA, ", ".join(differ[:5])) if differ else (SILENT, "")


def _repeats(name: str, variation: "Variation") -> bool:
    """Whether a text in a file only repeats the value of the option."""
    last = re.split(r"[.@]", name)[-1].lower().replace("-", "_")
    own = {flag.lstrip("-").replace("-", "_").lower() for flag in variation.flags} | {variation.dest}
    return last.removeprefix("ss_") in own or any(part in name for part in _REPEATING)


def _lines(said: str) -> list[str]:
    """What was said, without commands that repeat the options."""
    lines = [line for line in said.splitlines() if not re.match(r"\s+(python|\w+) \S*\.py ", line)]
    return [re.sub(r"\d+(\.\d+)? s\b", "N s", line) for line in lines]


@dataclass(frozen=True)
class Variation:
    """A command with one option changed."""

    dest: str
    flags: Words
    plain: Words  # the command without it
    words: Words  # the command with it
    names: Words  # its values that a message may name in place of it
    shows: str = ""  # what it has the script say


@dataclass(frozen=True)
class Setting:
    """Values of an option that are no matter of its declaration."""

    value: Words | None = None  # its words
    also: Words = ()  # further options of both commands
    shows: str = ""  # what the option has the script say
    family: str = ""  # the name of the tiny family that it is tried with; "": the first that has it


def vary(words: Words, action: argparse.Action, facts: Info, setting: Setting) -> Variation:
    """The command of a script with and without another value of an option. words: the command."""
    plain = (*words, *setting.also)
    flags = tuple(flag for flag in action.option_strings if flag.startswith("--")) or (action.dest,)
    value = setting.value
    present = [index for index, word in enumerate(plain) if word in action.option_strings]
    if value is None and action.nargs == 0 and present:
        changed = tuple(word for word in plain if word not in action.option_strings)
        return Variation(action.dest, flags, plain, changed, (), setting.shows)
    if value is None:
        given = None
        if present:
            start = present[-1] + 1
            end = next((i for i in range(start, len(plain)) if plain[i].startswith("--")), len(plain))
            given = plain[start:end]
        value = other_value(action, facts, given)
    typed = () if not action.option_strings else (flags[-1],)
    names = tuple(word for word in value if not re.fullmatch(r"[-\d.e]*", word))
    return Variation(action.dest, flags, plain, (*plain, *typed, *value), names, setting.shows)


JUNK, MISSING_FOLDER, NEW = "junk.bin", "empty", "made here"


def other_value(action: argparse.Action, facts: Info, given: Words | None) -> Words:
    """Words of a value that is not the default of an option, nor the one in a command."""
    if action.nargs == 0:
        return ()
    old = given or _words(action.default)
    count = action.nargs if isinstance(action.nargs, int) else 1
    if action.choices is not None:
        others = sorted(map(str, action.choices), key=lambda one: (one in old, one == "auto"))
        return (others[0],) * count
    place = facts.get("place")
    if place in ("folder",):
        return (MISSING_FOLDER,) * count
    if place in ("new file", "new folder", "safetensors"):
        return (f"{NEW}.safetensors" if place == "safetensors" else NEW,)
    kind = facts.get("kind")
    if kind is Path:
        return (JUNK,) * count
    if "one_of" in facts:
        return (next(one for one in facts["one_of"] if (str(one),) != old),)
    if kind in (int, float):
        return tuple(_other_number(text, kind, facts) for text in _padded(old, count))
    return ("word",) * count


def _words(value: Any) -> Words:
    if value is None:
        return ()
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else (str(value),)


def _padded(old: Words, count: int) -> list[str | None]:
    return [old[index] if index < len(old) else None for index in range(count)]


def _other_number(text: str | None, kind: type, facts: Info) -> str:
    """A number near another one, within the limits of an option."""
    minimum, maximum = facts.get("minimum", facts.get("above")), facts.get("maximum", facts.get("below"))
    try:
        old = float(text) if text is not None else None
    except ValueError:
        old = None
    if kind is int:
        candidates = [old + 1, old - 1] if old is not None else [2, 1, 3, 0]
        candidates += [minimum + 1] if minimum is not None else []
    else:
        candidates = [old * 0.5, old + 0.25, old + 1] if old else [0.5, 0.25, 1.5]
        candidates += [minimum + 0.5] if minimum is not None else []
        candidates += [(minimum + maximum) / 2] if minimum is not None and maximum is not None else []
    for number in candidates:
        within = (minimum is None or number > minimum or (number == minimum and "minimum" in facts)) and (
            maximum is None or number < maximum or (number == maximum and "maximum" in facts)
        )
        if within and number != old:
            return f"{number:g}"
    raise AssertionError(f"no other number than {text} within {facts}")


def _load_records() -> list[type[Options]]:
    rooms = (file.parent for file in ROOT.glob("*/__init__.py"))
    for file in sorted(file for room in rooms if room.name not in NO_PRODUCT for file in room.rglob("*.py")):
        if RECORD.search(file.read_text(encoding="utf-8")):
            importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    waiting, records = list(Options.__subclasses__()), list[type[Options]]()
    while waiting:
        record = waiting.pop()
        waiting += record.__subclasses__()
        if not record.__module__.startswith("tests"):
            records.append(record)
    return sorted(records, key=lambda one: (one.__module__, one.__name__))


_INFO: dict[str, list[tuple[str, Info]]] = {}


def info_of_option(action: argparse.Action) -> Info:
    """The facts of the record that declares an option, found by its name and help."""
    if not _INFO:
        for record in _load_records():
            for one in dataclasses.fields(record):
                declared = one.metadata.get("declared")
                if declared is not None and declared.help:
                    info = {
                        **one.metadata,
                        "kind": _kind(resolve_type_hints(record)[one.name]),
                        "record": record,
                    }
                    _INFO.setdefault(option_name(one).replace("-", "_"), []).append((declared.help, info))
    entries = _INFO.get(action.dest, [])
    same = [info for text, info in entries if text.split("{")[0][:40] == (action.help or "")[:40]]
    found = same or [info for _, info in entries]
    return found[0] if found else {"kind": action.type}


def _kind(hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind
