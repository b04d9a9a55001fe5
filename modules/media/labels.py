"""Names of files that accompany training images. Standard library only.

OneTrainer stores them next to an image `cat.png`: its mask `cat-masklabel.png`, and the image from which it
is made, `cat-condlabel.png`. There are folders of masks too.
"""

MASK_LABEL, CONDITION_LABEL = "-masklabel", "-condlabel"
MASK_FOLDERS = frozenset({"mask", "masks"})  # names of folders that contain masks and no images, lower case
MASKS_BEFORE = ".before"  # subfolder in a folder of masks that this program has generated or changed
LABELS = (MASK_LABEL, CONDITION_LABEL)


def find_stem_label(stem: str) -> str | None:
    """Return the label that a companion file's stem ends with, such as `-masklabel`; None for other files."""
    lower = stem.lower()
    return next((label for label in LABELS if lower.endswith(label) and len(lower) > len(label)), None)


def get_image_stem(stem: str, label: str) -> str:
    """Return the stem of the image to which a companion file, such as a mask, belongs: without the label."""
    return stem[: -len(label)] if find_stem_label(stem) == label else stem
