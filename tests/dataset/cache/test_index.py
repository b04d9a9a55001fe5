"""The index of a cache folder: what it says, and when it says nothing."""

import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dataset.cache.index import INDEX_NAME, VerifiedEntries, fingerprint
from dataset.cache.store import SingleFiles

OLD_NS = 1_700_000_000_000_000_000
FACTS = {"encoder": {"vae": "first"}, "parts": 1}


def opened(folder: Path, is_trusted: bool = True, kind: str = "latents") -> VerifiedEntries[Any]:
    return VerifiedEntries(SingleFiles(folder), kind, lambda facts: facts, is_trusted)


def make(folder: Path, *names: str, kind: str = "latents", facts: Any = FACTS) -> None:
    """Write entries that are old enough, and an index of them."""
    index = opened(folder, kind=kind)
    for name in names:
        (folder / name).write_bytes(b"content of " + name.encode())
        os.utime(folder / name, ns=(OLD_NS, OLD_NS))
        index.note(name, SingleFiles(folder).stamp(name), 7, facts)
    index.write(index.rows(), least=0)


def test_a_row_says_what_was_noted_until_entry_or_sources_change(tmp_path: Path) -> None:
    make(tmp_path, "one", "two", "schön 猫")
    index = opened(tmp_path)
    assert [index.get(name, 7) for name in ("one", "schön 猫", "three")] == [FACTS, FACTS, None]
    assert index.get("one", 7) is index.get("two", 7)  # a million rows share what is equal
    assert index.get("one", 8) is None
    (tmp_path / "one").write_bytes(b"content of oNe")  # of the same size
    assert index.get("one", 7) is None
    os.utime(tmp_path / "one", ns=(OLD_NS + 1, OLD_NS + 1))
    assert opened(tmp_path).get("one", 7) is None
    (tmp_path / "two").unlink()
    assert index.get("two", 7) is None


def test_what_changed_a_moment_ago_is_not_remembered(tmp_path: Path) -> None:
    """The next change may bear the same time, as git says of its index."""
    store, index = SingleFiles(tmp_path), opened(tmp_path)
    (tmp_path / "one").write_bytes(b"content")
    index.note("one", store.stamp("one"), 7, FACTS)
    index.note_written("one", store.stamp("one"), 7, FACTS)
    assert index.rows() == []
    os.utime(tmp_path / "one", ns=(OLD_NS, OLD_NS))
    index.note("one", store.stamp("one"), 7, FACTS, newest_ns=(tmp_path).stat().st_mtime_ns)
    assert index.rows() == []
    index.note("one", store.stamp("one"), 7, FACTS)
    assert [row[0] for row in index.rows()] == ["one"]


def test_rows_of_both_kinds_and_of_earlier_runs_stay_and_those_of_removed_entries_go(tmp_path: Path) -> None:
    make(tmp_path, "one", "two")
    make(tmp_path, "text", kind="texts", facts={"t5": {}})
    make(tmp_path, "two", "three", facts={"parts": 2})
    (tmp_path / "one").unlink()
    make(tmp_path, "four")
    assert [opened(tmp_path).get(name, 7) for name in ("two", "three", "four")] == [
        {"parts": 2},
        {"parts": 2},
        FACTS,
    ]
    assert opened(tmp_path, kind="texts").get("text", 7) == {"t5": {}}
    assert opened(tmp_path).get("text", 7) is None
    names = pq.read_table(tmp_path / INDEX_NAME).column("name").to_pylist()
    assert sorted(names) == ["four", "text", "three", "two"]


def test_a_folder_that_cannot_be_written_goes_without(tmp_path: Path) -> None:
    make(tmp_path, "one")
    (tmp_path / INDEX_NAME).unlink()
    (tmp_path / INDEX_NAME).mkdir()  # no file can take its place
    make(tmp_path, "two")
    assert (tmp_path / INDEX_NAME).is_dir()


def test_a_fingerprint_tells_sizes_times_order_and_texts_apart() -> None:
    assert fingerprint([(1, 2), (3, 4)]) == -3251428344978824213  # of files that were written before
    others = [[(1, 2)], [(3, 4), (1, 2)], [(1, 2), (3, 5)]]
    assert len({fingerprint(stamps) for stamps in others} | {fingerprint((), "a"), fingerprint(())}) == 5
