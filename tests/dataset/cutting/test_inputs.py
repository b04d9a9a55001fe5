from pathlib import Path

from dataset.cutting.inputs import clip_name, find_videos

MOST_OF_NAME = 255 - len(".") - len(".0123456789abcdef01.tmp")  # bytes; while a file is written


def test_long_names_in_any_script_give_names_that_a_disk_holds(tmp_path: Path) -> None:
    folder = tmp_path / "footage" / ("\u5f71" * 60)
    folder.mkdir(parents=True)
    (folder / ("\u7247" * 60 + ".mp4")).touch()

    (source,) = find_videos(tmp_path / "footage", tmp_path / "clips")

    assert source.stem.startswith("\u5f71")
    assert len(clip_name(source.stem, 1, ".mp4").encode("utf-8")) <= MOST_OF_NAME
