"""The manual says what the code does: its examples load, and it names every key."""

import json
import re
from pathlib import Path

import pytest

from dataset.config import KEYS, MODES, load_dataset_config
from dataset.config_keys import ANYWHERE, DATASET, SUBSET, SUBSET_KEYS

ROOT = Path(__file__).resolve().parent.parent.parent
MANUAL = "".join(
    (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for page in ("dataset", "dataset_keys", "dataset_large")
)
PICTURES = (ROOT / "docs" / "image_datasets.md").read_text(encoding="utf-8")
TOOLS = (ROOT / "docs" / "dataset_tools.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", MANUAL + TOOLS + PICTURES, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", blocks("toml"), ids=range(len(blocks("toml"))))
def test_its_configurations_load(tmp_path: Path, text: str, caplog) -> None:
    path = tmp_path / "data.toml"
    path.write_text(text, encoding="utf-8")

    load_dataset_config(path)

    assert not caplog.records


def test_its_lists_are_valid() -> None:
    records = [json.loads(line) for text in blocks("jsonl") for line in text.splitlines()]

    assert records
    assert all({"caption"} < record.keys() for record in records)


def test_it_names_every_key_and_mode_with_where_it_may_stand() -> None:
    rows = {
        match[1]: match[0].split("|") for match in re.finditer(r"^\| `(\w+)` \|.*$", MANUAL, re.MULTILINE)
    }

    assert rows.keys() == KEYS.keys()
    for name, key in KEYS.items():
        assert (rows[name][-2].strip() == "yes") == key.in_general, name
        assert bool(rows[name][-4].strip()) == ("image" in key.kinds), name
        assert bool(rows[name][-3].strip()) == ("video" in key.kinds), name
    assert all(f'`"{mode}"`' in MANUAL for mode in MODES)


def test_the_manual_of_pictures_names_every_key_with_where_it_may_stand() -> None:
    table = PICTURES[PICTURES.index("## Every key") : PICTURES.index("## Without a file")]
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| `")]
    places = {name: row[-1].strip("| ") for row in rows for name in re.findall(r"`(\w+)`", row[0])}

    words = {SUBSET: "subset", ANYWHERE: "anywhere", DATASET: "dataset"}
    assert places == {name: words[key.place] for name, key in SUBSET_KEYS.items()}
