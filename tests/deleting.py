"""Delete a feature of training, a kind of network, a way to run, a form of data or a page of the browser in a
copy of the tree: what is left has to work as before.

python -m tests.deleting skip
"""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from dataset.forms import CACHES, FOLDER, FORMS, JSONL
from dataset.forms.composing import FORMAT_BY_SOURCE
from dataset.forms.contract import SourceFormat
from dataset.forms.jsonl import JSON_LINES
from dataset.forms.metadata import METADATA
from dataset.forms.row_formats import ROWS
from dataset.table import declared_keys
from modules.options import option_name
from networks.kinds import KINDS
from networks.kinds.lora import LORA
from runtime.ways import WAYS
from training.features import FEATURES

ROOT = Path(__file__).resolve().parent.parent
# what can be deleted -> the folder with its file and the list
FOLDERS = {feature.name: "training/features" for feature in FEATURES}
FOLDERS |= {kind.name.lower().replace("-", ""): "networks/kinds" for kind in KINDS if kind is not LORA}
FOLDERS |= {way.name: "runtime/ways" for way in WAYS}
FORM_FILES = {
    type(form).__module__.rpartition(".")[2]: form
    for form in (*FORMS, *ROWS)
    if form not in (FOLDER, JSONL, JSON_LINES, METADATA)
} | {caches.cache_format: caches for caches in CACHES}
FOLDERS |= dict.fromkeys(FORM_FILES, "dataset/forms")
# pages of the browser to which no other file leads: parts of the pages of a folder, of a run and of models
PAGES = ("blocks", "folder_settings", "items", "masks", "memory", "regularization", "samples", "tags")
# what writes a form, and is of no use without it
WRITERS = {
    "cogvideox": (
        "data_tools/cogvideox",
        "tools/prepare_dataset.py",
        "prepare_dataset.py",
        "prepare_dataset.sh",
    )
}
# further folders with a list of what can be deleted
LISTS = {"networks/kinds": ("networks/train",)}
# rooms that may import what is in a folder
ROOMS = {
    "training/features": ("training", "project", "browser"),
    "networks/kinds": ("networks", "generation", "stable_diffusion", "training", "project", "browser"),
    "runtime/ways": ("runtime", "generation", "stable_diffusion", "minimax_h3", "training", "browser"),
    "dataset/forms": ("dataset", "data_tools", "training", "project", "browser"),
}
# imports every module of some rooms
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
# fails if a table of a dataset file may still have some keys
KNOWN_KEYS = """
import sys
from dataset.forms.composing import KEYS
assert not KEYS.keys() & sys.argv[1:], KEYS.keys() & sys.argv[1:]
"""
# fails if a page that is deleted left words, or if the other pages do not work
ASK_PAGES = """
import sys
from pathlib import Path
from urllib.parse import urlencode
from browser.core.language_tables import CODES, read_texts
from browser.core.page import list_links
from tests.browser.drafts import write_draft
from tests.browser.page_texts import list_all_script_texts, list_texts
from tests.browser.serving import serve_runs
folder = write_draft(Path(sys.argv[1]))
known = {*list_texts()} | list_all_script_texts()
for code in CODES[1:]:
    assert {*read_texts(code)} == known, {*read_texts(code)} ^ known
with serve_runs(folder.parent) as served:
    for address in (*(link.address for link in list_links()), f"/new?{urlencode({'folder': folder})}"):
        answer = served.ask(address)
        assert answer.status == 200, (address, answer.text)
        assert f"/new/{sys.argv[2]}" not in answer.text, address
"""
# caches a plain folder, trains on it, and prints the checksum of all caches and of the LoRA but for its date
TRAIN = """
import hashlib, os, sys
from pathlib import Path
from typing import Any
from safetensors import safe_open
from tests.tiny.families import FAMILIES
from tests.tiny.runs import make_project
family = next(family for family in FAMILIES if family.name == "wan t2v-1.3B")
folder = Path(sys.argv[1])
def write(family, folder):
    family.prepare(folder)
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))  # caches note when their sources were changed
project = make_project(family, folder, write)
project.train("output", "--no_metadata", "--network_dim", 4)
digest = hashlib.sha256()
caches = sorted((folder / "cache").rglob("*.safetensors"))
assert len(caches) > 1
for path in [*caches, folder / "output" / "x.safetensors"]:
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), "modelspec.date": ""}
        digest.update(repr((path.name, sorted(metadata.items()))).encode())
        for name in sorted(file.keys()):
            digest.update(name.encode() + file.get_tensor(name).contiguous().view(-1).numpy().tobytes())
print(digest.hexdigest())
"""


