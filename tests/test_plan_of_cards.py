"""A plan for several cards, from the command line to the command that it ends with."""

import contextlib
import shlex
import sys
from collections.abc import Iterator

import pytest

from tests.commands import ROOT, run_script
from tests.test_shard_base import DEFAULT, RUN, SIZE, Shared
from tests.tiny.wan_dit import tiny_state, write_dit

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a command has slashes")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    made = Shared(DEFAULT, tmp_path_factory.mktemp("planned"))
    write_dit(made.folder / "model", tiny_state("t2v", dim=256, num_layers=4), name="dit")  # of two heads
    with contextlib.chdir(made.folder):
        yield made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "launcher", "more"),
    [
        ("train", "accelerate launch --multi_gpu --num_processes 2", (*RUN, "--output_dir", "planned")),
        ("generate", "python", (*SIZE, "--prompt", "a cat", "--save_path", "planned")),
    ],
)
def test_a_plan_ends_with_the_command_of_a_way_that_fits(
    project: Shared, kind: str, launcher: str, more: tuple[str, ...]
) -> None:
    words = [str(word) for word in (*getattr(project.family, kind), *more)]

    done = run_script(*words, "--plan", "2x24", folder=project.folder)

    lines = done.stdout.rstrip().splitlines()
    (title,) = (line for line in lines if line.startswith("The cheapest that fits"))
    command, *soonest = lines[lines.index(title) + 1 :]
    # all cards make one clip together in another way
    assert soonest[:1] == ([] if kind == "train" else ["A single clip is finished soonest by:"])
    typed = [word.removeprefix(f"{ROOT}/") for word in shlex.split(command)]
    assert typed == [*launcher.split(), *words]
    assert done.stdout.count("  fits  ") == 4  # the transformer has two heads
    assert not (project.folder / "planned").exists()
