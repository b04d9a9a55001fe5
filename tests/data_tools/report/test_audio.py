"""What --check and the report say of the sound of clips."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from data_tools.report.check import check_caching, check_training
from data_tools.report.findings import TableFindings
from data_tools.report.page import write_check_page
from dataset.batches.items import NO_COMMANDS
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig
from tests.dataset.making import make_table
from tests.dataset.sound_toy import HearingToy
from tests.dataset.toy_family import LATENT, ToyFamily, options
from tests.sound_media import Track, write_media
from tools import dataset_report

PLAIN = dataclasses.replace(LATENT, in_sections=False)


@pytest.fixture
def config(tmp_path: Path) -> DatasetConfig:
    for stem, tracks in {
        "fits": [Track((0.04, 1.0))],
        "late": [Track((0.04,), seconds=1.6, start=0.4)],
        "long": [Track((0.04,), seconds=3, rate=44100, layout="mono")],
        "short": [Track((0.04,), seconds=1)],
        "silent": [],
        "two": [Track((0.04,)), Track((0.04,))],
    }.items():
        write_media(tmp_path / f"{stem}.mp4", *tracks)
        (tmp_path / f"{stem}.txt").write_text(stem, encoding="utf-8")
    table = make_table(tmp_path, resolution=(32, 32), target_frames=(9,), caption_extension=".txt")
    return DatasetConfig(table.config_path, (table,))


def change(config: DatasetConfig, **changes: str) -> DatasetConfig:
    return DatasetConfig(config.path, tuple(one.with_values(**changes) for one in config.datasets))


def test_sounds_have_no_size(config: DatasetConfig) -> None:
    found = TableFindings(config.datasets[0].with_values(is_audio_only=True), "2 sounds")
    found.add_items(["a", "b"], (64, 64, 25))
    assert found.lines() == ["2 sounds", "  25 frames: 2 items x 1, 2 batches of 1"]


def test_a_check_says_which_clips_have_sound_and_where_it_does_not_fit(config: DatasetConfig) -> None:
    family = HearingToy(latent=PLAIN)

    found = check_caching(family, config, 1, False)

    (table,) = found.tables
    assert table.info_lines[1:] == [
        "sound: 5 of 6 clips have it: 4 with 2 channels at 48000 Hz, 1 with 1 channel at 44100 Hz",
        "caches of sound: 0 files are valid, 5 items need encoding",
    ]
    told = {error.stem: error.text.rpartition(".mp4: ")[2] for error in table.warnings if error.stem}
    assert told == {
        "late": "its sound: begins 0.38 s late",  # with what the decoder needs to start
        "long": "its sound: continues for 1.00 s, which are cut off",
        "short": "its sound: ends 1.00 s early",
        "silent": "it has no audio track",
        "two": "its sound: 2 tracks, and FFmpeg selects one",
    }
    assert found.exit_code == 0
    required = check_caching(family, change(config, audio="required"), 1, False)
    assert [error.stem for error in required.tables[0].errors] == ["silent"]
    cache_media(family, config, options())
    again = check_caching(family, config, 1, False).tables[0].info_lines
    assert again[0] == "caches: 6 files are valid, 0 items need encoding"
    assert again[-1] == "caches of sound: 5 files are valid, 0 items need encoding"
    for other in (
        check_caching(ToyFamily(latent=PLAIN), config, 1, False),
        check_caching(family, change(config, audio="ignore"), 1, False),
    ):
        assert not any("sound" in line for line in other.tables[0].info_lines)


def test_a_check_of_training_says_which_caches_of_sound_are_missing(config: DatasetConfig) -> None:
    family = HearingToy(latent=PLAIN)
    cache_media(family, config, options())
    cache_texts(family, config, options())

    def faults(config: DatasetConfig) -> list[tuple[str, str]]:
        (table,) = check_training(config, "toy", PLAIN, NO_COMMANDS, audio=family.audio).tables
        return [(one.kind, Path(one.text.split(": ")[0]).name) for one in table.errors]

    name = "silent_00000-009_0032x0032_toy_audio.safetensors"
    assert faults(config) == []
    assert faults(change(config, audio="required")) == [
        ('caches of sound are missing, and audio = "required"', name)
    ]


def test_pages_draw_the_sound(config: DatasetConfig, tmp_path: Path) -> None:
    family, page = HearingToy(latent=PLAIN), tmp_path / "page.html"
    result = check_caching(family, config, 1, False)

    write_check_page(page, config, result, PLAIN, 16, 10, 1, with_audio=True)

    text = page.read_text(encoding="utf-8")
    assert text.count('<svg class="wave"') == 5
    # of 300 bars for the 9 frames that are used, those of the second frame's click are loud
    path = re.search(r'id="file-1-0".*?class="wave".*? d="([^"]*)"', text, re.DOTALL)
    assert path is not None
    heights = [float(one) for one in re.findall(r"v([\d.]+)", path[1])]
    loud = [place for place, height in enumerate(heights) if height > 15]
    assert len(heights) == 300
    assert 33 in loud
    assert max(loud) - min(loud) < 10
    assert "1 channel at 44100 Hz" in text
    write_check_page(page, config, result, PLAIN, 16, 10, 1)
    assert '<svg class="wave"' not in page.read_text(encoding="utf-8")


def test_the_report_counts_sound(config: DatasetConfig, tmp_path: Path) -> None:
    page, numbers = tmp_path / "r.html", tmp_path / "r.json"

    dataset_report.main(["--dataset_config", str(config.path), "--output", str(page), "--json", str(numbers)])

    assert json.loads(numbers.read_text(encoding="utf-8"))["sound"] == {
        "clips": 5,
        "without": 1,
        "remarks": 4,
        "tracks": [
            {"rate": 48000, "channels": 2, "count": 4},
            {"rate": 44100, "channels": 1, "count": 1},
        ],
    }
    text = page.read_text(encoding="utf-8")
    assert "5 clips have it, 1 has none; of 4 it does not fit" in text
    assert text.count('<svg class="wave"') == 5
