"""Options for what clips of a task do not have say that they do nothing."""

import argparse

import pytest

from minimax_h3.options import H3LatentCachingOptions, H3TextCachingOptions
from minimax_h3.training_options import warn_about_unused_clean_shares

IGNORED = "is ignored because it is for the references of --task ref2va"


@pytest.mark.parametrize("record", [H3LatentCachingOptions, H3TextCachingOptions])
def test_sizes_of_references_are_for_their_task(
    record: type[H3LatentCachingOptions | H3TextCachingOptions], caplog: pytest.LogCaptureFixture
) -> None:
    record.from_defaults(task="ref2va", reference_image_short_edge=64)
    record.from_defaults()
    assert not caplog.messages
    record.from_defaults(task="fl2va", reference_image_short_edge=64, reference_video_short_edge=96)
    assert caplog.messages == [
        f"--reference_image_short_edge 64 {IGNORED}",
        f"--reference_video_short_edge 96 {IGNORED}",
    ]


def test_sizes_of_references_are_for_a_teacher_that_sees_the_subject(
    caplog: pytest.LogCaptureFixture,
) -> None:
    H3TextCachingOptions.from_defaults(teacher_conditions="subject_ref", reference_image_short_edge=64)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("given", "ignored"),
    [
        ({}, ["visual", "audio"]),
        ({"task": "fl2va"}, ["audio"]),
        ({"task": "ref2va"}, []),
        ({"h3_training_mode": "ref2va"}, []),
        ({"teacher": "base"}, []),
        ({"one_frame": True}, ["audio"]),
    ],
)
def test_shares_of_noise_need_conditions(
    given: dict[str, object], ignored: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    default = {"task": None, "h3_training_mode": "fl2va", "one_frame": False, "teacher": None}
    shares = {"h3_visual_cond_clean": 0.5, "h3_audio_cond_clean": 0.5}
    warn_about_unused_clean_shares(
        argparse.Namespace(**{**default, **shares, **given}, typed_options=frozenset())
    )
    assert [message.split("_")[1] for message in caplog.messages] == ignored
