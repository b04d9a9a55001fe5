"""HunyuanVideo 1.5 as data: dimensions of a transformer, the tasks that a file is used for, sizes of clips.

Names of the tasks are those of musubi-tuner. Sources of the numbers: the released configurations, and the
pipelines of diffusers.
"""

from dataclasses import dataclass

from hunyuan_model.configs import JointConfig

NAME = "HunyuanVideo 1.5"
T2V, I2V = "t2v", "i2v"
LATENT_CHANNELS = 32
IN_CHANNELS = 2 * LATENT_CHANNELS + 1  # noisy latents, latents of a first frame, mask
STRIDE = 16  # pixels of one latent pixel along each side; a token is one latent pixel
FRAME_STRIDE = 4
TEXT_TOKENS = 1000  # longest prompt; the rest is cut off
GLYPH_TOKENS = 256  # longest text in quotation marks, in ByT5's tokens
MAX_RATIO = 4  # of the sides of a clip


@dataclass(frozen=True, kw_only=True)
class HunyuanVideo15Config(JointConfig):
    """Dimensions of a HunyuanVideo 1.5 transformer, read from a checkpoint's tensors."""

    glyph_dim: int  # width of ByT5's states
    glyph_hidden: tuple[int, int]  # widths inside the layers that turn these into tokens
    image_dim: int  # width of SigLIP's states

    @property
    def num_layers(self) -> int:
        """Number of blocks, all of them double."""
        return self.double_blocks

    @property
    def kind(self) -> str:
        """Always video: files that start from text or from an image have equal tensors."""
        return "video"


@dataclass(frozen=True)
class HunyuanVideo15Task:
    """One use of a transformer, and its default settings."""

    name: str  # T2V or I2V
    frames: int = 121
    steps: int = 50
    guidance: float = 6.0
    flow_shift: float = 7.0

    # what no task has, for forms, which ask every family with tasks
    takes_clean_first_frame = False  # an image that may be left out
    has_control = False
    high_noise_guidance = None  # of a second transformer

    @property
    def requires_image(self) -> bool:
        """Whether a clip begins with a given image."""
        return self.name == I2V


TASKS = {name: HunyuanVideo15Task(name) for name in (T2V, I2V)}
SMALL_T2V_SHIFT = 5.0  # flow shift of the release for clips of 480 rows from text
SMALL, LARGE = 640, 960  # side of a square with the area of a clip, of the releases 480p and 720p


def is_large(file_name: str) -> bool:
    """Return whether a transformer is for clips of 720 rows, according to its name.

    Args:
        file_name: Name of the file and of the folders that contain it.
    """
    return "720p" in file_name.lower()


def is_small(file_name: str) -> bool:
    """Return whether a transformer is for clips of 480 rows, according to its name.

    Args:
        file_name: Name of the file and of the folders that contain it.
    """
    return "480p" in file_name.lower()


def guess_task(file_name: str) -> HunyuanVideo15Task:
    """Return the task that the name of a transformer suggests: files of both tasks have equal tensors.

    Args:
        file_name: Name of the file and of the folders that contain it.
    """
    return TASKS[I2V if I2V in file_name.lower() else T2V]


def nearest_size(width: int, height: int, side: int) -> tuple[int, int]:
    """Return the width and height of a clip with about an image's aspect ratio.

    Sizes are those that the model was trained with: for each number of columns of 16 pixels the tallest clip
    with at most `side` x `side` pixels, and the sizes between. Of those that are not more oblong than the
    image, the most oblong one is taken. Source: the released code, as diffusers has it.

    Args:
        width: Width of the image.
        height: Height of the image.
        side: Side in pixels of a square with the area of the clip.
    """
    wanted = height / width
    best = (0.0, side, side)
    for columns, rows in _list_sizes(round((side / STRIDE) ** 2)):
        ratio = round(columns / rows, 5)
        # the list is symmetric: its first number is a height here, as in the released code
        is_allowed = ratio <= wanted if wanted >= 1 else ratio >= wanted
        if is_allowed and (not best[0] or abs(ratio - wanted) < abs(best[0] - wanted)):
            best = ratio, rows * STRIDE, columns * STRIDE
    return best[1], best[2]


def _list_sizes(num_tokens: int) -> list[tuple[int, int]]:
    """Return pairs of sides in tokens, from one extreme ratio to the other, of at most `num_tokens`."""
    sizes = []
    first, second = num_tokens, 1
    while first:
        if max(first, second) <= MAX_RATIO * min(first, second):
            sizes.append((first, second))
        if first * (second + 1) <= num_tokens:
            second += 1
        else:
            first -= 1
    return sizes
