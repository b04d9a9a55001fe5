"""--show_timesteps in the console and as a picture."""

from pathlib import Path

import pytest
import torch

from modules.media.reading import read_image
from tests.training.data.test_timesteps import TWO, options
from training.previews import bars, show_timesteps, timestep_statistics


def test_statistics_count_every_draw_once() -> None:
    counts, weights = timestep_statistics(
        options("--weighting_scheme", "sigma_sqrt"), seed=0, num_batches=3, batch_size=100
    )

    assert float(counts.sum()) == 300
    assert counts.shape == weights.shape == (1000,)
    assert torch.isfinite(weights).all()


def test_the_console_shows_forty_bars_for_counts_and_weights(capsys: pytest.CaptureFixture[str]) -> None:
    show_timesteps(options("--show_timesteps", "console", "--timestep_sampling", "uniform"))

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 82
    assert max(line.count("#") for line in lines) == 64
    assert bars(torch.ones(1000)).splitlines()[39].startswith(" 975.. 999       1.00 ####")


def test_experts_are_named_with_their_share_of_the_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in ("console", "image"):
        made = options("--show_timesteps", kind, "--timestep_sampling", "uniform")
        show_timesteps(made, folder=tmp_path, experts=TWO)
        said = capsys.readouterr().out
        assert "low-noise transformer: timesteps from 0 to 875, 87." in said
        assert "high-noise transformer: timesteps from 875 to 1000, 12." in said
    plain, marked = tmp_path / "plain", read_image(tmp_path / "timesteps.png")
    assert marked.shape == (700, 1000, 3)
    show_timesteps(made, folder=plain)
    assert (read_image(plain / "timesteps.png") != marked).any()  # the line at the boundary
