"""One list of families: their folders, and what else has to know of a family."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from downloads.catalogue import model_sets
from networks.builtin_modules import OWN_MODULES
from networks.module_names import FAMILIES as NAMED
from protocols.families import FAMILIES, FOLDERS, list_same_latents, with_scripts

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = {"family.py", "files.py", "model.py", "options.py", "names.py"}
HOMES = {folder.partition(".")[0] for folder in FOLDERS.values()}
BESIDE = {"tests", "benchmarks", "docs", "pocket", *HOMES}
# shared files may speak of these in messages and have tools for them; a family of today is named in at most 4
OLD = {"wan", "hunyuan_video", "framepack", "flux", "sd1"}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_has_files_of_the_same_names(name: str) -> None:
    entry, folder = FAMILIES[name], ROOT / FOLDERS[name].replace(".", "/")
    assert entry.room == FOLDERS[name]
    if entry.own_files and entry.script:  # Kontext has FLUX.1's files, gen_img.py diffusers' networks
        assert {path.name for path in folder.glob("*.py")} >= ALWAYS


def test_all_lists_of_families_follow_the_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["tool"]["mypy"]["files"]) >= HOMES
    trained_by = {script for one in model_sets() for script in one.commands.get("train", "").split()}
    assert trained_by >= {f"{entry.training_script}.py" for entry in with_scripts().values()}
    assert {one.network_module for one in NAMED} - {""} <= set(OWN_MODULES)
    assert list_same_latents("chroma") == {"flux", "flux_kontext", "chroma", "lumina", "z_image"}
    assert list_same_latents("qwen_image_edit") == {"qwen_image", "qwen_image_edit", "krea2", "anima"}
    assert list_same_latents("flux_3") == {"flux_2", "flux_3", "moss_image", "fibo_2"}
    assert (
        list_same_latents("krea2") == list_same_latents("qwen_image") == list_same_latents("qwen_image_edit")
    )


def _texts(path: Path) -> Iterator[str]:
    """Names and texts in the code of a file, without docstrings and comments."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Expr(value=ast.Constant()):
                node.value.value = ""  # walked later
            case ast.Constant(value=str(text)) | ast.Name(id=text) | ast.Attribute(attr=text):
                yield text.lower()
            case ast.ImportFrom(module=str(text)) | ast.FunctionDef(name=text) | ast.ClassDef(name=text):
                yield text.lower()


def test_a_family_is_named_in_at_most_four_shared_files() -> None:
    """Not how many its making changes: docs/architecture.md, section 5, says those."""
    rooms = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name not in BESIDE]
    # tables of what other programs call the models
    others = ROOT / "project" / "foreign"
    paths = [path for room in rooms for path in room.rglob("*.py") if path.parent != others]
    code = {path: "\n".join(_texts(path)) for path in paths}
    named = {}
    for name, entry in FAMILIES.items():
        words = "|".join(map(re.escape, {name, entry.room.rpartition(".")[2], entry.script or name}))
        pattern = re.compile(rf"(?<![a-z0-9])({words})(?![a-z0-9]|-scripts|_model)")
        named[name] = {str(path.relative_to(ROOT)) for path, text in code.items() if pattern.search(text)}

    assert all("protocols/families.py" in files for files in named.values())
    assert {name: files for name, files in named.items() if len(files) > 4 and name not in OLD} == {}
    # it has no tools of its own; GGUF files are called by names of other programs
    assert named["lumina"] == {"protocols/families.py", "checkpoints/quantizing.py"}
