import dataclasses
import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pytest

from data_tools.report.check import check_caching, check_training
from data_tools.report.findings import repair_captions
from data_tools.report.views import show_datasets
from dataset.batches.items import CachingCommands
from dataset.caching.loop import cache_media, cache_texts
from dataset.config import DatasetConfig
from dataset.options import GUESS, DebugOptions
from modules.errors import CheckpointError, OptionError
from modules.media.reading import read_image, video_frames
from protocols.family import EncoderAbilities
from protocols.rules import CountTokens
from tests.dataset.caching.test_loop import change, make_config
from tests.dataset.making import frame_numbers, make_clip, make_image, make_table
from tests.dataset.toy_family import LATENT, ToyFamily, ToyText, options

COMMANDS = CachingCommands(lambda: ("python cache_latents.py --x", "python cache_text.py --y"))


def test_a_sound_dataset_is_described(tmp_path: Path) -> None:
    config = make_config(tmp_path, clips=(9, 9, 12), target_frames=(5, 9), batch_size=2, num_repeats=3)
    family = ToyFamily()
    result = check_caching(family, config, 1, False)
    text = "\n".join(result.lines)
    assert result.exit_code == 0
    assert "3 videos, 6 items" in text
    assert "32x32, 9 frames: 3 items x 3, 5 batches of 2" in text
    assert "10 batches an epoch" in text
    assert "vae: first" in text
    assert "0 files are valid, 6 items need encoding" in text
    assert not (tmp_path / "cache").exists()
    assert family.loaded == 0


def test_without_the_encoder_the_rest_is_checked(tmp_path: Path) -> None:
    class NoFiles:
        """A family whose encoder was not named on the command line."""

        cache_tag, latent, defaults = "toy", LATENT, ToyFamily().defaults
        check_table, sections_of, abilities = (
            ToyFamily().check_table,
            ToyFamily().sections_of,
            ToyFamily().abilities,
        )

        @property
        def media_identity(self) -> dict[str, str]:
            raise OptionError("--vae is missing")

    result = check_caching(cast(Any, NoFiles()), make_config(tmp_path), workers=1, skip_existing=False)
    assert result.exit_code == 0
    assert any("caches are not compared: --vae is missing" in line for line in result.lines)


