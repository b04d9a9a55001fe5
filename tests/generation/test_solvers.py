"""--sample_solver in every family and mode: with fresh noise too, videos are the same alone and together."""

import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modules.errors import OptionError
from modules.media.writing import write_video
from tests.tiny.families import FAMILIES, ONE_OF_EACH, TinyFamily, write_for_anywhere
from tests.tiny.project import moving_square

NOISY = ("lcm", "dpm++sde")
SIZE = ["--video_size", "32", "32", "--infer_steps", "3", "--device", "cpu", "--output_type", "latent"]


@pytest.fixture(scope="module", params=ONE_OF_EACH, ids=lambda one: one.name)
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyFamily:
    family: TinyFamily = request.param
    return write_for_anywhere(family, tmp_path_factory.mktemp("project"))


def run(family: TinyFamily, folder: Path, *more: object) -> dict[int, Tensor]:
    """The latents of a generation, by seed."""
    words = [*family.generate, *SIZE, "--save_path", str(folder), *map(str, more)]
    importlib.import_module(words[0].removesuffix(".py")).main(words[1:])
    return {
        int(path.name.split("_")[1]): load_file(path)["latent"]
        for path in folder.glob("*_latent.safetensors")
    }


def single(family: TinyFamily, folder: Path, solver: str, seed: int, prompt: str = "a cat") -> Tensor:
    more = ("--prompt", prompt, "--seed", seed, "--sample_solver", solver)
    return run(family, folder / f"{solver}-{seed}", *more)[seed]


@pytest.mark.parametrize("solver", NOISY)
def test_lines_of_a_file_and_of_the_console_equal_single_runs(
    project: TinyFamily, solver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "a cat --d 1\na dog --d 2\n"
    (tmp_path / "lines.txt").write_text(lines, encoding="utf-8")
    alone = single(project, tmp_path, solver, 1), single(project, tmp_path, solver, 2, "a dog")

    of_file = run(
        project, tmp_path / "file", "--from_file", tmp_path / "lines.txt", "--sample_solver", solver
    )
    typed = iter(lines.splitlines())

    def answer(_: str) -> str:
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", answer)
    of_console = run(project, tmp_path / "console", "--interactive", "--sample_solver", solver)

    for found in (of_file, of_console):
        assert torch.equal(found[1], alone[0])
        assert torch.equal(found[2], alone[1])


def hunyuan() -> TinyFamily:
    return next(one for one in FAMILIES if one.name == "hunyuan_video")


@pytest.fixture(scope="module")
def hunyuan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hunyuan")
    hunyuan().prepare(folder)
    write_video(folder / "clip.mp4", moving_square(5, 32, 32, 1), fps=24)
    return folder


@pytest.mark.parametrize(
    ("name", "solver"), [("default", "vanilla"), ("dpm++", "dpm++"), ("dpm++sde", "dpm++sde")]
)
def test_scheduler_is_another_spelling(
    hunyuan_folder: Path, name: str, solver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(hunyuan_folder)
    say = ("--prompt", "a cat", "--seed", 1)
    found = run(hunyuan(), tmp_path / "a", *say, "--scheduler", name)[1]
    assert torch.equal(found, run(hunyuan(), tmp_path / "b", *say, "--sample_solver", solver)[1])
    both = run(hunyuan(), tmp_path / "c", *say, "--sample_solver", solver, "--scheduler", name)
    assert torch.equal(found, both[1])


@pytest.mark.parametrize("solver", ["vanilla", "unipc"])
def test_two_spellings_that_differ_are_refused(solver: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=rf"--scheduler dpm\+\+ is --sample_solver dpm\+\+.*{solver}"):
        run(hunyuan(), tmp_path, "--prompt", "p", "--scheduler", "dpm++", "--sample_solver", solver)
