import contextlib
import itertools
import os
import pickle
import shutil
import sqlite3
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset.cache import catalog
from dataset.cache.catalog import list_shards
from dataset.cache.old_shards import read_old_shard
from dataset.cache.shards import ShardStore, merge_shards, shard_errors
from dataset.cache.store import SingleFiles
from modules.errors import OutputError
from tests.dataset.cache.entries import (
    FULL,
    NAMES,
    ODD,
    contents,
    fill,
    make_shards,
    number_of,
    seen,
    shard,
    write,
)

OLD = Path(__file__).parents[2] / "data" / "old_shards"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_shards(tmp_path)


def test_an_entry_is_read_as_from_a_file(tmp_path: Path) -> None:
    files, packed = SingleFiles(tmp_path / "files"), ShardStore(tmp_path / "shards")
    names = [*NAMES[:2], *ODD]
    for store in (files, packed):
        fill(store, names)
    assert sorted(packed.names()) == sorted(files.names())
    for is_closed in (False, True):
        if is_closed:
            packed.close(is_last=True)
            assert len(os.listdir(tmp_path / "shards")) == 1
        for name in names:
            assert packed.read_bytes(name) == (tmp_path / "files" / name).read_bytes()
            header = packed.read(name, is_full=False)
            assert header.shapes == files.read(name, is_full=False).shapes


def test_later_entries_hold_and_removed_ones_are_gone(folder: Path) -> None:
    first, second = ShardStore(folder), ShardStore(folder)
    first.read(NAMES[5])
    write(second, NAMES[0], 7)
    second.remove(NAMES[1])
    write(second, NAMES[2] + ".part", 2)
    second.remove(NAMES[2] + ".part")
    state = {**FULL, NAMES[0]: 7}
    del state[NAMES[1]]
    for is_last in (False, True, True):
        second.close(is_last)
        assert seen(folder) == state
        assert NAMES[0] in second
        assert NAMES[1] not in second
    assert number_of(first, NAMES[5]) == 5  # the shard that it knew was merged away
    assert set(first.names()) == state.keys()
    assert len(contents(folder)) == 1
    copy = pickle.loads(pickle.dumps(first))
    assert number_of(copy, NAMES[0]) == 7


@pytest.mark.parametrize("digits", [("0", "f"), ("f", "0")])
def test_of_two_that_did_not_see_each_other_the_one_that_writes_wins(
    folder: Path, digits: tuple[str, str]
) -> None:
    writing, removing = ShardStore(folder), ShardStore(folder)
    assert set(writing.names()) == set(removing.names()) == FULL.keys()
    write(writing, NAMES[0], 7)
    removing.remove(NAMES[0])
    for store, digit in zip((writing, removing), digits, strict=True):
        there = list_shards(folder)
        store.close()
        (new,) = [name for name in list_shards(folder).keys() - there.keys() if name.endswith(".sqlite")]
        (folder / new).rename(folder / f"cache-{digit * 16}.sqlite")
    assert seen(folder)[NAMES[0]] == 7
    ShardStore(folder).close(is_last=True)
    assert seen(folder)[NAMES[0]] == 7


def test_large_shards_stay_and_holes_are_reclaimed(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, shard_bytes=90_000)
    fill(store, [*NAMES, *(f"more_{number}" for number in range(8))])
    store.close(is_last=True)
    before = {name for name, size in list_shards(tmp_path).items() if size > 90_000}
    assert len(before) > 1
    write(store, "small", 1)
    store.close(is_last=True)
    assert before <= contents(tmp_path).keys()
    for name in sorted(store.names())[:-2]:
        store.remove(name)
    store.close(is_last=True)
    assert seen(tmp_path) == {"more_7": 13, "small": 1}
    assert sum(map(len, contents(tmp_path).values())) < 200_000
    assert shard_errors(tmp_path) == []


def damages(data: bytes, step: int) -> Iterator[tuple[str, int, bytes]]:
    """How and where a file is damaged, and what becomes of it."""
    for place in range(0, len(data), step):
        flipped = bytearray(data)
        flipped[place] ^= 0x10
        yield "flip", place, bytes(flipped)
    for place in range(1, len(data), 3 * step):
        yield "cut", place, data[:place]
        yield "zero", place, data[:place] + bytes(len(data[place : place + 5000])) + data[place + 5000 :]


@pytest.mark.parametrize("step", [20011, pytest.param(1009, marks=pytest.mark.slow)])
def test_damage_is_noticed_and_mended(folder: Path, step: int) -> None:
    path, right = shard(folder), contents(folder)
    for how, place, damaged in damages(right[path.name], step):
        path.write_bytes(damaged)
        alive, store = seen(folder), ShardStore(folder)
        assert alive.items() <= FULL.items()
        # of a page of the tables nothing may be left, of others all but one entry
        assert how != "flip" or len(alive) >= 5 or place < 3 * catalog.PAGE_BYTES, place
        gone = [name for name in NAMES if name not in alive]
        # training reads what the names promise, and asks for faults first
        assert not gone or shard_errors(folder) or set(store.names()) >= set(gone), (how, place)
        for name in gone:
            write(store, name, FULL[name])
        store.close(is_last=True)
        assert seen(folder) == FULL, (how, place)
        assert shard_errors(folder) == [], (how, place)
        for name in contents(folder):
            (folder / name).unlink()
        for name, content in right.items():
            (folder / name).write_bytes(content)


