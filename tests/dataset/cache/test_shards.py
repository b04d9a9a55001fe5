import os
import pickle
import random
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from dataset.cache import tar_records
from dataset.cache.catalog import RecordKind, list_shards, open_catalog
from dataset.cache.files import read_entry
from dataset.cache.shards import ShardStore
from dataset.cache.store import CacheStore, SingleFiles
from dataset.cache.tar_records import END, Ending, ShardRecord, machine, read_records, record_header
from dataset.shard_names import INDEX
from modules.checkpoints.writing import safetensors_bytes
from modules.errors import CacheError, OutputError
from tests.dataset.cache.killing import needs_fork, run_and_kill, run_to_step

NAMES = [f"clip_{number}_00000-005_0032x0032_toy.safetensors" for number in range(6)]
ODD = ["ein Bär_toy_te.safetensors", "x" * 130 + "_toy_te.safetensors", "bad\udce9_toy_te.safetensors"]


def tensors(number: int) -> dict[str, torch.Tensor]:
    values = torch.arange(300 + 7 * number, dtype=torch.float32) + number
    return {
        "latents_1x1x1_float32": values,
        "mask": torch.tensor([number]),
        "b_bfloat16": values[:2].bfloat16(),
    }


def meta(number: int) -> dict[str, str]:
    return {"architecture": "toy", "number": str(number)}


