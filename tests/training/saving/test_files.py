"""Names, times and retention of saved files; a new training keeps what an earlier one left."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.shard_options import INDEX, MODEL
from checkpoints.shards import SavedForm
from modules.errors import OptionError, OutputError, UserError
from protocols.loading import TensorInfo
from tests.commands import ROOT
from tests.folding_disk import FoldingDisk
from tests.run_pages import find_run_page
from tests.training import toy
from training.run import prepare_run
from training.saving.files import MinuteClock, Names, Saver, find_results, move_earlier_results, reserve_name
from training.saving.states import find_latest, read_state


@dataclass
class Written:
    """A saver that writes a byte, and what it passed on."""

    folder: Path
    published: list[str] = field(default_factory=list)

    def saver(self, words: str) -> Saver:
        def write(_: str, path: Path) -> None:
            path.write_bytes(b"x")

        options, names = toy.toy_options(self.folder, *words.split()).saving, Names(self.folder, "x")
        return Saver(options, names, write, lambda folder: folder.mkdir(exist_ok=True), self)

    def publish(self, path: Path) -> None:
        self.published.append(path.name)

    def publish_state(self, folder: Path) -> None:
        self.published.append(folder.name)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return Written(tmp_path)


def of_steps(*steps: int) -> list[str]:
    return [f"x-step{step:08d}.safetensors" for step in steps]


@pytest.mark.parametrize(
    ("words", "steps", "left"),
    [
        ("--save_every_n_steps 5 --save_last_n_steps 5", (5, 10, 15, 20, 25), (20, 25)),
        ("--save_every_n_minutes 1 --save_last_n_steps 10", (3, 11, 17, 25), (17, 25)),
    ],
    ids=["by step", "by the clock"],
)
def test_files_are_counted_out_by_step(
    written: Written, words: str, steps: tuple[int, ...], left: tuple[int, ...]
) -> None:
    saver = written.saver(words)

    for step in steps:
        saver.save_step(step)

    assert written.names() == of_steps(*left)


def test_states_have_a_retention_of_their_own(written: Written) -> None:
    words = "--save_every_n_epochs 1 --save_last_n_epochs 3 --save_last_n_epochs_state 1 --save_state"
    saver = written.saver(words)

    for epoch in range(1, 6):
        saver.save_epoch(epoch)

    files = [f"x-{epoch:06d}.safetensors" for epoch in (3, 4, 5)]
    assert written.names() == sorted([*files, "x-000005-state"])


def test_retention_touches_nothing_of_other_names(written: Written) -> None:
    others = ["x-2-step00000002.safetensors", "y-step00000002.safetensors", "x-step2.safetensors"]
    others += of_steps(3)
    for name in others:
        (written.folder / name).touch()

    written.saver("--save_every_n_steps 2 --save_last_n_steps 0").save_step(8)

    assert written.names() == sorted([*others, *of_steps(8)])


def test_what_cannot_be_removed_now_goes_later_and_does_not_end_the_run(
    written: Written, caplog: pytest.LogCaptureFixture
) -> None:
    saver = written.saver("--save_every_n_steps 2 --save_last_n_steps 0 --save_state")
    saver.save_step(2)
    (written.folder / ".x-step00000002-state.removed.tmp" / "in the way").mkdir(parents=True)

    saver.save_step(4)

    assert "x-step00000002-state is kept for now" in caplog.text
    assert (written.folder / "x-step00000002-state").exists()
    saver.remove_leftovers()
    saver.save_step(6)
    assert written.names() == ["x-step00000006-state", *of_steps(6)]


def test_what_a_kill_left_behind_goes_with_the_next_save(written: Written) -> None:
    others = ".x2.safetensors.12ab.tmp"
    for name in (*of_steps(2, 4, 6), ".x.safetensors.12ab.tmp", ".x-000001-state.removed.tmp", others):
        (written.folder / name).touch()
    saver = written.saver("--save_every_n_steps 2 --save_last_n_steps 1")

    saver.remove_leftovers()
    saver.save_step(8)

    assert written.names() == [others, *of_steps(8)]


MODEL_OF = {f"w.{number}": torch.full((300,), float(number)) for number in range(3)}  # 1200 bytes each
INFO = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in MODEL_OF.items()}
IN_SHARDS = SavedForm(1500)


def write_shards(path: Path, times: float = 1.0) -> None:
    IN_SHARDS.write(path, INFO, lambda name: times * MODEL_OF[name], {})


def read_shards(folder: Path) -> dict[str, float]:
    """The first number of each tensor, where the index says that it is."""
    places = json.loads((folder / f"{MODEL}{INDEX}").read_text(encoding="utf-8"))["weight_map"]
    assert len(set(places.values())) == len(MODEL_OF)
    return {name: float(load_file(folder / file)[name][0]) for name, file in places.items()}


@pytest.mark.parametrize("words", ["--save_every_n_steps 1 --save_last_n_steps 1", "--save_last_n_epochs 2"])
def test_models_in_folders_expire_with_all_their_files(tmp_path: Path, words: str) -> None:
    """Averages and states too; folders of other names stay."""
    other = tmp_path / "x-step2"
    write_shards(other)
    options = toy.toy_options(tmp_path, *words.split(), "--save_state").saving
    saver = Saver(
        *(options, Names(tmp_path, "x", suffix="")),
        write_file=lambda _, path: write_shards(path),
        write_state=lambda folder: folder.mkdir(),
        publisher=None,
        write_average=lambda _, path: write_shards(path, 2.0),
    )

    for number in range(1, 6):
        saver.save_step(number) if "steps" in words else saver.save_epoch(number)

    kept = ["x-step00000004", "x-step00000005"] if "steps" in words else ["x-000004", "x-000005"]
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {other.name, *(f"{name}{end}" for name in kept for end in ("", "-ema", "-state"))}
    assert read_shards(tmp_path / kept[0]) == {"w.0": 0.0, "w.1": 1.0, "w.2": 2.0}
    assert read_shards(tmp_path / f"{kept[0]}-ema") == {"w.0": 0.0, "w.1": 2.0, "w.2": 4.0}


KILLED = """
import os, sys
from pathlib import Path
from checkpoints import shards
from modules import atomic_write
from tests.training.saving.test_files import write_shards

