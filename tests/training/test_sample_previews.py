"""Previews of samples while they are made: beside them; nothing of the training depends on them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blissful_tuner.taehv import TaehvConfig
from modules.errors import CheckpointError, OptionError
from modules.media.reading import video_info
from tests.tiny.taehv import write_taehv
from tests.training.toy import LATENT, ToyFamily, same, toy_options, train_toy, write_caches
from training.run import train_network

COLOURED = replace(LATENT, preview_factors=((1.0, 0.5, 0.0), (0.0, 0.5, 1.0)))
PROMPT = "a cat --w 32 --h 32 --f 9 --d 11 --s 4\na picture --w 32 --h 32 --d 12 --s 3\n"


def write_prompts(folder: Path) -> Path:
    path = folder / "prompts.txt"
    path.write_text(PROMPT, encoding="utf-8")
    return path


def test_samples_have_previews_and_the_training_is_the_same(tmp_path: Path) -> None:
    trained, samples = [], []
    taehv = write_taehv(tmp_path / "taehv.pth", TaehvConfig(2, (8, 8, 8, 8), (1, 2, 2)))
    every = ["--preview_latent_every", 1]
    kinds = {"plain": [], "colours": every, "decoded": [*every, "--preview_vae", taehv]}
    for name, more in kinds.items():
        folder = tmp_path / name
        folder.mkdir()
        write_caches(folder)
        decoded: list[torch.Tensor] = []
        family = ToyFamily(on_decode=decoded.append, latent=COLOURED)
        samples_at = ["--sample_prompts", write_prompts(folder), "--sample_every_n_steps", 4]
        trained.append(train_toy(folder, *samples_at, *more, family=family))
        samples.append(decoded)

    assert same(trained[0], trained[1])
    assert same(trained[0], trained[2])
    assert all(torch.equal(one, other) for one, other in zip(samples[0], samples[1], strict=True))
    assert all(torch.equal(one, other) for one, other in zip(samples[0], samples[2], strict=True))
    made = tmp_path / "colours" / "output" / "sample"
    assert {path.name for path in made.glob("latent_preview.*")} == {
        "latent_preview.mp4",
        "latent_preview.png",
    }
    assert len(list(made.iterdir())) == 2 + len(list((tmp_path / "plain/output/sample").iterdir()))
    assert (video_info(made / "latent_preview.mp4").frames, video_info(made / "latent_preview.mp4").fps) == (
        3,
        4.0,
    )
    assert video_info(tmp_path / "decoded/output/sample/latent_preview.mp4").frames == 9


def test_a_file_for_other_latents_ends_the_run_before_the_network_is_loaded(tmp_path: Path) -> None:
    write_caches(tmp_path)
    taehv = write_taehv(tmp_path / "taehv.pth")
    more = ["--sample_prompts", write_prompts(tmp_path), "--sample_at_first", "--preview_latent_every", 1]
    family = ToyFamily(latent=COLOURED)
    with pytest.raises(CheckpointError, match="decodes 16 channels"):
        train_network(family, toy_options(tmp_path, *more, "--preview_vae", taehv))
    assert family.passes == []
    with pytest.raises(OptionError, match="--preview_vae .*lost.pth: no such file"):
        toy_options(tmp_path, *more, "--preview_vae", tmp_path / "lost.pth")
