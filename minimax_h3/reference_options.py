"""Options of keyframes, references and single images. Standard library only."""

import logging
from collections.abc import Mapping

from modules.errors import OptionError
from modules.options import REQUEST_SETTING, Options, make_request_facts, option

logger = logging.getLogger(__name__)

IMAGE_EDGE, VIDEO_EDGE = 2048, 768  # pixels of the short side of references, as released
TOKEN = 32  # pixels along the side of a token
MAX_EDGE = 8192
KEYFRAMES, CONDITION_IMAGES = "keyframe", "condition_image"  # in Request.extra, as the names below
REF, JSONL, INDEX, ONE_FRAME, TASK = "ref", "reference_jsonl", "reference_index", "one_frame", "task"
BY_KIND = {"image": "reference_image", "video": "reference_video", "audio": "reference_audio"}
REFERENCE_MEDIA_KEYS = (KEYFRAMES, CONDITION_IMAGES, REF, JSONL, INDEX, ONE_FRAME, TASK, *BY_KIND.values())
FIELDS = ("type", "audio")  # fields of --ref


class H3MediaOptions(Options, title="keyframes and references"):
    """Media from which a clip is generated in addition to its prompt. Keyframes have shared options."""

    keyframe: tuple[str, ...] | None = option(
        "the first frame, and if given again the last one: another spelling of --first_frame and "
        "--last_frame",
        action="append",
        nargs=None,
        facts=make_request_facts(KEYFRAMES),
    )
    condition_image: tuple[str, ...] | None = option(
        "with --one_frame_inference: condition image for the single image; may be given again",
        action="append",
        nargs=None,
        facts=make_request_facts(CONDITION_IMAGES),
    )
    one_frame_inference: str | None = option(
        "generate a single image: its frame index in a clip of 24 frames a second, and those of its "
        "condition images",
        metavar="default|target_index=N,control_index=N;N",
        facts=make_request_facts(ONE_FRAME),
    )
    ref: tuple[str, ...] | None = option(
        "a reference, in the order of the prompt's labels; audio= gives the audio of a video. May be "
        "given again",
        action="append",
        nargs=None,
        metavar="PATH[;type=image|video|audio][;audio=PATH]",
        facts=make_request_facts(REF),
    )
    reference_image: tuple[str, ...] | None = option(
        "a reference image; may be given again",
        action="append",
        nargs=None,
        facts=make_request_facts(BY_KIND["image"]),
    )
    reference_video: tuple[str, ...] | None = option(
        "a reference video, with its audio; may be given again. Videos follow images",
        action="append",
        nargs=None,
        facts=make_request_facts(BY_KIND["video"]),
    )
    reference_audio: tuple[str, ...] | None = option(
        "a reference audio file; may be given again. Audio follows videos",
        action="append",
        nargs=None,
        facts=make_request_facts(BY_KIND["audio"]),
    )
    reference_jsonl: str | None = option(
        "list of a dataset, whose line --reference_index has the references", facts=make_request_facts(JSONL)
    )
    reference_index: int = option(
        "with --reference_jsonl: number of the line, from 0",
        default=0,
        minimum=0,
        facts=make_request_facts(INDEX),
    )
    reference_image_short_edge: int = option(
        "short side of reference images in pixels; smaller ones need less memory and show less detail",
        default=IMAGE_EDGE,
        minimum=TOKEN,
        maximum=MAX_EDGE,
        facts=REQUEST_SETTING,
    )
    reference_video_short_edge: int = option(
        "short side of reference videos in pixels; they have at most 768 x 1344 pixels",
        default=VIDEO_EDGE,
        minimum=TOKEN,
        maximum=MAX_EDGE,
        facts=REQUEST_SETTING,
    )


def warn_about_unused_edges(image_edge: int, video_edge: int, why: str) -> None:
    """Warn that changed reference sizes have no effect, for the reason `why`."""
    edges = {
        "reference_image_short_edge": (image_edge, IMAGE_EDGE),
        "reference_video_short_edge": (video_edge, VIDEO_EDGE),
    }
    for name, (edge, default) in edges.items():
        if edge != default:
            logger.warning("--%s %d is ignored because %s", name, edge, why)


def split_ref(text: str) -> tuple[str, Mapping[str, str]]:
    """Split a value of --ref, PATH;type=...;audio=..., into its path and its fields.

    Raises OptionError for a wrong format.
    """
    path, *field_texts = text.split(";")
    fields: dict[str, str] = {}
    for field_text in field_texts:
        name, separator, value = field_text.partition("=")
        if name.strip() not in FIELDS or not separator or not value.strip() or name.strip() in fields:
            raise OptionError(
                f"--ref {text!r}: {field_text!r} is not understood. Write PATH;type=image, video or "
                "audio;audio=PATH"
            )
        fields[name.strip()] = value.strip()
    if not path.strip():
        raise OptionError(f"--ref {text!r} names no file. Write PATH;type=image, video or audio;audio=PATH")
    return path.strip(), fields
