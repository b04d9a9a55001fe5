"""Caches that were made by different encoders and are trained on together are told of, once."""

from pathlib import Path

from data_tools.report.check import check_training
from dataset.batches.items import CachingCommands, find_items
from dataset.batches.reading import read_batch
from dataset.batches.same_encoders import SameEncoders
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig
from tests.dataset.caching.test_loop import make_config
from tests.dataset.toy_family import LATENT, ToyFamily, ToyText, options

COMMANDS = CachingCommands("python cache_latents.py --x", "python cache_text.py --y")
ONE, OTHER = "1a2b3c4d" * 4, "99887766" * 4


def cached(
    folder: Path, media: dict[str, str], other_media: dict[str, str], other_text: str = "first"
) -> DatasetConfig:
    """Two clips, of which the second's caches were made by other encoders."""
    config = make_config(folder)
    second = ToyFamily(media_identity=other_media, text=[ToyText(identity={"t5": other_text})])
    for family in (ToyFamily(media_identity=media), second):
        kept = {path: path.read_bytes() for path in (folder / "cache").glob("clip_0*")}
        cache_media(family, config, options())
        cache_texts(family, config, options())
        for path, content in kept.items():
            path.write_bytes(content)
    return config


def said_of(config: DatasetConfig) -> list[str]:
    """What is said when each item is read twice."""
    encoders = SameEncoders(COMMANDS)
    items = find_items(config, "toy", LATENT).items
    assert len(items) == 2
    found = [encoders.difference(read_batch([item], LATENT).made_by) for item in [*items, *items]]
    return [said for said in found if said is not None]


def test_what_differs_is_told_once_with_a_file_of_each_and_what_to_do(tmp_path: Path) -> None:
    config = cached(tmp_path, {"vae": ONE, "tile": "None"}, {"vae": OTHER, "tile": "None"})
    (said,) = said_of(config)
    assert said.splitlines() == [
        "Not all caches were made by the same encoders:",
        f"  {tmp_path / 'cache' / 'clip_0_00000-005_0032x0032_toy.safetensors'}: vae 1a2b3c4d...",
        f"  {tmp_path / 'cache' / 'clip_1_00000-005_0032x0032_toy.safetensors'}: vae 99887766...",
        "  Unless the encoders' files hold the same network, the model learns a mixture that fits neither. "
        "To make all caches alike, cache again with:",
        "  python cache_latents.py --x",
    ]


def test_another_dtype_is_no_other_network(tmp_path: Path) -> None:
    config = cached(
        tmp_path, {"vae": ONE, "vae_dtype": "bfloat16"}, {"vae": ONE, "vae_dtype": "float16", "clip": OTHER}
    )
    (said,) = said_of(config)
    assert "clip_0_00000-005_0032x0032_toy.safetensors: vae_dtype bfloat16" in said
    assert "clip_1_00000-005_0032x0032_toy.safetensors: vae_dtype float16" in said
    assert "Their values differ slightly." in said


def test_check_says_it_and_finds_nothing_wrong(tmp_path: Path) -> None:
    result = check_training(cached(tmp_path, {"vae": ONE}, {"vae": OTHER}), "toy", LATENT, COMMANDS)
    assert "  Not all caches were made by the same encoders:" in result.lines
    assert result.exit_code == 0
