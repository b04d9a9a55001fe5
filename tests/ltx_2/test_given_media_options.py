"""What a result says of the parts that it was given."""

from pathlib import Path

from ltx_2.given_media_options import Ltx2GivenMedia


def test_each_option_that_is_given_is_in_the_metadata_without_folders(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.touch()

    media = Ltx2GivenMedia(
        extend_prefix=clip,
        extend_prefix_frames=9,
        inpaint_source=clip,
        retake="0.5,1",
        keyframe=[f"8:{clip}:0.5"],
    )

    assert media.metadata == {
        "extend_prefix": "clip.mp4",
        "extend_prefix_frames": "9",
        "inpaint_source": "clip.mp4",
        "retake": "0.5,1",
        "keyframe": "8:clip.mp4:0.5",
    }


def test_nothing_given_says_nothing() -> None:
    assert Ltx2GivenMedia().metadata == {}