def copy_tree(target: Path, *parts: str) -> None:
    """Copy all files that git knows, or would take, into a new folder; or some files and folders alone."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *parts]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        source = ROOT / name
        if source.is_file() and source.suffix != ".safetensors":
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)


def delete_from(tree: Path, name: str) -> list[str]:
    """Delete the files of one of FOLDERS and its lines in the lists; return the names of the files."""
    folder = tree / FOLDERS[name]
    room = FOLDERS[name].replace("/", r"\.")
    paths = [folder / f"{name}.py", *folder.glob(f"{name}_*.py")]
    for path in paths:
        path.unlink()
    for writer in WRITERS.get(name, ()):
        if (tree / writer).is_dir():
            shutil.rmtree(tree / writer)
        else:
            (tree / writer).unlink()
    listings = [folder / "__init__.py"]
    if name in FORM_FILES:
        listings.append(folder / "row_formats.py")
    if folder.name == "kinds":
        training = tree / "networks" / "train"
        (training / f"{name}.py").unlink(missing_ok=True)  # T-LoRA has no layers of its own
        listings.append(training / "__init__.py")
        room = r"networks\.(?:kinds|train)"
        for dialect in sorted((tree / "networks" / "formats").glob("*.py")):
            delete_rows(dialect, name)
    named = re.compile(rf"from {room}\.{name} |{name}(_\w+)?: |    {name.upper()},$")
    for listing in listings:
        lines = listing.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not named.match(line)]
        listing.write_text("".join(kept), encoding="utf-8", newline="\n")
    return [path.name for path in paths]


def delete_rows(path: Path, kind: str) -> None:
    """Delete what a dialect's file imports of a kind of network, and its rows of the tables there."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    gone: list[ast.stmt | tuple[ast.expr, ast.expr]] = []
    names = set[str]()
    for node in tree.body:
        module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        if re.fullmatch(rf"networks\.kinds\.{kind}(_\w+)?", module):
            assert isinstance(node, ast.ImportFrom)
            names |= {alias.name for alias in node.names}
            gone.append(node)
    for node in ast.walk(tree):
        for row in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            if any(isinstance(side, ast.Name) and side.id in names for side in row):
                assert row[0] is not None
                gone.append((row[0], row[1]))
    lines = text.splitlines(keepends=True)
    for item in gone:
        first, last = item if isinstance(item, tuple) else (item, item)
        assert last.end_lineno is not None
        # a value in parentheses ends on the line after that of its last word
        end = last.end_lineno + (lines[last.end_lineno].strip() == "),")
        for number in range(first.lineno - 1, end):
            lines[number] = ""
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def name_what_it_brings(name: str) -> list[str]:
    """Return the options of trainings and keys of tables that are gone with one of FOLDERS: --tread, tars."""
    form = FORM_FILES.get(name)
    if isinstance(form, SourceFormat):
        keys = [] if form.keys is None else [*declared_keys(form.keys)]
        return [*keys, *(key for key, other in FORMAT_BY_SOURCE.items() if other is form)]
    parts: dict[str, Any] = {feature.name: feature for feature in FEATURES}
    parts |= {way.name: way for way in WAYS}
    if name not in parts:
        return []  # a kind of network, of rows or caches: the values of options and keys name it
    return [f"--{option_name(declared)}" for declared in fields(parts[name].options)]


def find_errors(tree: Path, name: str) -> list[str]:
    """Import all modules in a tree, ask each script that caches, trains or uses networks for its help; return
    what fails. name: of what was deleted, which none of them may know any more.
    """
    folder, deleted = FOLDERS[name], name_what_it_brings(name)
    modules = [
        path.relative_to(tree).with_suffix("").as_posix().replace("/", ".")
        for room in ROOMS[folder]
        for path in sorted((tree / room).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    commands = [[sys.executable, "-c", IMPORT_ALL, *modules]]
    if folder == "dataset/forms":
        commands.append([sys.executable, "-c", KNOWN_KEYS, *deleted])
    scripts = {*tree.glob("*train*.py"), *tree.glob("*lora*.py"), *tree.glob("*_generate_*.py")}
    scripts |= {*tree.glob("*cache_*.py")} if folder == "dataset/forms" else set()
    commands += [[sys.executable, path.name, "--help"] for path in sorted(scripts)]
    errors = []
    for command in commands:
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            errors.append(f"{command[1:3]}: {done.stderr[-1000:]}")
        if command[1] == "wan_train_network.py":  # others refuse options of the same names
            known = set(deleted).intersection(re.findall(r"(?m)^  (--\w+)", done.stdout))
            errors += [f"{command[1]} still has {option}" for option in sorted(known)]
    return errors


def train_in(tree: Path, folder: Path) -> str:
    """Cache and train a plain folder with the code of a tree; return the checksum of what that writes."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", TRAIN, str(folder)]
    # the scripts change the working folder, which `python -c` would import from
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@functools.cache
def train_here() -> str:
    with tempfile.TemporaryDirectory() as temporary:
        return train_in(ROOT, Path(temporary) / "with")


def check_deletion(name: str, folder: Path) -> list[str]:
    """Delete one of FOLDERS in a copy below `folder`; return what does not work there as here."""
    tree = folder / "tree"
    copy_tree(tree)
    delete_from(tree, name)
    # --help is answered from the tables
    subprocess.run([sys.executable, "-m", "tests.tables"], cwd=tree, capture_output=True, check=True)
    errors = find_errors(tree, name)
    if not errors and train_in(tree, folder / "without") != train_here():
        errors.append("a plain folder gives other caches, or another LoRA")
    return errors


def check_page_deletion(name: str, folder: Path) -> list[str]:
    """Delete one of PAGES in a copy below `folder`; return what does not work there as here."""
    tree = folder / "tree"
    copy_tree(tree)
    shutil.rmtree(tree / "browser" / "pages" / name)
    words = [sys.executable, "-c", ASK_PAGES, str(folder / "media"), name]
    done = subprocess.run(words, cwd=tree, capture_output=True, text=True, encoding="utf-8")
    return [done.stderr] if done.returncode else []


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in {*FOLDERS, *PAGES}:
        sys.exit(f"Pass one of: {' '.join((*FOLDERS, *PAGES))}")
    check = check_page_deletion if sys.argv[1] in PAGES else check_deletion
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit("\n".join(check(sys.argv[1], Path(temporary))) or 0)