path, moment = Path(sys.argv[1]), sys.argv[2]
replace, write, calls = atomic_write.replace_file, shards.stream_tensors, []

def write_or_die(*arguments):
    calls.append(1)
    if len(calls) == 2:
        os._exit(9)
    write(*arguments)

def replace_or_die(source, target):
    if target == path:
        os._exit(9)
    replace(source, target)

if moment == "a file":
    shards.stream_tensors = write_or_die
elif moment == "the index":
    shards.write_text = lambda *_: os._exit(9)
else:
    atomic_write.replace_file = replace_or_die
write_shards(path, 3.0)
"""


@pytest.mark.parametrize("moment", ["a file", "the index", "the last name"])
def test_a_kill_while_shards_are_saved_leaves_the_earlier_folder(tmp_path: Path, moment: str) -> None:
    """Between its two names, the earlier one is back as soon as a training looks for it."""
    path = tmp_path / "x"
    write_shards(path)

    killed = subprocess.run([sys.executable, "-c", KILLED, path, moment], cwd=ROOT, check=False)

    assert killed.returncode == 9
    assert path.exists() == (moment != "the last name")
    assert len(list(tmp_path.iterdir())) > 1
    assert find_latest(tmp_path, "x") is None  # it finishes what the killed run has left
    assert read_shards(path) == {"w.0": 0.0, "w.1": 1.0, "w.2": 2.0}
    write_shards(path, 3.0)
    assert read_shards(path) == {"w.0": 0.0, "w.1": 3.0, "w.2": 6.0}
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("", ["x.safetensors"]),
        ("--save_state", ["x-state", "x.safetensors"]),
        ("--save_state_on_train_end", ["x-state", "x.safetensors"]),
    ],
)
def test_a_state_is_saved_at_the_end_where_it_is_asked_for(
    written: Written, words: str, names: list[str]
) -> None:
    written.saver(words).save_final()

    assert written.names() == sorted(written.published) == names


def test_saves_by_the_clock_come_after_so_many_minutes() -> None:
    now = 0.0
    clock = MinuteClock(2, lambda: now)
    now = 119.0
    assert not clock.is_due()
    now = 120.0
    assert clock.is_due()
    clock.restart()
    assert not clock.is_due()


def test_files_are_named_by_epoch_and_step_and_say_where_the_run_stood(tmp_path: Path) -> None:
    toy.write_caches(tmp_path, count=4)
    toy.train_toy(tmp_path, "--save_every_n_epochs", 1, "--save_every_n_steps", 3, "--save_state")

    told = {path.stem: toy.metadata_of(path) for path in (tmp_path / "output").glob("*.safetensors")}
    # eight steps are two epochs; the last is not an epoch file
    assert {name: (each["ss_steps"], each["ss_epoch"]) for name, each in told.items()} == {
        "x-step00000003": ("3", "1"),
        "x-000001": ("4", "1"),
        "x-step00000006": ("6", "2"),
        "x": ("8", "2"),
    }
    assert {path.name for path in (tmp_path / "output").glob("*-state")} == {f"{name}-state" for name in told}
    assert told["x"]["modelspec.architecture"] == "toy/lora"
    assert told["x"]["ss_num_batches_per_epoch"] == "4"


STATES = ("--save_every_n_steps", 4, "--save_state")
HOLDER = """
import sys, time
from pathlib import Path
from modules.file_locks import only_one
Path(sys.argv[1]).mkdir()
with only_one(Path(sys.argv[1]) / ".x.training.lock", waits=False):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy.write_caches(tmp_path)
    return tmp_path