@pytest.mark.slow
def test_a_live_writer_keeps_its_shard_however_long_it_has_written_nothing(tmp_path: Path) -> None:
    code = "import sys; from tests.dataset.cache.entries import *; end_one(Path(sys.argv[1]))"
    writer = ShardStore(tmp_path)
    fill(writer, NAMES[:3])
    (path,) = tmp_path.glob("cache-*.writing")
    os.utime(path, (time.time() - 7300,) * 2)

    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=OLD.parents[2])
    fill(writer, NAMES[3:], 3)
    writer.close(is_last=True)

    assert done.returncode == 0
    assert seen(tmp_path) == FULL | {"small": 1}


@pytest.mark.skipif(os.name == "nt", reason="needs a limit for files")
def test_a_full_disk_is_an_error_and_the_store_stays_whole(folder: Path) -> None:
    import resource

    before, expected = contents(folder), {**FULL, "more": 1}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = ShardStore(folder)
    write(store, "more", 1)
    store.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot be written"):
            store.write_bytes("too much", bytes(200_000))
        with pytest.raises(OutputError, match=r"cannot be written"):
            store.close(is_last=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before.items() <= contents(folder).items()
    assert expected.items() <= seen(folder).items()
    ShardStore(folder).close(is_last=True)
    assert expected.items() <= seen(folder).items()
    assert shard_errors(folder) == []


def test_a_volume_without_locks_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = catalog.connect

    def connect(uri: str, seconds: float = 1.0) -> sqlite3.Connection:
        if "nolock" not in uri and "immutable" not in uri and uri != ":memory:":
            raise sqlite3.OperationalError("locking protocol")
        return really(uri, seconds)

    monkeypatch.setattr(catalog, "connect", connect)
    store = ShardStore(tmp_path)
    fill(store, NAMES)
    assert number_of(store, NAMES[2]) == 2
    store.close(is_last=True)
    assert seen(tmp_path) == FULL


def test_a_shard_of_a_later_version_is_left_alone(folder: Path) -> None:
    later = folder / f"cache-{'0' * 16}.sqlite"
    with sqlite3.connect(later) as rows:
        rows.execute("PRAGMA user_version = 9")
    ShardStore(folder).close(is_last=True)
    assert later.exists()
    assert seen(folder) == FULL
    assert "from a later version" in shard_errors(folder)[0]


# --- shards of earlier versions

OLD_NUMBERS = [("clip_0_toy", 10), ("clip_2_toy", 2), ("clip_3_toy", 3), ("ein Bär " + "x" * 100 + "_toy", 5)]
OLD_FULL = {f"{stem}_te.safetensors": number for stem, number in OLD_NUMBERS}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars as earlier versions made them, the second one not in the index."""
    return Path(shutil.copytree(OLD, tmp_path / "tars"))


def test_tars_of_earlier_versions_are_read_and_written_beside(tars: Path) -> None:
    before = contents(tars)
    assert seen(tars) == OLD_FULL
    assert shard_errors(tars) == []
    store = ShardStore(tars)
    assert store.read("clip_2_toy_te.safetensors", is_full=False).metadata["number"] == "2"
    write(store, "clip_2_toy_te.safetensors", 20)
    store.remove("clip_3_toy_te.safetensors")
    store.close(is_last=True)
    state = {**OLD_FULL, "clip_2_toy_te.safetensors": 20}
    del state["clip_3_toy_te.safetensors"]
    assert seen(tars) == state
    assert {name for name in before if name.endswith(".tar")} <= contents(tars).keys()
    merge_shards(tars, with_tars=True)
    assert seen(tars) == state
    assert sorted(contents(tars)) == [shard(tars).name]


def test_a_damaged_tar_costs_its_entries_and_is_mended(tars: Path) -> None:
    folder = tars.with_name("damaged")
    for path in tars.glob("*.tar"):
        for how, place, damaged in damages(path.read_bytes(), 761):
            shutil.copytree(tars, folder)
            (folder / path.name).write_bytes(damaged)
            alive, store = seen(folder), ShardStore(folder)
            gone = [name for name in OLD_FULL if name not in alive]
            assert not gone or shard_errors(folder) or set(store.names()) >= set(gone), (how, place)
            store.close(is_last=True)
            assert seen(folder) == alive, (how, place)
            shutil.rmtree(folder)


@pytest.mark.parametrize("size", [-512, 1 << 90])
def test_a_tar_with_a_hostile_size_ends(tmp_path: Path, size: int) -> None:
    header = bytearray(tarfile.TarInfo("a").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (size % (1 << 96)).to_bytes(12, "big")
    header[124] |= 0x80
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "cache-0123456789abcdef.tar"
    path.write_bytes(header + bytes(1024))

    with pytest.raises(tarfile.HeaderError):
        read_old_shard(path)


# --- shards that somebody made to do harm

ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i"
COLUMNS = "(place INTEGER PRIMARY KEY, name BLOB, generation INTEGER, size INTEGER, crc32 INTEGER, data BLOB"
TABLE, ROW = f"CREATE TABLE entries {COLUMNS});", "INSERT INTO entries VALUES (1, {}, {}, {}, {}, 'x');"
OURS = catalog.SHARD_TABLE
HOSTILE = {
    "a view without end": f"CREATE VIEW entries AS {ENDLESS} place, x'61' name, 1 generation, 1 size, "
    "1 crc32, 1 data FROM n",
    "a computed column": f"CREATE TABLE entries {COLUMNS}, more AS (zeroblob(1 << 30)));",
    "a trigger": f"{OURS} CREATE TRIGGER t AFTER INSERT ON entries BEGIN DELETE FROM entries; END",
    "no index": TABLE,
    "a name as text": OURS + ROW.format("'clip'", 1, 1, 1),
    "a long name": OURS + ROW.format("zeroblob(5000)", 1, 1, 1),
    "a text as generation": OURS + ROW.format("x'61'", "'many'", 1, 1),
    "the last generation": OURS + ROW.format("x'61'", (1 << 63) - 1, 1, 1),
    "a negative size": OURS + ROW.format("x'61'", 1, -5, 1),
    "an endless size": OURS + ROW.format("x'61'", 1, "9e999", 1),
    "a blob as checksum": OURS + ROW.format("x'61'", 1, 1, "x'00'"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_shard_is_damaged_and_costs_no_other(what: str, folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / f"cache-{'0' * 16}.sqlite")) as rows:
        rows.executescript(HOSTILE[what])
        rows.commit()

    assert seen(folder) == FULL
    assert any("is damaged" in error for error in shard_errors(folder))
    ShardStore(folder).close(is_last=True)
    assert seen(folder) == FULL
    assert shard_errors(folder) == []


def test_pages_that_name_one_page_many_times_end(folder: Path) -> None:
    path = folder / f"cache-{'0' * 16}.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as rows:
        rows.execute("PRAGMA page_size = 512")
        rows.executescript(OURS)
        values = ((None, b"%07d" % number, 0, 1, 1, b"") for number in range(500))
        rows.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", values)
        rows.commit()
        ((root,),) = rows.execute("SELECT rootpage FROM sqlite_master WHERE name = 'names'")
    data = bytearray(path.read_bytes())

    first = (root - 1) * 512
    cells = struct.unpack_from(">H", data, first + 3)[0]
    places = [8, *(struct.unpack_from(">H", data, first + 12 + 2 * each)[0] for each in range(cells))]
    (leaf,) = struct.unpack_from(">I", data, first + places[1])
    pages = len(data) // 512
    inner = data[first : first + 512]
    levels = [root, *range(pages + 1, pages + 11), leaf]
    for page, below in itertools.pairwise(levels):  # all children of a page are the next one
        for place in places:
            struct.pack_into(">I", inner, place, below)
        data[(page - 1) * 512 : page * 512] = inner
    struct.pack_into(">I", data, 28, len(data) // 512)
    path.write_bytes(data)

    began = time.process_time()
    assert set(ShardStore(folder).names()) >= FULL.keys()
    assert time.process_time() - began < 10


@pytest.mark.parametrize("what", ["link", "journal", "super", "pipe", "folder", "lock"])
def test_files_in_place_of_a_writers_touch_nothing_elsewhere(what: str, tmp_path: Path) -> None:
    folder, outside = make_shards(tmp_path / "inside"), make_shards(tmp_path / "outside")
    (outside / "empty.sqlite").touch()
    before, there = contents(outside), set(folder.iterdir())
    path = folder / f"cache-{catalog.machine()}{'0' * 24}.writing"
    match what:
        case "link":
            path.symlink_to(outside / "empty.sqlite")
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.with_name(f"{path.name}-wal").mkdir()
        case "lock":
            (folder / ".cache-index.lock").symlink_to(outside / "made")
        case _:
            shutil.copy(shard(folder), path)
            journal = path.with_name(f"{path.name}-journal")
            if what == "journal":
                journal.symlink_to(outside / "made")
            else:
                victim = str(outside / "empty.sqlite").encode()
                ends = struct.pack(">II", len(victim), sum(victim)) + bytes.fromhex("d9d505f920a163d7")
                head = bytes.fromhex("d9d505f920a163d7") + struct.pack(">IIIII", 0, 0, 1, 512, 512)
                page_1 = struct.pack(">I", 0x40000000 // 512 + 1)
                journal.write_bytes(head.ljust(512, b"\0") + page_1 + victim + ends)

    store = ShardStore(folder)
    assert seen(folder) == FULL
    if what == "lock":
        with pytest.raises(OutputError):
            store.close(is_last=True)
    else:
        store.close(is_last=True)
    assert contents(outside) == before
    assert there <= set(folder.iterdir()) or what in {"journal", "super"}


@pytest.mark.skipif(os.name == "nt", reason="needs a limit for files")
def test_a_disk_that_is_full_at_the_start_gets_no_empty_shards(tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written: .*Free some space"):
            catalog.ShardWriter(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
