"""A whole model that is split over processes: its weights and states are those of one process with as many
micro-batches a step.
"""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from modules.errors import CheckpointError, OptionError
from tests.commands import run_in_processes
from tests.test_shard_base import with_slow
from tests.training import toy
from tests.training.test_fine_tuning import BF16, OPTIMIZERS, initial_weights, require_package
from training.saving.states import CHECKSUM, FILE, file_checksum

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")

UNCLIPPED = ("--max_grad_norm", 0)
STEP = 3  # of the state that others go on from


def train(folder: Path, count: int, output: str, *words: object, **place: Any) -> dict[str, Tensor]:
    """Train the toy in several processes, with two micro-batches a step; return the model that it saves."""
    default = (
        "--output_dir",
        folder / output,
        "--overwrite",
        "--gradient_accumulation_steps",
        2 // count or 1,
    )
    if count == 1:
        return toy.train_toy(folder, *default, *words, full_dit=True)
    environment = {"TOY_WHOLE_DIT": "1", **place.pop("environment", {})}
    script = "tests/training/train_toy.py"
    run_in_processes(count, script, folder, *default, *words, folder=folder, environment=environment, **place)
    path = folder / output / "x.safetensors"
    return load_file(path) if path.exists() else {}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips: the second process lacks a micro-batch at the end of each epoch."""
    folder = tmp_path_factory.mktemp("split")
    toy.write_caches(folder)
    return folder


FREE = [["AdamWScheduleFree"], ["RAdamScheduleFree"], ["SGDScheduleFree"]]
WAYS = {
    f"{' '.join(words)}{end}": (words, precision)
    for words in (*OPTIMIZERS, *FREE)
    for end, precision in (("", ()), (" bf16", BF16))
}


@pytest.mark.slow_cases("Adafactor bf16")
@pytest.mark.parametrize("way", with_slow(WAYS, {"AdamWScheduleFree"}))
def test_the_model_is_that_of_one_process(caches: Path, way: str) -> None:
    """To the bit, also what a resumed run saves."""
    (kind, *arguments), precision = WAYS[way]
    require_package(kind)
    words = (*UNCLIPPED, *precision, "--optimizer_type", kind, "--save_every_n_steps", STEP, "--save_state")
    words += ("--optimizer_args", *arguments) if arguments else ()
    expected = train(caches, 1, "whole", *words)

    assert toy.same(train(caches, 2, "split", *words, "--shard_base"), expected)
    resume = ("--resume", caches / "split" / f"x-step{STEP:08d}-state")
    assert toy.same(train(caches, 2, "split", *words, "--shard_base", *resume), expected)
    assert not torch.equal(expected["embed.weight"].float(), initial_weights()["embed.weight"])


@pytest.mark.slow
def test_weights_in_uneven_parts_are_clipped_together(caches: Path) -> None:
    """Three processes: norms and gradients are summed in a different order than in one."""
    words = ("--max_grad_norm", 0.1, "--optimizer_type", "SGD", "--learning_rate", 1)
    words += ("--trainable_modules", "blocks.1", "head")
    expected = train(caches, 1, "whole", *words, "--gradient_accumulation_steps", 3)

    found = train(caches, 3, "split", *words, "--shard_base")

    for name, start in initial_weights().items():
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6)
        assert torch.equal(found[name], start) != name.startswith(("blocks.1", "head"))


AVERAGED = (*UNCLIPPED, "--ema_decay", "0.9", "--save_state")


@pytest.mark.slow_cases("counts1")
@pytest.mark.parametrize("counts", with_slow([(2, 2, 2), (2, 1, 2), (1, 2, 1)], {(2, 1, 2)}))
def test_a_run_goes_on_in_any_number_of_processes(caches: Path, counts: tuple[int, ...]) -> None:
    expected = train(caches, 1, "whole", *AVERAGED)

    for part, count in enumerate(counts):
        resume = ("--resume", "latest-or-fail") if part else ()
        shares = ("--shard_base",) if count > 1 else ()
        steps = ("--max_train_steps", (3, 6, 8)[part])
        found = train(caches, count, f"parts {counts}", *AVERAGED, *shares, *resume, *steps)

    assert toy.same(found, expected)
    averages = (load_file(caches / name / "x-ema.safetensors") for name in ("whole", f"parts {counts}"))
    assert toy.same(*averages)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["head", "blocks.0"])
def test_a_model_of_which_a_part_learns_goes_on(caches: Path, name: str) -> None:
    """Also if nothing that learns is split."""
    words = (*AVERAGED, "--trainable_modules", name)
    expected = train(caches, 1, "whole", *words)

    train(caches, 2, f"some {name}", *words, "--shard_base", "--max_train_steps", STEP)
    found = train(caches, 2, f"some {name}", *words, "--shard_base", "--resume", "latest-or-fail")

    assert toy.same(found, expected)


def test_a_kill_while_a_state_is_written_leaves_the_one_before(caches: Path) -> None:
    words = (*UNCLIPPED, "--save_every_n_steps", STEP, "--save_state", "--shard_base")
    expected = train(caches, 2, "undisturbed", *words)

    train(caches, 2, "killed", *words, code=-9, environment={"TOY_KILL_AT": "2"})

    left = sorted(entry.name for entry in (caches / "killed").iterdir() if entry.is_dir())
    assert left[-1] == "x-step00000003-state"
    assert all(name.startswith(".x-step00000006-state.") for name in left[:-1])
    assert toy.same(train(caches, 2, "killed", *words, "--resume", "latest-or-fail"), expected)
    assert not list((caches / "killed").glob(".x-*"))


# --- states from elsewhere
# ------------------------------------------------------------------------------------------------------------

INFO = "DCP_SHARDING_INFO"


class Marker:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def made(caches: Path) -> Path:
    """A state of two processes."""
    train(caches, 2, "made", "--save_state", "--shard_base", "--max_train_steps", 2)
    return caches / "made" / "x-state"


def seal(folder: Path) -> None:
    """Make the checksums right again."""
    content = torch.load(folder / FILE, weights_only=True)
    content["files"] = {path.name: file_checksum(path) for path in folder.glob("*.safetensors")}
    torch.save(content, folder / FILE)
    (folder / CHECKSUM).write_text(f"{file_checksum(folder / FILE):08x}\n", encoding="utf-8")


def change(file: Path, offsets: dict[str, list[int]], tensors: dict[str, Tensor] | None = None) -> None:
    """Change what a file says of its rows, or holds."""
    found = load_file(file)
    places = {name: offsets.get(name, [0] * value.ndim) for name, value in found.items()} | offsets
    info = {name: {"saved_offsets": place} for name, place in places.items()}
    save_file({**found, **(tensors or {})}, file, {INFO: json.dumps(info)})


def to_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Marker(file.parent / "marker")))


WEIGHT = "dit/blocks.0.up.weight"
HARM: dict[str, Callable[[Path], Any]] = {
    "pickle": to_pickle,
    "far away": lambda file: change(file, {WEIGHT: [1 << 40, 0]}),
    "another shape": lambda file: change(file, {}, {WEIGHT: torch.zeros(3, 3)}),
    "no such weight": lambda file: change(file, {"dit/x": [0]}, {"dit/x": torch.zeros(3)}),
    "vast moment": lambda file: change(file, {"optimizer/dit.blocks.0.up.weight/exp_avg": [1 << 50, 0]}),
    "no info": lambda file: save_file(load_file(file), file, {INFO: "{}"}),
    "NaN": lambda file: change(file, {}, {WEIGHT: load_file(file)[WEIGHT] * torch.nan}),
}


@pytest.mark.parametrize("what", HARM)
def test_a_harmful_state_is_refused_and_runs_no_code(made: Path, what: str, tmp_path: Path) -> None:
    toy.write_caches(tmp_path)
    state = shutil.copytree(made, tmp_path / "state")
    HARM[what](next(iter(sorted(state.glob("*.safetensors")))))
    for name in (".metadata", "__0_0.distcp"):  # the usual format of torch.distributed.checkpoint
        to_pickle(state / name)
    seal(state)

    with pytest.raises(CheckpointError, match="state"):
        resume_here(tmp_path, state)

    assert not (state / "marker").exists()
    with pytest.raises(AttributeError):  # behind the harm
        FileSystemReader(state).read_metadata()
    assert (state / "marker").exists()


@pytest.mark.parametrize(
    "harm",
    [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x")],
    ids=["missing", "damaged"],
)
def test_rows_that_are_missing_or_damaged_are_noticed(
    made: Path, harm: Callable[[Path], Any], tmp_path: Path
) -> None:
    toy.write_caches(tmp_path)
    state = shutil.copytree(made, tmp_path / "state")
    file = sorted(state.glob("*.safetensors"))[-1]
    harm(file)

    with pytest.raises(CheckpointError, match=file.name):
        resume_here(tmp_path, state)


def resume_here(folder: Path, state: Path) -> None:
    words = ("--resume", state, "--gradient_accumulation_steps", 2)
    toy.train_toy(folder, *words, full_dit=True)


def test_fp16_cannot_be_split(caches: Path) -> None:
    with pytest.raises(OptionError, match="--shard_base with --mixed_precision fp16"):
        toy.toy_options(caches, "--shard_base", "--mixed_precision", "fp16", full_dit=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--optimizer_type Prodigy",
            "--shard_base with --optimizer_type Prodigy: it finds one learning rate",
        ),
        ("--resume FOREIGN", "without --shard_base and save a state"),
        ("--fused_backward_pass", "--fused_backward_pass with 2 processes"),
    ],
)
def test_what_cannot_be_split_is_refused_by_name(caches: Path, words: str, said: str) -> None:
    require_package(words.split()[-1])
    foreign = caches / "foreign"
    foreign.mkdir(exist_ok=True)
    save_file(dict(initial_weights()), foreign / "model.safetensors")
    command = ("tests/training/train_toy.py", caches, "--shard_base")
    given = [word.replace("FOREIGN", str(foreign)) for word in words.split()]
    environment = {"TOY_WHOLE_DIT": "1"}

    for done in run_in_processes(2, *command, *given, folder=caches, environment=environment, code=1):
        assert said in done.stderr
