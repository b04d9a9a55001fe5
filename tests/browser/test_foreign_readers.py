"""Every place that parses files of others has its row in foreign_files.md, with its limit."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules import limits
from tests.commands import ROOT

# functions of libraries that parse what may be anybody's, by the end of their dotted name
PARSERS = frozenset(
    {
        "Image.open",
        "av.open",
        "zipfile.ZipFile",
        "tarfile.open",
        "torch.load",
        "np.load",
        "parquet.ParquetFile",
    }
    | {
        "yaml.safe_load",
        "yaml.load",
        "yaml.compose",
        "yaml.parse",
        "tomllib.loads",
        "tomlkit.parse",
    }
    | {"onnxruntime.InferenceSession", "cv2.dnn.readNetFromONNX", "cv2.FaceDetectorYN.create"}
    | {"sqlite3.connect", "Tokenizer.from_file", "Tokenizer.from_buffer"}
)
# files that call one of them for what this program has written or ships itself
OWN = {
    "downloads/catalogue.py": "the list of released files",
    "extras/comfyui_reelsmith/nodes.py": "run.toml and samples of a run of ours",
    "modules/environment.py": "pyproject.toml",
    "modules/version.py": "pyproject.toml",
    "modules/media/companions.py": "a clip that it writes",
    "modules/media/encoding.py": "a clip that it writes",
    "modules/media/writing.py": "a clip that it writes",
    "package/release.py": "files of a release that it has just made",
    "project/packing.py": "an archive that it writes",
    "project/regularization.py": "dataset.toml of a folder that new described",
    "stable_diffusion/textual_inversion.py": "from_pretrained of torch.nn takes a tensor",
}
OUTSIDE = {"tests", "benchmarks", "pocket", "docs", "build", "dist"}


def list_files() -> Iterator[Path]:
    for path in ROOT.rglob("*.py"):
        first = path.relative_to(ROOT).parts[0]
        if first not in OUTSIDE and not first.startswith("."):
            yield path


def dotted_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls_parser(text: str) -> bool:
    """Return whether a file calls one of the parsers."""
    names = [dotted_name(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    ends = tuple(f".{name}" for name in PARSERS)
    return any(
        name in PARSERS or name.endswith(ends) or name.rpartition(".")[2] == "from_pretrained"
        for name in names
    )


def read_rows() -> list[list[str]]:
    text = (ROOT / "tests" / "browser" / "foreign_files.md").read_text(encoding="utf-8")
    table = text.partition("\n\n| File")[2].strip()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")[2:]]


@pytest.fixture(scope="module")
def rows() -> list[list[str]]:
    return read_rows()


def test_every_file_that_parses_what_others_made_has_a_row(rows: list[list[str]]) -> None:
    found = set()
    for path in list_files():
        text = path.read_text(encoding="utf-8")
        if any(name.rpartition(".")[2] in text for name in (*PARSERS, "from_pretrained")) and calls_parser(
            text
        ):
            found.add(path.relative_to(ROOT).as_posix())
    named = {name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row[1])}
    assert found - OWN.keys() <= named
    assert [
        name for name in named if not (ROOT / name).is_file()
    ] == []  # some read by a reader of another row
    assert OWN.keys() <= found  # no row of that list is left over


def test_every_row_is_whole_and_its_limits_exist(rows: list[list[str]]) -> None:
    assert len(rows) >= 15
    assert all(len(row) == 4 and all(row) for row in rows)
    for row in rows:
        for name in re.findall(r"`([A-Z_]{5,})`", row[3]):
            assert getattr(limits, name) > 0, row


@pytest.mark.parametrize(
    ("file", "reader"),
    [
        ("(`new --from`)", "project/foreign/reading.py"),
        ("(`unpack`)", "project/unpacking.py"),
        ("(`set_up.py update", "package/updating.py"),
        ("a tagger", "data_tools/tags/model.py"),
        ("captions", "data_tools/captions/local_model.py"),
    ],
)
def test_what_commands_and_pages_take_from_others_has_a_row(
    file: str, reader: str, rows: list[list[str]]
) -> None:
    (row,) = [row for row in rows if f"`{reader}`" in row[1]]
    assert file in row[0]


def test_a_new_reader_is_noticed() -> None:
    assert calls_parser("import zipfile\nwith zipfile.ZipFile(x) as y: pass")
    assert calls_parser("model = library.AutoModel.from_pretrained(x)")
    assert not calls_parser("from PIL import Image\nImage.new('L', (1, 1))")
