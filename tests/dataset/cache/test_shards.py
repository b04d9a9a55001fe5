import os
import pickle
import random
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dataset.cache import catalog, shard_files, shards
from dataset.cache.catalog import list_shards, machine
from dataset.cache.shard_files import merge_shards, shard_faults
from dataset.cache.shards import ShardStore
from dataset.cache.store import CacheStore, SingleFiles
from dataset.sources.media_source import INDEX
from modules.errors import CacheError, OutputError
from tests.dataset.cache.killing import needs_fork, run_and_kill, run_to_step

NAMES = [f"clip_{number}_00000-005_0032x0032_toy.safetensors" for number in range(6)]
ODD = ["ein Bär_toy_te.safetensors", "x" * 130 + "_toy_te.safetensors", "bad\udce9_toy_te.safetensors"]
OLD = Path(__file__).parents[2] / "data" / "old_shards"


def tensors(number: int) -> dict[str, torch.Tensor]:
    values = torch.arange(6000 + 7 * number, dtype=torch.float32) + number
    return {
        "latents_1x1x1_float32": values,
        "mask": torch.tensor([number]),
        "b_bfloat16": values[:2].bfloat16(),
    }


def fill(store: CacheStore, names: list[str], start: int = 0) -> None:
    for number, name in enumerate(names, start):
        write(store, name, number)


def write(store: CacheStore, name: str, number: int) -> None:
    store.write(name, tensors(number), {"architecture": "toy", "number": str(number)})


def number_of(store: CacheStore, name: str) -> int:
    return int(store.read(name).header.metadata["number"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of shards, in order."""
    store = ShardStore(tmp_path)
    fill(store, NAMES)
    store.close(is_last=True)
    return tmp_path


def shard(folder: Path) -> Path:
    (name,) = list_shards(folder)
    return folder / name


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without what a killed process was writing: that goes when it is old."""
    paths = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".tmp"]
    return {path.name: path.read_bytes() for path in paths}


def seen(folder: Path) -> dict[str, int]:
    """The entries that can be read."""
    store, found = ShardStore(folder), {}
    for name in store.names():
        try:
            found[name] = number_of(store, name)
        except CacheError:
            continue
    return found


WHOLE = {name: number for number, name in enumerate(NAMES)}


def test_an_entry_is_read_as_from_a_file(tmp_path: Path) -> None:
    files, packed = SingleFiles(tmp_path / "files"), ShardStore(tmp_path / "shards")
    for store in (files, packed):
        fill(store, NAMES + ODD[:2])
    assert sorted(packed.names()) == sorted(files.names())
    for is_closed in (False, True):
        if is_closed:
            packed.close(is_last=True)
            assert len(os.listdir(tmp_path / "shards")) == 2
        for name in NAMES + ODD[:2]:
            theirs, ours = files.read(name), packed.read(name)
            assert list(ours.named) == list(theirs.named)
            assert all(torch.equal(ours.named[key], theirs.named[key]) for key in theirs.named)
            assert ours.header.metadata == theirs.header.metadata
            assert packed.read(name, is_whole=False).header.shapes == {
                key: tuple(tensor.shape) for key, tensor in theirs.named.items()
            }
            assert packed.read_bytes(name) == (tmp_path / "files" / name).read_bytes()
    write(packed, ODD[2], 3)
    packed.close(is_last=True)
    assert number_of(ShardStore(tmp_path / "shards"), ODD[2]) == 3


def test_later_entries_hold_and_removed_ones_are_gone(folder: Path) -> None:
    first, second = ShardStore(folder), ShardStore(folder)
    first.read(NAMES[5])
    write(second, NAMES[0], 7)
    second.remove(NAMES[1])
    write(second, NAMES[2] + ".part", 2)
    second.remove(NAMES[2] + ".part")
    state = {**WHOLE, NAMES[0]: 7}
    del state[NAMES[1]]
    for is_last in (False, True, True):
        second.close(is_last)
        assert seen(folder) == state
        assert NAMES[0] in second
        assert NAMES[1] not in second
    assert number_of(first, NAMES[5]) == 5  # the shard that it knew was merged away
    assert set(first.names()) == state.keys()
    assert len(contents(folder)) == 2
    copy = pickle.loads(pickle.dumps(first))
    assert number_of(copy, NAMES[0]) == 7


@pytest.mark.parametrize("digits", [("0", "f"), ("f", "0")])
def test_of_two_that_did_not_see_each_other_the_one_that_writes_wins(
    folder: Path, digits: tuple[str, str]
) -> None:
    writing, removing = ShardStore(folder), ShardStore(folder)
    assert set(writing.names()) == set(removing.names()) == WHOLE.keys()
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
    (tmp_path / INDEX).unlink()
    assert seen(tmp_path) == {"more_7": 13, "small": 1}
    assert shard_faults(tmp_path) == []


def damages(size: int, step: int) -> Iterator[tuple[str, int]]:
    for place in range(0, size, step):
        yield "flip", place
    for place in range(1, size, 3 * step):
        yield "cut", place
        yield "zero", place


@pytest.mark.parametrize("step", [20011, pytest.param(1009, marks=pytest.mark.slow)])
@pytest.mark.parametrize("has_index", [True, False])
def test_damage_costs_only_what_it_touches_and_is_noticed(folder: Path, has_index: bool, step: int) -> None:
    path, right = shard(folder), contents(folder)
    data = right[path.name]
    for how, place in damages(len(data), step):
        damaged = bytearray(data)
        if how == "flip":
            damaged[place] ^= 0x10
        elif how == "cut":
            del damaged[place:]
        else:
            damaged[place : place + 5000] = bytes(len(damaged[place : place + 5000]))
        path.write_bytes(damaged)
        if not has_index:
            (folder / INDEX).unlink(missing_ok=True)
        alive, store = seen(folder), ShardStore(folder)
        assert alive.items() <= WHOLE.items()
        # of a page of the table itself nothing may be left, of others one entry at most
        assert how != "flip" or len(alive) >= 5 or place < 3 * catalog.PAGE_BYTES, place
        gone = [name for name in NAMES if name not in alive]
        # training reads what the names promise, and asks for faults first
        assert not gone or shard_faults(folder) or set(store.names()) >= set(gone), (how, place)
        for name in gone:
            write(store, name, WHOLE[name])
        store.close(is_last=True)
        assert seen(folder) == WHOLE, (how, place)
        assert shard_faults(folder) == [], (how, place)
        for name in contents(folder):
            (folder / name).unlink()
        for name, content in right.items():
            (folder / name).write_bytes(content)


def test_a_live_writer_keeps_its_shard_however_long_it_has_written_nothing(tmp_path: Path) -> None:
    code = "import sys; from tests.dataset.cache.test_shards import *; end_one(Path(sys.argv[1]))"
    writer = ShardStore(tmp_path)
    fill(writer, NAMES[:3])
    time.sleep(2 * shards.COMMIT_SECONDS)
    (path,) = tmp_path.glob("cache-*.writing")
    os.utime(path, (time.time() - 7300,) * 2)

    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=OLD.parents[2])
    fill(writer, NAMES[3:], 3)
    writer.close(is_last=True)

    assert done.returncode == 0
    assert seen(tmp_path) == WHOLE | {"small": 1}


