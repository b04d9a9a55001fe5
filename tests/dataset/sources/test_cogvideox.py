"""Data sets in CogVideoX form are read as our own lists are."""

import json
from pathlib import Path

import pytest
import torch

from dataset.sources.cogvideox import list_cogvideox
from dataset.sources.listing import find_sources
from dataset.sources.media_source import Fault
from modules.errors import DatasetError
from tests.data_tools.cogvideox.making import NAMES, read_table, save, write_data, write_lists
from tests.dataset.making import make_table
from tests.tiny.project import CAPTIONS

FORMS = {
    "lists": (),
    "csv": ('dataset_file = "data.csv"',),
    "jsonl": ('dataset_file = "data.jsonl"',),
    "csv by columns": ('dataset_file = "data.csv"', 'caption_column = "caption"', 'video_column = "video"'),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("cog") / "data set")


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_items_of_our_own_list(form: str, data: Path, tmp_path: Path) -> None:
    own = [
        json.dumps({"video_path": str(data / "videos" / f"{name}.mp4"), "caption": caption})
        for name, caption in zip(NAMES, CAPTIONS, strict=False)
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(own), encoding="utf-8")

    found = find_sources(read_table(tmp_path, data, *FORMS[form]))
    expected = find_sources(make_table(tmp_path, "video_jsonl_file"))

    assert len(found) == 3
    assert [(one.path, one.stem, one.caption, one.control, one.tensors) for one in found] == [
        (one.path, one.stem, one.caption, one.control, one.tensors) for one in expected
    ]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("t.jsonl", '{{"caption": "{0}", "video_path": "{1}"}}\n'),
        ("t.jsonl", '{{"caption": "kept", "prompt": "{0}", "video_path": "no", "video": "{1}"}}\n'),
        ("t.csv", 'prompt,video\n"{0}",{1}\n'),
    ],
)
def test_a_table_may_have_the_other_usual_columns(name: str, line: str, data: Path, tmp_path: Path) -> None:
    table = tmp_path / name
    table.write_text(line.format("a red fox", "videos/00000.mp4"), encoding="utf-8")

    (found,) = find_sources(read_table(tmp_path, data, f'dataset_file = "{table.as_posix()}"'))

    assert (found.caption, found.path) == ("a red fox", data / "videos" / "00000.mp4")


def test_tensors_are_beside_the_folder_of_clips_which_may_be_absent(tmp_path: Path) -> None:
    write_lists(tmp_path, ("one", "two"), ["part/videos/a.mp4", "part/videos/b.mp4"])
    table = read_table(tmp_path, tmp_path, "load_tensors = true")
    part = tmp_path / "part"

    with pytest.raises(DatasetError, match=r"1 folders are missing, .*\n .*part.video_latents"):
        find_sources(table)
    save(torch.zeros(32, 1, 4, 4), part / "video_latents" / "a.pt")
    with pytest.raises(DatasetError, match=r"1 files are missing, .*\n .*video_latents.b\.pt"):
        find_sources(table)
    save(torch.zeros(32, 1, 4, 4), part / "video_latents" / "b.pt")
    save(torch.zeros(226, 4096), part / "prompt_embeds" / "a.pt")
    with pytest.raises(DatasetError, match=r"1 files are missing, .*\n .*prompt_embeds.b\.pt"):
        find_sources(table)
    (part / "prompt_embeds" / "a.pt").unlink()
    (part / "prompt_embeds").rmdir()

    faults: list[Fault] = []
    sources = list_cogvideox(table, faults)

    assert not faults
    assert [one.tensors.moments for one in sources if one.tensors] == [
        part / "video_latents" / f"{name}.pt" for name in "ab"
    ]
    assert all(one.tensors and one.tensors.embeds is None for one in sources)
