"""--show_timesteps in the console and as a picture."""

from pathlib import Path

import pytest
import torch

from modules.media.reading import read_image
from tests.training.data.test_timesteps import options
from training.data.shown_timesteps import bars, show_timesteps, timestep_statistics


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


def test_the_image_is_written_into_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_timesteps(options("--show_timesteps", "image"), folder=tmp_path)

    assert read_image(tmp_path / "timesteps.png").shape == (700, 1000, 3)
    assert "timesteps.png" in capsys.readouterr().out
