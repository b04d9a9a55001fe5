"""HiDream-O1-Image's own options for caching, training and generation. Standard library only."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from modules.errors import OptionError
from modules.option_values import Placeholder
from modules.options import (
    FREE,
    HABIT,
    NO_PIXELS,
    REFERENCES_ONLY,
    REQUEST_SETTING,
    Options,
    make_request_facts,
    not_needed,
    option,
)
from modules.speed_options import dit_dtype_option
from modules.text_files import parse_json

NAME = "HiDream-O1-Image"
SIDE = 2048  # default width and height of images
STEPS, GUIDANCE = 50, 5.0
DEV_STEPS, DEV_GUIDANCE = 28, 1.0
SHIFT = 3.0  # shift of the noise levels in generations; training has none
SHIFT_OF_SEVERAL = 1.0  # the same with several references
TASK_NAMES = T2I, I2I = ("t2i", "i2i")
SCHEDULERS = FLOW_MATCH, FLASH = ("flow_match", "flash")  # of edits with Dev
# options of a generation -> their names in Request.extra
EXTRAS = {name: name for name in ("editing_scheduler", "layout_bboxes")}
MODEL_TYPES = FULL, DEV = ("full", "dev")
RELEASED_SOLVER = "released"  # value of --sample_solver: the solver of the variant
TOKENIZER_OPTION = "--tokenizer"
_DIT = "network, which is text encoder and transformer: file or folder"
_TOKENIZER = "its tokenizer: folder or file; default: in the network's folder, else from the hub"
_ONE_CACHE = "the full model and Dev have the same caches."
_NO_VAE = "the model works with pixels, so there is no VAE."
_TASK = (
    "t2i: images of texts; i2i: edits, with the control images of the dataset as references, which the "
    "vision tower sees too"
)
_BOXES = (
    "places of the references in the image, in their order, as shares of its width and height: [[x1, x2, y1, "
    "y2], ...]. Each reference gets a frame in the color of its box, and a black image with the five largest "
    "boxes joins the references (--layout_bboxes in a prompt line)"
)


class LayoutBox(NamedTuple):
    """A place in an image, as shares of its width and height, in the order of --layout_bboxes."""

    left: float
    right: float
    top: float
    bottom: float


class HiDreamO1LatentCachingOptions(Options, title=NAME):
    """Options of hidream_o1_cache_latents.py in addition to the shared ones."""

    task: str = option(_TASK, default=T2I, choices=TASK_NAMES)
    vae = not_needed(_NO_VAE, type=Path)
    model_type = not_needed(_ONE_CACHE, type=str)


class HiDreamO1TextCachingOptions(Options, title=NAME):
    """Options of hidream_o1_cache_text_encoder_outputs.py in addition to the shared ones."""

    dit: Path | None = option(_DIT, required=True, often=True)
    tokenizer: Path | None = option(_TOKENIZER)
    task: str = option(_TASK, default=T2I, choices=TASK_NAMES)
    model_type = not_needed(_ONE_CACHE, type=str)


class HiDreamO1ModelOptions(Options, title=NAME):
    """The files of the model and how they run, in training and generation."""

    dit: Path | None = option(_DIT, facts=FREE, often=True)  # resume compares its name
    dit_dtype: str | None = dit_dtype_option()
    tokenizer: Path | None = option(_TOKENIZER, facts=FREE)
    model_type: str | None = option(
        "variant that --dit is, full or dev, whose noise has another scale; default: what the names of the "
        "file and its folders say",
        choices=MODEL_TYPES,
        facts=FREE,
    )
    vae = not_needed(_NO_VAE, type=Path)


class HiDreamO1TrainingOptions(HiDreamO1ModelOptions, title=NAME):
    """Options of hidream_o1_train_network.py and hidream_o1_train.py in addition to the shared ones."""

    task: str = option(
        f"{_TASK} and is trained as well. Caches need the same option",
        default=T2I,
        choices=TASK_NAMES,
        facts=HABIT,
    )


class HiDreamO1GenerationOptions(HiDreamO1ModelOptions, title=NAME):
    """Options of hidream_o1_generate_image.py in addition to the shared ones."""

    task: str | None = option(
        "t2i leaves out the vision tower, which references need (1.2 GB); default: i2i with "
        "--control_image_path or prompt lines, else t2i",
        choices=TASK_NAMES,
        facts=NO_PIXELS,
    )
    keep_original_aspect: bool = option(
        f"give the image the aspect ratio of its only reference, with about {SIDE} x {SIDE} pixels",
        facts={**REQUEST_SETTING, **REFERENCES_ONLY},
    )
    editing_scheduler: str | None = option(
        "steps of Dev with exactly one reference: flow_match, Euler's, which is the default; flash, the same "
        "as without references (--editing_scheduler in a prompt line)",
        choices=SCHEDULERS,
        facts={**make_request_facts("editing_scheduler"), **REFERENCES_ONLY},
    )
    layout_bboxes: str | None = option(
        _BOXES, facts={**make_request_facts("layout_bboxes"), **REFERENCES_ONLY}
    )

    def __post_init__(self) -> None:
        if self.layout_bboxes is not None:
            read_boxes(self.layout_bboxes)
            if self.keep_original_aspect:
                raise OptionError(
                    "--layout_bboxes and --keep_original_aspect: a layout has the size of --image_size. Omit "
                    "one of them"
                )


def read_boxes(text: str) -> tuple[LayoutBox, ...]:
    """Parse --layout_bboxes; raise OptionError if it is not a list of boxes inside the image."""
    try:
        content = parse_json(text)
        boxes = tuple(LayoutBox(*map(float, box)) for box in content)
    except (TypeError, ValueError):
        boxes = ()
    if not boxes:
        raise OptionError(
            f"--layout_bboxes {text}: not a list of boxes. Write [[x1, x2, y1, y2]] with numbers from 0 to "
            "1, such as [[0.2, 0.4, 0.5, 0.75]]"
        )
    for box in boxes:
        if not (0 <= box.left < box.right <= 1 and 0 <= box.top < box.bottom <= 1):
            raise OptionError(
                f"--layout_bboxes: {list(box)} is not x1, x2, y1, y2, from 0 to 1 with x1 below x2 and y1 "
                "below y2. Correct the order or the numbers"
            )
    return boxes


def check_scheduler(name: str) -> str:
    """Return the name of an editing scheduler; raise OptionError if there is no such scheduler."""
    if name not in SCHEDULERS:
        raise OptionError(f"--editing_scheduler {name!r}: pass {' or '.join(SCHEDULERS)}")
    return name


def resolve_generation(
    options: Any, own_options: HiDreamO1GenerationOptions
) -> tuple[Any, HiDreamO1GenerationOptions]:
    """Set --task t2i if no image of the run can have references, and no complete model is saved."""
    may_have_references = (
        options.request.control_image_path
        or options.from_file is not None
        or options.interactive
        or options.save_merged_model is not None
    )
    if own_options.task is None and not may_have_references:
        own_options = replace(own_options, task=T2I)
    return options, own_options


def caching_options(options: HiDreamO1TrainingOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a training run's options for latent caching and for text caching, each by option name."""
    task = {"--task": None if options.task == T2I else options.task}
    texts = {"--dit": options.dit or Placeholder("DIT_FILE"), TOKENIZER_OPTION: options.tokenizer}
    return task, {**texts, **task}


def generation_options(options: HiDreamO1TrainingOptions, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the generation command that makes a sample with a training run's models.

    Args:
        options: Options of the training run.
        sample: Values of a sample to generate, by the field names of `Request`.
    """
    extra = sample.get("extra") or {}
    return {
        "--dit": options.dit or Placeholder("DIT_FILE"),
        TOKENIZER_OPTION: options.tokenizer,
        "--dit_dtype": options.dit_dtype,
        "--model_type": options.model_type,
        "--control_image_path": sample.get("control_images") or (),
        **{f"--{name}": extra[name] for name in EXTRAS if name in extra},
    }
