"""Collect the texts of the page: from templates, from Python, and from JavaScript."""

import ast
import re
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes

from browser.folders.caption_keys import name_key
from browser.folders.draft_changes import trains
from browser.folders.training_settings import Setting, read_settings
from downloads.catalogue import model_sets
from downloads.listing import UNVERIFIED
from modules.installation import ROOT
from package.reelsmith.commands import find_commands
from protocols.families import caption_formats

TEMPLATES = [
    *sorted((ROOT / "browser").rglob("*.html")),
    *(ROOT / "modules/pages" / f"{name}.html" for name in ("nav", "begin", "player", "beside", "sizes")),
    ROOT / "training/reports/page.html",
]
PROGRAMS = [
    *sorted((ROOT / "browser").rglob("*.py")),
    ROOT / "modules/pages/language.py",
    ROOT / "training/reports/page.py",
    ROOT / "training/reports/item_losses.py",
    ROOT / "training/reports/item_turns.py",
    ROOT / "training/reports/scores.py",
    ROOT / "training/reports/sample_files.py",
    ROOT / "project/model_sizes.py",
    ROOT / "downloads/listing.py",
]
SCRIPTS = [
    *sorted(path for path in (ROOT / "browser").rglob("*.js") if path.parent.name != "vendor"),
    ROOT / "modules/pages/page.js",
]
PLACE = re.compile(r"%\((\w+)\)s")  # of a value in a text
# of a function, the place of the argument that is the key
FUNCTIONS = {"_": 0, "say": 0, "refusal": 0, "counted": 2, "say_count": 2}
_QUOTED = r'"((?:[^"\\]|\\.)*)"'
_TRANSLATED = re.compile(rf"\b(?:translate|inWords)\({_QUOTED}")
_COUNTED = re.compile(rf"\btranslateCount\([^,]+, {_QUOTED}, {_QUOTED}")


def parse_template(path: Path) -> nodes.Template:
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True).parse(path.read_text(encoding="utf-8"))


def list_template_texts(path: Path) -> Iterator[str]:
    """Yield the keys that a template names."""
    for call in parse_template(path).find_all(nodes.Call):
        place = FUNCTIONS.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        key = None if place is None or len(call.args) <= place else call.args[place]
        if isinstance(key, nodes.Const):
            yield key.value


def find_calls(path: Path, names: Collection[str]) -> Iterator[Any]:
    """Yield the calls (`ast.Call`) in a Python file of functions with one of these names."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names:
            yield call


def list_program_texts(path: Path) -> Iterator[str]:
    """Yield the keys that a Python file names."""
    for call in find_calls(path, FUNCTIONS):
        place = FUNCTIONS[call.func.id]
        key = None if len(call.args) <= place else call.args[place]
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value


def list_value_errors(path: Path) -> Iterator[str]:
    """Yield the calls of a Python file that give a text other values than those that it names."""
    for call in find_calls(path, FUNCTIONS):
        given = {keyword.arg for keyword in call.keywords}
        # a text without values gets them where it is shown
        if not given or None in given:
            continue
        texts = [
            one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)
        ]
        named = {name for text in texts for name in PLACE.findall(text)}
        if texts and named - {"n"} != given - {"n"}:
            yield f"{path.name}:{call.lineno}: {sorted(named)} are named, {sorted(given)} are given"


def list_chart_titles() -> Iterator[str]:
    """Yield the titles of the charts of numbers that features record."""
    for path in (ROOT / "training/features").glob("*.py"):
        for call in find_calls(path, {"MetricChart"}):
            yield ast.literal_eval(call.args[0])


def list_script_texts(path: Path) -> Iterator[str]:
    """Yield the keys that a script names."""
    text = path.read_text(encoding="utf-8")
    for match in _TRANSLATED.finditer(text):
        yield match[1].replace('\\"', '"')
    for match in _COUNTED.finditer(text):
        yield match[2].replace('\\"', '"')


WORDS_OF_TITLE = re.compile(r" (with|without|in) |, guided")  # titles with words beside names


def list_catalog_texts() -> Iterator[str]:
    """Yield the texts of the list of models that the page shows."""
    yield UNVERIFIED
    for models in (model_sets(), model_sets(True)):
        for model in models:
            yield model.about
            if WORDS_OF_TITLE.search(model.title):
                yield model.title
            for part in model.components:
                yield part.title
                yield from (file.licence.terms for file in part.files)


def list_key_labels() -> Iterator[str]:
    """Yield what the form of captions calls the keys of all formats."""
    for format in caption_formats().values():
        for key in format.keys:
            yield from map(name_key, (key.name, *key.parts))


@cache
def list_settings() -> dict[str, list[Setting]]:
    """Return the settings that the page shows of each script that trains a described folder."""
    found = {}
    for command in find_commands(ROOT):
        script = command.path.name
        if command.path.parent == ROOT and trains(command):
            found[script] = [*read_settings(script)]
    return found


@cache
def list_helps() -> dict[str, list[Path]]:
    """Return the first sentence of each help, with the scripts that have it."""
    found: dict[str, list[Path]] = {}
    for script, settings in list_settings().items():
        for setting in settings:
            found.setdefault(setting.about, []).append(ROOT / script)
    return found


def list_texts() -> dict[str, list[Path]]:
    """Return each key of the page with the files that name it; those of scripts alone are left out."""
    found: dict[str, list[Path]] = {}
    for path in TEMPLATES:
        for key in list_template_texts(path):
            found.setdefault(key, []).append(path)
    for path in PROGRAMS:
        for key in list_program_texts(path):
            found.setdefault(key, []).append(path)
    for key in list_chart_titles():
        found.setdefault(key, []).append(ROOT / "training/features")
    for key in list_key_labels():
        found.setdefault(key, []).append(ROOT / "browser/folders/caption_keys.py")
    for key in list_catalog_texts():
        found.setdefault(key, []).append(ROOT / "downloads/catalogue.toml")
    return found | list_helps()


def list_all_script_texts() -> set[str]:
    return {key for path in SCRIPTS for key in list_script_texts(path)}
