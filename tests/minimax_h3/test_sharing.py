"""What saves time in a generation of MiniMax-H3: processes that share the work, steps that are skipped."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.commands import run_in_processes
from tests.minimax_h3.test_generation import SCRIPT, generate, latents_in, refuse
from tests.tiny.minimax_h3 import TinyH3, write_tiny_h3

SHORT = ("--video_length", "22", "--allow_experimental_duration", "--output_type", "latent")
EIGHT = ("--infer_steps", "8")
RATIOS = ("--magcache_mag_ratios", "1", *["0.99"] * 7)
CACHES = {
    "MagCache": (*RATIOS, "--magcache_threshold", "100", "--magcache_k", "3"),
    "TeaCache": ("--teacache_threshold", "100", "--teacache_coefficients", "1", "0"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TinyH3:
    return write_tiny_h3(tmp_path_factory.mktemp("h3 shared") / "model")


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """As a share of the largest number."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - one).abs().max() / one.abs().max()) for name, one in expected.items())


@pytest.mark.skipif(sys.platform != "linux", reason="processes are copies of one with libraries")
@pytest.mark.slow
@pytest.mark.parametrize("by", [("--shard_base",), ("--context_parallel", "2")], ids=["blocks", "tokens"])
def test_processes_share_the_work(tmp_path: Path, files: TinyH3, by: tuple[str, ...]) -> None:
    """Tokens of two processes are summed in another order, in float32."""
    words = ("--prompt", "a cat", "--seed", "7", "--infer_steps", "3", "--video_size", "32", "64", *SHORT)

    run_in_processes(2, SCRIPT, *files.words, *words, *by, "--save_path", "shared", folder=tmp_path)

    generate(tmp_path, files, *words)
    assert largest_error(latents_in(tmp_path / "shared"), latents_in(tmp_path / "made")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
def test_step_caches_skip_passes(tmp_path: Path, files: TinyH3, name: str) -> None:
    """What calibration prints belongs to the clip that is made without one."""
    generate(tmp_path, files, *SHORT, *EIGHT, "--save_path", "plain")
    said = generate(tmp_path, files, *SHORT, *EIGHT, *CACHES[name], "--save_path", "skips")
    option = f"--{name.lower()}_calibration"
    measured = generate(tmp_path, files, *SHORT, *EIGHT, option, "--save_path", "measured")

    plain, skips, same = (latents_in(tmp_path / each) for each in ("plain", "skips", "measured"))
    assert f"{name} skipped" in said
    assert largest_error(skips, plain) > 0
    assert all(torch.equal(same[part], latents) for part, latents in plain.items())
    words = {"MagCache": "--magcache_mag_ratios 1.00000", "TeaCache": "--teacache_coefficients"}
    assert words[name] in measured


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--cfg_parallel"], "one pass for each step"),
        (["--preview_latent_every", "1"], "no map from this model's latents to colours"),
        (["--context_parallel", "2"], "accelerate launch"),
    ],
)
def test_what_the_model_has_not_is_refused(
    tmp_path: Path, files: TinyH3, words: list[str], part: str
) -> None:
    assert part in refuse(tmp_path, files, *words, remedy=False)