def fill(store: CacheStore, names: list[str], start: int = 0) -> None:
    for number, name in enumerate(names, start):
        store.write(name, tensors(number), meta(number))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of shards, in order."""
    store = ShardStore(tmp_path)
    fill(store, NAMES)
    store.settle()
    return tmp_path


def shard(folder: Path) -> Path:
    (name,) = list_shards(folder)
    return folder / name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def whole(folder: Path) -> list[str]:
    """The names of the entries that can be read."""
    store, found = ShardStore(folder), []
    for name in sorted(store.names()):
        try:
            store.read(name)
            found.append(name)
        except CacheError:
            continue
    return found


def test_an_entry_is_read_as_from_a_file(tmp_path: Path) -> None:
    files, shards = SingleFiles(tmp_path / "files"), ShardStore(tmp_path / "shards")
    for store in (files, shards):
        fill(store, NAMES + ODD[:2])
    assert shards.names() == set(files.names())
    for name in NAMES + ODD[:2]:
        theirs, ours = files.read(name), shards.read(name)
        assert list(ours.named) == list(theirs.named)
        assert all(torch.equal(ours.named[key], theirs.named[key]) for key in theirs.named)
        assert ours.header.metadata == theirs.header.metadata
        assert shards.read_header(name).shapes == files.read_header(name).shapes
        assert shards.read_bytes(name) == (tmp_path / "files" / name).read_bytes()


def test_a_shard_is_a_plain_tar_of_the_single_files(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(shard(folder)) as tar:
        assert tar.getnames() == NAMES
        for number, name in enumerate(NAMES):
            file = tar.extractfile(name)
            assert file is not None
            assert file.read() == safetensors_bytes(tensors(number), meta(number))


@pytest.mark.skipif(os.name == "nt", reason="needs a tar command")
def test_the_tar_command_takes_a_shard_apart_without_a_word(tmp_path: Path) -> None:
    store = ShardStore(tmp_path)
    fill(store, NAMES + ODD)
    store.remove(NAMES[0])
    store.finish()  # not merged: with what was removed, and who wrote it
    (tmp_path / "out").mkdir()
    command = ["tar", "xf", str(shard(tmp_path)), "-C", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert set(os.listdir(tmp_path / "out")) == {*NAMES, *ODD}
    assert read_entry(tmp_path / "out" / ODD[0]).header.metadata["number"] == "6"


def test_two_files_hold_all_and_depend_on_the_entries_alone(folder: Path, tmp_path: Path) -> None:
    assert sorted(contents(folder)) == sorted([shard(folder).name, INDEX])
    other = ShardStore(tmp_path / "other")
    fill(other, [*NAMES[3:], "gone"], start=3)
    other.settle()
    fill(other, NAMES[:3][::-1], start=9)  # replaced right after
    fill(other, NAMES[:3])
    other.remove("gone")
    other.settle()
    assert contents(tmp_path / "other") == contents(folder)


def test_later_entries_hold_and_removed_ones_are_gone(tmp_path: Path) -> None:
    first, second = ShardStore(tmp_path), ShardStore(tmp_path)
    fill(first, NAMES[:3])
    assert second.names() == set(NAMES[:3])  # not finished yet, and whole
    second.write(NAMES[0], tensors(7), meta(7))
    second.remove(NAMES[1])
    second.replace(NAMES[2], NAMES[4], tensors(2), meta(2))
    for _ in range(2):
        assert ShardStore(tmp_path).names() == {NAMES[0], NAMES[4]}
        assert ShardStore(tmp_path).read(NAMES[0]).header.metadata["number"] == "7"
        assert ShardStore(tmp_path).read(NAMES[4]).header.metadata["number"] == "2"
        assert not ShardStore(tmp_path).has(NAMES[1])
        first.finish()
        second.settle()
    assert first.names() == {NAMES[0], NAMES[4]}  # the shard that it knew was merged away
    assert len(contents(tmp_path)) == 2


@pytest.mark.parametrize("removes_first", [False, True])
def test_of_two_that_did_not_see_each_other_the_one_that_writes_wins(
    tmp_path: Path, removes_first: bool
) -> None:
    fill(ShardStore(tmp_path), NAMES[:1])
    writing, removing = ShardStore(tmp_path), ShardStore(tmp_path)
    assert writing.names() == removing.names() == set(NAMES[:1])
    if removes_first:
        removing.remove(NAMES[0])
    writing.write(NAMES[0], tensors(7), meta(7))
    removing.remove(NAMES[0])
    for _ in range(2):
        assert ShardStore(tmp_path).read(NAMES[0]).header.metadata["number"] == "7"
        removing.finish()
        writing.settle()


def test_what_others_are_writing_is_not_merged(tmp_path: Path) -> None:
    writing, other = ShardStore(tmp_path), ShardStore(tmp_path)
    fill(writing, NAMES[:2])
    fill(other, NAMES[2:4], start=2)
    other.settle()
    fill(writing, NAMES[4:], start=4)
    assert ShardStore(tmp_path).names() == set(NAMES)
    assert "or is still running" in " ".join(other.faults())
    writing.settle()
    assert whole(tmp_path) == NAMES
    assert not other.faults()
    assert len(contents(tmp_path)) == 2


def test_large_shards_stay_and_holes_are_reclaimed(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, shard_bytes=8000)
    fill(store, NAMES)
    store.settle()
    before = contents(tmp_path)
    assert len(before) > 2
    fill(store, ["small"])
    store.settle()
    large = {name for name, data in before.items() if len(data) > 4000 and name != INDEX}
    assert large <= contents(tmp_path).keys()
    assert whole(tmp_path) == sorted([*NAMES, "small"])
    for name in NAMES[:-1]:
        store.remove(name)
    store.settle()
    assert whole(tmp_path) == [NAMES[-1], "small"]
    assert sum(map(len, contents(tmp_path).values())) < 14000
    assert ShardStore(tmp_path).faults() == []


def test_a_removed_entry_does_not_come_back_out_of_a_large_shard(tmp_path: Path) -> None:
    store = ShardStore(tmp_path, shard_bytes=20000)
    fill(store, [*NAMES, *(f"more_{number}" for number in range(8))])
    store.settle()
    store.remove(NAMES[0])
    store.write(NAMES[1], tensors(9), meta(9))
    store.settle()
    store.settle()
    for index in (True, False):
        if not index:
            (tmp_path / INDEX).unlink()
        assert NAMES[0] not in ShardStore(tmp_path).names()
        assert ShardStore(tmp_path).read(NAMES[1]).header.metadata["number"] == "9"


@pytest.mark.parametrize(
    "index", ["missing", "damaged", "of another folder", "older", "changed row", "rows gone"]
)
def test_an_index_that_cannot_be_used_is_replaced(folder: Path, tmp_path: Path, index: str) -> None:
    right = (folder / INDEX).read_bytes()
    store = ShardStore(tmp_path / "other")
    fill(store, ODD)
    store.settle()
    if index == "missing":
        (folder / INDEX).unlink()
    elif index == "damaged":
        (folder / INDEX).write_bytes(right[:-40])
    elif index == "older":
        more = ShardStore(folder)
        fill(more, ODD)
        more.settle()
        more = ShardStore(folder)
        for name in ODD:
            more.remove(name)
        index_then = (folder / INDEX).read_bytes()
        more.settle()
        (folder / INDEX).write_bytes(index_then)
    elif index == "rows gone":  # one changed byte of its footer can say that there are fewer
        rows = pq.read_table(folder / INDEX, use_threads=False)
        pq.write_table(rows.slice(0, len(rows) - 2), folder / INDEX)
    elif index == "changed row":
        data = bytearray(right)
        data[60] ^= 1
        (folder / INDEX).write_bytes(data)
    else:
        (folder / INDEX).write_bytes((tmp_path / "other" / INDEX).read_bytes())
    assert set(NAMES) <= set(ShardStore(folder).names())
    for name in set(ShardStore(folder).names()) - set(NAMES):
        ShardStore(folder).remove(name)  # an older index lists what was removed, as lost
    store = ShardStore(folder)
    for name in set(store.names()) - set(NAMES):
        store.remove(name)
    store.settle()
    assert (folder / INDEX).read_bytes() == right
    assert whole(folder) == NAMES


def damages(size: int, step: int) -> Iterator[tuple[str, int]]:
    for place in range(0, size, step):
        yield "flip", place
    for place in range(1, size, 2 * step):
        yield "cut", place
        yield "take out", place


@pytest.mark.parametrize("step", [3001, pytest.param(131, marks=pytest.mark.slow)])
@pytest.mark.parametrize("has_index", [True, False])
def test_damage_costs_only_what_it_touches_and_is_noticed(folder: Path, has_index: bool, step: int) -> None:
    path = shard(folder)
    right = contents(folder)
    data = right[path.name]
    with path.open("rb") as file:
        records = [one for one in read_records(file, len(data)) if isinstance(one, ShardRecord)]
    for how, place in damages(len(data), step):
        damaged = bytearray(data)
        if how == "flip":
            damaged[place] ^= 0x10
            touched = {one.name for one in records if one.start <= place < one.end}
        elif how == "cut":
            del damaged[place:]
            touched = {one.name for one in records if one.end > place}
        else:
            del damaged[place : place + 100]
            touched = {one.name for one in records if one.start < place + 100 and place < one.end}
        path.write_bytes(damaged)
        if not has_index:
            (folder / INDEX).unlink(missing_ok=True)
        alive = set(whole(folder))
        assert set(NAMES) - touched <= alive, (how, place)
        for name in alive:
            assert ShardStore(folder).read_bytes(name) == data_of(records, data, name)
        store = ShardStore(folder)
        gone = set(NAMES) - alive
        # training reads what the names promise, and asks for faults first
        assert not gone or store.faults() or gone <= set(store.names())
        for name in gone:
            store.write(name, *again(name))
        store.settle()
        assert ShardStore(folder).faults() == []
        if how != "flip" or gone:
            assert contents(folder) == right, (how, place)
        assert whole(folder) == NAMES
        for name in contents(folder):
            (folder / name).unlink()
        for name, content in right.items():
            (folder / name).write_bytes(content)


def data_of(records: list[ShardRecord], data: bytes, name: str) -> bytes:
    (one,) = (one for one in records if one.name == name)
    return data[one.offset : one.offset + one.length]


def again(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    number = NAMES.index(name)
    return tensors(number), meta(number)


def test_what_a_cut_took_is_remembered_until_it_is_made_again(folder: Path) -> None:
    path = shard(folder)
    os.truncate(path, path.stat().st_size // 2)
    ShardStore(folder).settle()  # a run that makes none of these
    store = ShardStore(folder)
    assert "3 entries with them, such as clip_3" in store.faults()[-1]
    assert store.names() == set(NAMES)
    with pytest.raises(CacheError, match=r"clip_3.*: damaged, its shard was cut or removed"):
        store.read(NAMES[3])
    fill(store, NAMES[3:5], start=3)
    store.remove(NAMES[5])
    store.settle()
    assert ShardStore(folder).faults() == []
    assert whole(folder) == NAMES[:5]


def test_a_shard_that_was_deleted_is_missed(folder: Path) -> None:
    shard(folder).unlink()
    assert "6 entries with them" in ShardStore(folder).faults()[0]


def test_readers_go_on_while_shards_are_merged(folder: Path) -> None:
    reader, writer = ShardStore(folder), ShardStore(folder)
    reader.read(NAMES[0])
    for number in range(3):
        fill(writer, [f"more_{number}"])
        writer.settle()
        assert [reader.read(name).header.metadata["number"] for name in NAMES] == list("012345")
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(NAMES[1]).header.metadata == reader.read(NAMES[1]).header.metadata


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_an_error_and_the_store_stays_whole(folder: Path) -> None:
    import resource

    before = contents(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = ShardStore(folder)
    store.write("more", tensors(1), meta(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (7000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot be written"):
            store.write_bytes("too much", bytes(9000))
        store.write_bytes("little", b"")
        with pytest.raises(OutputError, match=r"cannot be written"):
            store.settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before.items() <= contents(folder).items()
    assert whole(folder) == sorted([*NAMES, "more"])
    ShardStore(folder).settle()
    assert ShardStore(folder).names() == {*NAMES, "more", "little"}


def test_names_that_lead_elsewhere_are_no_entries(tmp_path: Path) -> None:
    from dataset.cache.tar_records import padded

    data = b"harmless"
    header = record_header("../evil", RecordKind.ENTRY, 0, len(data))
    record = header + data + bytes(padded(len(data)) - len(data))
    (tmp_path / f"cache-{'0' * 16}.tar").write_bytes(record + END)
    assert ShardStore(tmp_path).names() == set()


def test_a_tar_of_other_files_has_no_entries(tmp_path: Path) -> None:
    (tmp_path / "notes").write_bytes(b"mine")
    path = tmp_path / f"cache-{'0' * 16}.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(tmp_path / "notes", "notes")
    assert ShardStore(tmp_path).names() == set()
    assert ShardStore(tmp_path).faults()
    with path.open("rb") as file:
        assert list(read_records(file, path.stat().st_size)) == [Ending(0, is_finished=False)]


@pytest.mark.parametrize("same", ["name", "start", "nothing"])
def test_a_shard_that_a_killed_container_left_is_merged_at_once(
    folder: Path, same: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = machine().split()
    begun = {"name": [words[0], "0" * 8], "start": ["0" * 8, words[1]], "nothing": ["0" * 8, "1" * 8]}
    store = ShardStore(folder)
    with monkeypatch.context() as there:
        there.setattr(tar_records, "machine", lambda: " ".join(begun[same]))
        fill(store, ODD[:1])
    del store  # without an end, and without its lock
    ShardStore(folder).settle()
    assert len(list_shards(folder)) == (2 if same == "nothing" else 1)
    assert whole(folder) == sorted([*NAMES, ODD[0]])


# --- kills
# ------------------------------------------------------------------------------------------------------------

State = dict[str, int]


def steps(count: int) -> list[tuple[str, str, int]]:
    chance = random.Random(5)
    found = []
    for number in range(count):
        kind = chance.choices(["write", "remove", "replace", "settle"], [6, 2, 1, 2])[0]
        found.append((kind, chance.choice(NAMES), number))
    return found


def take(store: ShardStore, step: tuple[str, str, int]) -> None:
    kind, name, number = step
    if kind == "write":
        store.write(name, tensors(number), meta(number))
    elif kind == "remove":
        store.remove(name)
    elif kind == "replace":
        store.replace(name, NAMES[0] + ".part", tensors(number), meta(number))
    elif kind == "settle":
        store.settle()


def after(state: State, step: tuple[str, str, int], halfway: bool = False) -> State:
    kind, name, number = step
    state = dict(state)
    if kind == "write":
        state[name] = number
    elif kind == "remove":
        state.pop(name, None)
    elif kind == "replace":
        state[NAMES[0] + ".part"] = number
        if not halfway:
            state.pop(name, None)
    return state


def seen(folder: Path) -> State:
    store = ShardStore(folder)
    return {name: int(store.read(name).header.metadata["number"]) for name in store.names()}


@needs_fork
@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_what_was_acknowledged_survives_kills(tmp_path: Path, kills: int) -> None:
    plan, chance = steps(40 * kills), random.Random(kills)
    done, state = 0, State()
    for _ in range(kills):

        def work(acknowledge, start: int = done) -> None:  # type: ignore[no-untyped-def]
            store = ShardStore(tmp_path)
            for step in plan[start:]:
                take(store, step)
                acknowledge()

        count, is_over = run_and_kill(work, chance.uniform(0.02, 0.2))
        for step in plan[done : done + count]:
            state = after(state, step)
        done += count
        found = seen(tmp_path)
        if found != state:
            assert not is_over
            assert found in (after(state, plan[done]), after(state, plan[done], halfway=True))
        state = found
    store = ShardStore(tmp_path)
    store.settle()
    assert seen(tmp_path) == state
    assert store.faults() == []
    undisturbed = ShardStore(tmp_path / "undisturbed")
    for name, number in state.items():
        undisturbed.write(name, tensors(number), meta(number))
    undisturbed.settle()
    assert contents(tmp_path / "undisturbed") == contents(tmp_path)
    assert done >= kills // 4
    assert open_catalog(tmp_path).has_index


@needs_fork
@pytest.mark.parametrize("rounds", [1, pytest.param(25, marks=pytest.mark.slow)])
def test_several_writers_lose_nothing_when_some_are_killed(tmp_path: Path, rounds: int) -> None:
    chance = random.Random(rounds)
    for number in range(rounds):
        folder = tmp_path / str(number)
        counts: dict[int, tuple[int, bool]] = {}

        def write(writer: int, acknowledge, folder: Path = folder) -> None:  # type: ignore[no-untyped-def]
            store, order = ShardStore(folder), random.Random(writer)
            for step in range(12):
                store.write(f"of_{writer}_{step}", tensors(step), meta(step))
                store.write(f"shared_{step}", tensors(step), meta(step))
                store.write(f"shared_{step}.part", tensors(step), meta(step))
                store.remove(f"shared_{step}.part")
                acknowledge()
                if order.random() < 0.3:
                    store.settle()
            store.settle()

        def run(writer: int, seconds: float, counts=counts, write=write) -> None:  # type: ignore[no-untyped-def]
            counts[writer] = run_and_kill(lambda acknowledge: write(writer, acknowledge), seconds)

        times = [chance.uniform(0.1, 0.5), chance.uniform(0.1, 0.5), 2.0]
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
                ShardStore(folder).settle()
        assert ShardStore(folder).faults() == []
        assert len(contents(folder)) == 2


@needs_fork
def test_a_merge_that_stops_at_any_step_brings_nothing_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    fill(ShardStore(source), NAMES)
    # what was replaced, removed and written again lies in shards whose names are chance
    for change in ("replace", "remove", "again", "remove more"):
        store = ShardStore(source)
        if change == "replace":
            fill(store, NAMES[:4], start=10)
        elif change == "again":
            fill(store, NAMES[:2], start=20)
        else:
            for name in NAMES[: 2 if change == "remove" else 1]:
                store.remove(name)
        store.finish()
    state = seen(source)
    assert len(state) == len(NAMES) - 1
    step, is_done = 0, False
    while not is_done:
        step += 1
        folder = tmp_path / str(step)
        shutil.copytree(source, folder)
        is_done = run_to_step(ShardStore(folder).settle, step)
        assert seen(folder) == state, step
        ShardStore(folder).settle()
        assert seen(folder) == state, step
        assert contents(folder) == contents(tmp_path / "1")
    assert step > 6