def test_text_caches_are_counted(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    cache_texts(ToyFamily(), config, options())
    (tmp_path / "clip_0.txt").write_text("new", encoding="utf-8")
    result = check_caching(ToyFamily(), config, 1, False, parts=["texts"])
    assert "  caches of t5: 1 are valid, 1 caption needs encoding" in result.lines
    (tmp_path / "clip_1.txt").unlink()
    assert check_caching(ToyFamily(), config, 1, False, parts=["texts"]).exit_code == 1


def test_text_caches_of_an_encoder_that_sees_the_clip_are_valid(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    family = ToyFamily(text=(ToyText(abilities=EncoderAbilities(encodes_clip=True)),))
    assert cache_texts(family, config, options()).written == 2

    result = check_caching(family, config, 1, False, parts=["texts"])

    assert "  caches of t5: 2 are valid, 0 captions need encoding" in result.lines


class NoTokenizer(ToyText):
    """An encoder whose tokenizer is not on this machine."""

    def token_counter(self) -> CountTokens:
        raise CheckpointError("no tokenizer for t5.safetensors\n  Give --t5_tokenizer a folder.")


def test_a_tokenizer_that_is_downloaded_is_a_fault_offline_where_captions_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, family = make_config(tmp_path), ToyFamily(text=(NoTokenizer(),))
    check = functools.partial(check_caching, family, config, 1, True, parts=["texts"])
    assert check().exit_code == 1
    assert "no tokenizer for t5.safetensors" in "\n".join(check().lines)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert check().exit_code == 0  # a run downloads it
    monkeypatch.undo()
    cache_texts(ToyFamily(), config, options())
    assert check().exit_code == 0  # no caption is left to encode


def test_training_is_told_its_batches_and_steps(tmp_path: Path) -> None:
    config = make_config(tmp_path, num_repeats=5)
    cache_media(ToyFamily(), config, options())
    cache_texts(ToyFamily(), config, options())
    result = check_training(
        config,
        "toy",
        LATENT,
        COMMANDS,
        accumulation=2,
        data_parallel_size=2,
        checkpoint_lines=["--dit: a tiny model"],
    )
    text = "\n".join(result.lines)
    assert result.exit_code == 0
    assert "10 items with repeats, 10 batches, 3 steps" in text
    assert "--dit: a tiny model" in text

    held = check_training(config, "toy", LATENT, COMMANDS, validation=(0.5, 0))
    assert held.tail[:2] == ("An epoch: 5 items with repeats, 5 batches, 5 steps", "For validation: 1 item")
    assert held.num_batches == 5


def test_training_is_told_what_it_cannot_use_and_what_to_run(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    cache_media(ToyFamily(), config, options())
    result = check_training(change(config, resolution=(64, 64)), "toy", LATENT, COMMANDS)
    text = "\n".join(result.lines)
    assert result.exit_code == 1
    assert "2 text caches are missing" in text
    assert "python cache_text.py --y" in text
    cache_texts(ToyFamily(), config, options())
    text = "\n".join(check_training(change(config, resolution=(64, 64)), "toy", LATENT, COMMANDS).lines)
    assert "made for 32x32 pixels" in text


def test_all_faults_of_all_tables_are_reported_in_one_run(tmp_path: Path) -> None:
    config = make_config(tmp_path, clips=(9, 7, 9, 9), target_frames=(5, 9))
    (tmp_path / "clip_0.txt").write_bytes("девушка на улице".encode("cp1251"))
    (tmp_path / "clip_2.txt").unlink()
    (tmp_path / "clip_3.txt").write_text("", encoding="utf-8")
    (tmp_path / "clip_3.mp4").write_bytes(b"")
    (tmp_path / "cover.png").write_bytes(b"x")
    (tmp_path / "nobody.txt").write_text("x", encoding="utf-8")
    absent = config.datasets[0].with_values(index=1, directory=tmp_path / "absent")
    config = dataclasses.replace(config, datasets=(*config.datasets, absent))

    result = check_caching(ToyFamily(), config, 1, False)

    text = "\n".join(result.lines)
    for part in (
        "1 has a caption that cannot be used:",
        "Windows-1251 (Cyrillic): 'девушка на улице'",
        "clip_2.mp4: no clip_2.txt next to it",
        "clip_3.mp4 is empty (0 bytes)",
        "absent: No such file or directory",
        "clip_1.mp4: 7 frames, too few for 9 of target_frames",
        "1 has an empty caption:",
        ": 2 files are not read: ",
        ".png (1): images, for which a table with image_directory is needed",
        ".txt (1): captions of no video",
    ):
        assert part in text
    assert result.lines[-1] == "Something is wrong: see above. Faults: 4. Remarks above: 3."
    assert result.exit_code == 1


DEBUG = DebugOptions(debug_mode="console", console_width=16, console_back=None, console_num_images=None)


@pytest.mark.parametrize(
    ("display", "reason"), [("", "this machine has no display"), (":nowhere", "pip install opencv-python")]
)
def test_pictures_show_frames_from_the_first_to_the_last_and_without_a_window_say_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    display: str,
    reason: str,
) -> None:
    if display and not re.search(r"GUI:\s+NONE", cv2.getBuildInformation()):
        pytest.skip("this OpenCV opens windows")
    monkeypatch.setenv("DISPLAY", display)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    caplog.set_level("INFO")
    config = make_config(tmp_path, clips=(9,), target_frames=(5,))
    show_datasets(ToyFamily(), config, replace(DEBUG, debug_mode="image"), workers=1)
    assert reason in caplog.text
    assert str(tmp_path / "debug_views") in caplog.text
    shown = read_image(tmp_path / "debug_views" / "0_clip_0_00000-005.png")
    assert shown.shape == (32, 5 * 32, 3)
    assert frame_numbers(np.split(shown, 5, axis=1)) == [0, 1, 2, 3, 4]


def test_clips_show_the_control_beside_the_frames(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    make_clip(tmp_path / "control" / "clip_0.mp4", 9)
    config = make_config(tmp_path, clips=(9,), control_directory=tmp_path / "control")
    make_clip(tmp_path / "control" / "broken.mp4", 9)
    (tmp_path / "broken.mp4").write_bytes(b"")
    report = show_datasets(ToyFamily(), config, replace(DEBUG, debug_mode="video"), workers=1)
    assert [failure.stem for failure in report.failures] == ["broken"]
    frames = list(video_frames(tmp_path / "debug_views" / "0_clip_0_00000-005.mp4"))
    assert len(frames) == 5
    assert frames[0].shape == (32, 64, 3)


GERMAN = "ein roter Käfer fährt über die Straße"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_caption_as_windows_saves_it_is_a_remark(encoding: str, tmp_path: Path) -> None:
    result = check_caching(ToyFamily(), config_of(tmp_path, {"a": GERMAN.encode(encoding)}), 1, False)

    name = "Windows-1252 (Western European)" if encoding == "cp1252" else "UTF-16"
    text = "\n".join(result.lines)
    assert result.exit_code == 0
    assert "1 has a caption that is not UTF-8:" in text
    assert f"{tmp_path / 'a.txt'}: read as {name}: 'ein" in text
    assert result.tables[0].sources[0].caption == GERMAN


def config_of(folder: Path, captions: dict[str, bytes]) -> DatasetConfig:
    for name, content in captions.items():
        make_image(folder / f"{name}.png")
        (folder / f"{name}.txt").write_bytes(content)
    table = make_table(folder, "image_directory", caption_extension=".txt")
    return DatasetConfig(table.config_path, (table,))


def test_captions_are_converted_and_the_old_files_kept(tmp_path: Path) -> None:
    old = {"a": GERMAN.encode("cp1252"), "b": GERMAN.encode("utf-16"), "c": GERMAN.encode()}
    lines = repair_captions(config_of(tmp_path, old), GUESS)

    assert lines[0].startswith("2 captions converted")
    assert lines[0].endswith("0 left unchanged")
    for name in old:
        assert (tmp_path / f"{name}.txt").read_text(encoding="utf-8") == GERMAN
    assert (tmp_path / "a.txt.bak").read_bytes() == old["a"]
    assert (tmp_path / "b.txt.bak").read_bytes() == old["b"]
    assert not (tmp_path / "c.txt.bak").exists()


def test_what_cannot_be_converted_surely_is_left_as_it_is_and_named(tmp_path: Path) -> None:
    old = {"a": "naïve".encode("cp1252"), "b": GERMAN.encode("cp1252")}
    old |= {"c": b"\xff\xfe\x00\xd8", "d": b"\x89PNG\r\n\x1a\n\x00\x00\xff"}
    config = config_of(tmp_path, old)
    (tmp_path / "b.txt.bak").write_bytes(b"older")

    lines = repair_captions(config, GUESS)

    assert lines[0].endswith("4 left unchanged")
    assert "--repair_captions cp1252" in lines[1]
    assert "b.txt.bak exists already" in "\n".join(lines)
    assert {name: (tmp_path / f"{name}.txt").read_bytes() for name in old} == old
    assert (tmp_path / "b.txt.bak").read_bytes() == b"older"
    repair_captions(config, "cp1252")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "naïve"


def test_the_page_of_run_is_no_file_that_is_not_used(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    folder = config.datasets[0].source.directory
    assert folder is not None
    for name in ("check.html", "notes.html"):
        (folder / name).touch()
    said = "\n".join(check_caching(ToyFamily(), config, 1, False).lines)
    assert "1 file is not read: .html (1)" in said