def end_one(folder: Path) -> None:
    """Write an entry in another process, and end its run."""
    store = ShardStore(folder)
    write(store, "small", 1)
    store.close(is_last=True)


def test_what_a_cut_took_is_remembered_until_it_is_made_again(tmp_path: Path) -> None:
    names = [f"clip_{number:02d}" for number in range(40)]
    store = ShardStore(tmp_path)
    fill(store, names)
    store.close(is_last=True)
    path = shard(tmp_path)
    os.truncate(path, path.stat().st_size // 2)
    left = seen(tmp_path)
    assert 10 < len(left) < 30
    ShardStore(tmp_path).close(is_last=True)  # a run that makes none of these
    store, lost = ShardStore(tmp_path), [name for name in names if name not in left]
    assert f"{len(lost)} entries with them, such as {lost[0]}" in shard_faults(tmp_path)[-1]
    assert set(store.names()) == set(names)
    with pytest.raises(CacheError, match=r"clip_.*: damaged, its shard was cut or removed"):
        store.read(lost[0])
    for name in lost[1:]:
        write(store, name, names.index(name))
    store.remove(lost[0])
    store.close(is_last=True)
    assert shard_faults(tmp_path) == []
    assert seen(tmp_path) == {name: number for number, name in enumerate(names) if name != lost[0]}


@pytest.mark.skipif(os.name == "nt", reason="needs a limit for files")
def test_a_full_disk_is_an_error_and_the_store_stays_whole(folder: Path) -> None:
    import resource

    before = contents(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = ShardStore(folder)
    write(store, "more", 1)
    store.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (120_000, limits[1]))
    try:
        store.write_bytes("too much", bytes(200_000))
        with pytest.raises(OutputError, match=r"cannot be written"):
            store.close()
        with pytest.raises(OutputError, match=r"cannot be written"):
            store.close(is_last=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before.items() <= contents(folder).items()
    assert {**WHOLE, "more": 1}.items() <= seen(folder).items()
    ShardStore(folder).close(is_last=True)
    assert {**WHOLE, "more": 1}.items() <= seen(folder).items()
    assert shard_faults(folder) == []


@needs_fork
@pytest.mark.parametrize("same", ["name", "start", "nothing"])
def test_a_shard_that_a_killed_container_left_is_used_at_once(
    folder: Path, same: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine()
    begun = {"name": here[:8] + "0" * 8, "start": "0" * 8 + here[8:], "nothing": "0" * 15 + "1"}
    monkeypatch.setattr(shard_files, "machine", lambda: begun[same])

    def work(acknowledge) -> None:  # type: ignore[no-untyped-def]
        store = ShardStore(folder)
        write(store, ODD[0], 9)
        time.sleep(0.5)
        write(store, ODD[1], 9)
        acknowledge()
        time.sleep(5)

    run_and_kill(work, 1.0)
    expected = WHOLE if same == "nothing" else {**WHOLE, ODD[0]: 9, ODD[1]: 9}
    assert seen(folder) == expected
    assert "has no end" in shard_faults(folder)[0]
    ShardStore(folder).close(is_last=True)
    assert seen(folder) == expected
    assert len(list_shards(folder)) == (2 if same == "nothing" else 1)
    for name in list_shards(folder):
        if name.endswith(".writing"):  # an hour later its writer must be dead
            os.utime(folder / name, (0, 0))
    ShardStore(folder).close(is_last=True)
    assert seen(folder) == {**WHOLE, ODD[0]: 9, ODD[1]: 9}


def test_a_volume_without_locks_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = catalog.connect

    def connect(uri: str, seconds: float = 1.0) -> sqlite3.Connection:
        if "nolock" not in uri and "immutable" not in uri and uri != ":memory:":
            raise sqlite3.OperationalError("locking protocol")
        return really(uri, seconds)

    for module in (shard_files, catalog):
        monkeypatch.setattr(module, "connect", connect)
    store = ShardStore(tmp_path)
    fill(store, NAMES)
    assert number_of(store, NAMES[2]) == 2
    store.close(is_last=True)
    assert seen(tmp_path) == WHOLE


def test_a_shard_of_a_later_version_is_left_alone(folder: Path) -> None:
    later = folder / f"cache-{'0' * 16}.sqlite"
    with sqlite3.connect(later) as rows:
        rows.execute("PRAGMA user_version = 9")
    ShardStore(folder).close(is_last=True)
    assert later.exists()
    assert seen(folder) == WHOLE
    assert "of a later version" in shard_faults(folder)[0]


# --- shards of earlier versions

OLD_NUMBERS = [("clip_0_toy", 10), ("clip_2_toy", 2), ("clip_3_toy", 3), ("ein Bär " + "x" * 100 + "_toy", 5)]
OLD_WHOLE = {f"{stem}_te.safetensors": number for stem, number in OLD_NUMBERS}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars as earlier versions made them, the second one not in the index."""
    return Path(shutil.copytree(OLD, tmp_path / "tars"))


def test_tars_of_earlier_versions_are_read_and_written_beside(tars: Path) -> None:
    before = contents(tars)
    assert seen(tars) == OLD_WHOLE
    assert shard_faults(tars) == []
    store = ShardStore(tars)
    assert store.read("clip_2_toy_te.safetensors", is_whole=False).header.metadata["number"] == "2"
    write(store, "clip_2_toy_te.safetensors", 20)
    store.remove("clip_3_toy_te.safetensors")
    store.close(is_last=True)
    state = {**OLD_WHOLE, "clip_2_toy_te.safetensors": 20}
    del state["clip_3_toy_te.safetensors"]
    assert seen(tars) == state
    assert {name for name in before if name.endswith(".tar")} <= contents(tars).keys()
    merge_shards(tars, with_tars=True)
    assert seen(tars) == state
    assert sorted(contents(tars)) == sorted([shard(tars).name, INDEX])


def test_a_damaged_tar_costs_its_entries_and_is_mended(tars: Path) -> None:
    whole = {path.name: path.read_bytes() for path in tars.glob("*.tar")}
    for name, data in whole.items():
        for how, place in damages(len(data), 761):
            folder = tars.with_name("damaged")
            shutil.copytree(tars, folder)
            damaged = bytearray(data)
            if how == "flip":
                damaged[place] ^= 0x10
            else:
                del damaged[place:]
            (folder / name).write_bytes(damaged)
            alive, store = seen(folder), ShardStore(folder)
            gone = [name for name in OLD_WHOLE if name not in alive]
            assert not gone or shard_faults(folder) or set(store.names()) >= set(gone), (how, place)
            assert how != "flip" or len(gone) < 2, place
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

    assert catalog.read_old_shard(path) == ([], False)


# --- kills

State = dict[str, int]
Step = tuple[str, str, int]


def steps(count: int) -> list[Step]:
    chance = random.Random(5)
    kinds = ["write", "remove", "close", "settle", "sleep"]
    return [
        (chance.choices(kinds, [6, 2, 1, 1, 1])[0], chance.choice(NAMES), number) for number in range(count)
    ]


def take(store: ShardStore, step: Step) -> None:
    kind, name, number = step
    if kind == "write":
        write(store, name, number)
    elif kind == "remove":
        store.remove(name)
    elif kind == "sleep":
        time.sleep(shards.COMMIT_SECONDS * 1.2)
    else:
        store.close(is_last=kind == "settle")


def after(state: State, step: Step) -> State:
    kind, name, number = step
    state = dict(state)
    if kind == "write":
        state[name] = number
    elif kind == "remove":
        state.pop(name, None)
    return state


@needs_fork
@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.slow)])
def test_what_was_closed_survives_kills_and_nothing_is_half_there(tmp_path: Path, kills: int) -> None:
    plan, chance = steps(60 * kills), random.Random(kills)
    done, state = 0, State()
    for _ in range(kills):

        def work(acknowledge, start: int = done) -> None:  # type: ignore[no-untyped-def]
            store = ShardStore(tmp_path)
            for step in plan[start:]:
                take(store, step)
                acknowledge()

        count, _ = run_and_kill(work, chance.uniform(0.05, 0.6))
        states, last = [state], 0
        for number, step in enumerate(plan[done : done + count + 1], 1):
            states.append(after(states[-1], step))
            if step[0] in ("close", "settle", "sleep") and number <= count:
                last = number
        found = seen(tmp_path)
        assert found in states[last:]
        state, done = found, done + count
    store = ShardStore(tmp_path)
    store.close(is_last=True)
    assert seen(tmp_path) == state
    assert shard_faults(tmp_path) == []
    assert done >= kills // 2
    assert catalog.Catalog(tmp_path).has_index


@needs_fork
def test_what_was_written_in_a_burst_survives_a_later_kill(tmp_path: Path) -> None:
    def work(acknowledge) -> None:  # type: ignore[no-untyped-def]
        fill(ShardStore(tmp_path), NAMES)
        time.sleep(4 * shards.COMMIT_SECONDS)
        acknowledge()
        time.sleep(60)  # the next clip is encoded

    assert run_and_kill(work, 12 * shards.COMMIT_SECONDS) == (1, False)
    assert seen(tmp_path) == WHOLE


@needs_fork
@pytest.mark.parametrize("rounds", [1, pytest.param(25, marks=pytest.mark.slow)])
def test_several_writers_lose_nothing_when_some_are_killed(tmp_path: Path, rounds: int) -> None:
    chance = random.Random(rounds)
    for number in range(rounds):
        folder = tmp_path / str(number)
        counts: dict[int, tuple[int, bool]] = {}

        def work(writer: int, acknowledge, folder: Path = folder) -> None:  # type: ignore[no-untyped-def]
            store, order = ShardStore(folder), random.Random(writer)
            for step in range(12):
                write(store, f"of_{writer}_{step}", step)
                write(store, f"shared_{step}", step)
                write(store, f"shared_{step}.part", step)
                store.remove(f"shared_{step}.part")
                store.close(is_last=order.random() < 0.3)
                acknowledge()
            store.close(is_last=True)

        def run(writer: int, seconds: float, counts=counts, work=work) -> None:  # type: ignore[no-untyped-def]
            counts[writer] = run_and_kill(lambda acknowledge: work(writer, acknowledge), seconds)

        times = [chance.uniform(0.1, 0.5), chance.uniform(0.1, 0.5), 3.0]
        threads = [threading.Thread(target=run, args=pair) for pair in enumerate(times)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for again in range(2):
            found = seen(folder)
            for writer, (count, _) in counts.items():
                for step in range(count):
                    assert found.get(f"of_{writer}_{step}") == step, (writer, step)
                    assert found.get(f"shared_{step}") == step, (writer, step)
            if not again:
                ShardStore(folder).close(is_last=True)
        assert shard_faults(folder) == []
        assert len(contents(folder)) == 2


@needs_fork
def test_a_merge_that_stops_at_any_step_brings_nothing_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    store = ShardStore(source)
    fill(store, NAMES)
    for change in ("replace", "remove", "again", "remove more"):
        store.close()
        store = ShardStore(source)
        if change == "replace":
            fill(store, NAMES[:4], start=10)
        elif change == "again":
            fill(store, NAMES[:2], start=20)
        else:
            for name in NAMES[: 2 if change == "remove" else 1]:
                store.remove(name)
    store.close()
    state = seen(source)
    assert len(state) == len(NAMES) - 1
    step, is_done = 0, False
    while not is_done:
        step += 1
        folder = tmp_path / str(step)
        shutil.copytree(source, folder)
        is_done = run_to_step(lambda folder=folder: merge_shards(folder), step)  # type: ignore[misc]
        assert seen(folder) == state, step
        ShardStore(folder).close(is_last=True)
        assert seen(folder) == state, step
        assert shard_faults(folder) == []
        assert len(contents(folder)) == 2
    assert step > 6