def results(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if ".before-" not in path.as_posix()}


def asides(folder: Path) -> list[Path]:
    return sorted((folder / "output").glob("x.before-*"))


def save_word(path: Path, name: str, word: str, **texts: str) -> None:
    metadata = {"ss_output_name": name, "ss_train_embedding": word, **texts}
    save_file({"emb_params": torch.zeros(1, 8)}, path, metadata)


def test_words_next_to_loras_are_results_of_their_run(tmp_path: Path) -> None:
    """A page that deletes a run does not know its words, nor does a run that learns another word."""
    of_run = ["x_zorb.safetensors", "x-step00000005_zorb.safetensors", "x-ema_zorb.safetensors"]
    for name in of_run:
        save_word(tmp_path / name, "x", "zorb")
    save_word(tmp_path / "x_blub.safetensors", "x_blub", "blub")
    save_word(tmp_path / "x_lora.safetensors", "x", "zorb")
    save_word(tmp_path / "x-000001_zorb.safetensors", "x", "zorb", ss_network_module="networks.lora")
    (tmp_path / "x_half.safetensors").write_bytes(b"half")

    found = find_results(Names(tmp_path, "x"))

    assert sorted(path.name for path in found) == sorted(of_run)


@pytest.mark.parametrize("is_folding", [False, True])
def test_a_name_in_other_capitals_is_the_same_run_where_the_disk_says_so(
    is_folding: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files would be replaced: those of Windows and macOS are moved aside, elsewhere both are kept."""
    (tmp_path / "sample").mkdir()
    moved = {"cat.safetensors", "cat-000001.safetensors", "sample/cat_000001_00_20260101000000.png"}
    for name in moved:
        (tmp_path / name).touch()
    save_word(tmp_path / "cat_zorb.safetensors", "cat", "zorb")
    (tmp_path / "category.safetensors").touch()
    if is_folding:
        FoldingDisk(monkeypatch)

    aside = move_earlier_results(Names(tmp_path, "Cat"), (), datetime(2026, 1, 1))

    monkeypatch.undo()
    left = {path.name for path in tmp_path.glob("*.safetensors")}
    if not is_folding:
        assert (aside, len(left)) == (None, 4)
        return
    assert aside is not None
    assert left == {"category.safetensors"}
    assert results(aside) == {*moved, "cat_zorb.safetensors"}


@pytest.mark.parametrize(
    ("run", "file", "stem"),
    [
        ("x", "x-step00000005_zorb", "x-step00000005"),
        ("x", "x-ema_zorb", "x-ema"),
        ("x", "x", "x"),
        ("x_zorb", "x_zorb", "x_zorb"),
        ("x_zorb", "x_zorb_zorb", "x_zorb"),
    ],
)
def test_a_word_has_the_stem_of_the_lora_next_to_it(run: str, file: str, stem: str, tmp_path: Path) -> None:
    names = Names(tmp_path, run, embedding_words=("zorb",))
    assert names.get_stem(tmp_path / f"{file}.safetensors") == stem


def test_a_new_training_sets_all_results_of_an_earlier_one_aside(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = folder / "output"
    prompts = toy.write_prompts(folder, "a cat --w 32 --h 32 --f 1 --s 1 --d 1\n")
    samples = ["--sample_prompts", prompts, "--sample_every_n_steps", 4]
    first = toy.train_toy(folder, *STATES, *samples, has_page=True)
    others = {"xy.safetensors", "x_comfy.safetensors"}
    for name in others:
        (output / name).touch()
    find_run_page(output)  # a process of its own draws it
    before = results(output)
    caplog.set_level("INFO")

    second = toy.train_toy(folder, "--seed", 4)

    (aside,) = asides(folder)
    assert results(aside) == before - others
    assert results(output) == {"x.safetensors", *others}
    assert toy.same(load_file(aside / "x.safetensors"), first)
    assert not toy.same(first, second)
    (told,) = (text for text in caplog.messages if str(aside) in text)
    assert "3 states" in told


def test_what_goes_on_or_fails_or_only_shows_moves_nothing(folder: Path) -> None:
    toy.train_toy(folder, *STATES, "--max_train_steps", 4, has_page=True)
    find_run_page(folder / "output")
    before = results(folder / "output")

    toy.train_toy(folder, "--check")
    with pytest.raises(UserError):
        toy.train_toy(folder, "--network_args", "no_such=1")
    assert results(folder / "output") == before
    toy.train_toy(folder, *STATES, "--resume", "latest", has_page=True)

    assert not asides(folder)
    assert before <= results(folder / "output")


def test_a_folder_that_is_removed_meanwhile_holds_no_earlier_results(tmp_path: Path) -> None:
    assert move_earlier_results(Names(tmp_path / "gone", "x"), (), datetime(2026, 1, 1)) is None
    assert find_latest(tmp_path / "gone", "x") is None


def test_a_file_to_start_from_stays_where_the_command_names_it(folder: Path) -> None:
    first = toy.train_toy(folder)
    file = folder / "output" / "x.safetensors"
    with prepare_run(toy.ToyFamily(), toy.toy_options(folder, "--network_weights", file)):
        (aside,) = asides(folder)
        assert file.is_file()
        assert (aside / "x.safetensors").is_file()

    second = toy.train_toy(folder, "--network_weights", file)

    assert len(asides(folder)) == 2
    assert all(toy.same(load_file(aside / "x.safetensors"), first) for aside in asides(folder))
    assert not toy.same(first, second)


def test_a_state_that_was_set_aside_goes_on_and_its_successor_is_set_aside_then(folder: Path) -> None:
    toy.train_toy(folder, *STATES, has_page=True)
    alone = toy.train_toy(folder, *STATES, "--max_train_steps", 12, "--overwrite")
    toy.train_toy(folder, *STATES, has_page=True)  # sets the run of twelve steps aside
    (aside,) = asides(folder)
    third = read_state(folder / "output" / "x-state").progress.session_id

    words = ["--max_train_steps", 12, "--resume", aside / "x-step00000008-state"]
    assert toy.same(toy.train_toy(folder, *words, has_page=True), alone)
    assert (aside / "x-state").is_dir()
    (other,) = set(asides(folder)) - {aside}
    assert read_state(other / "x-state").progress.session_id == third


def test_without_a_state_a_new_run_names_those_set_aside_and_latest_or_fail_ends(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(OptionError, match="there is no state of x in"):
        toy.train_toy(folder, "--resume", "latest-or-fail")
    toy.train_toy(folder, "--save_state")
    toy.train_toy(folder)
    (aside,) = asides(folder)

    with pytest.raises(OptionError, match="x-state: pass it to --resume"):
        toy.train_toy(folder, "--resume", "latest-or-fail")
    toy.train_toy(folder, "--resume", "latest")

    assert f"An earlier run saved {aside / 'x-state'}" in caplog.text


def test_what_a_run_left_that_had_saved_nothing_is_not_kept_when_it_is_started_again(folder: Path) -> None:
    for arguments, count in (["--resume", "latest"], 0), ([], 1):
        with pytest.raises(toy.Killed):
            toy.train_toy(folder, *arguments, family=toy.killed_at(0), has_page=True)
        find_run_page(folder / "output")
        assert len(asides(folder)) == count


def test_the_second_of_two_runs_of_a_name_is_refused_while_the_first_one_lives(folder: Path) -> None:
    output = folder / "output"
    command = [sys.executable, "-c", HOLDER, str(output)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="--output_name x: another training is saving under this name"):
            toy.train_toy(folder)
        assert not (output / "x.safetensors").exists()
        with reserve_name(output, "y"):
            pass
        other.kill()
    toy.train_toy(folder)
