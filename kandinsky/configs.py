"""Kandinsky 5 and 6 as data: dimensions of a transformer, and the tasks that a file is used for.

Names are those of musubi-tuner. Sources of the numbers: the configurations of the maker's repositories.
"""

from dataclasses import dataclass

NAME, NAME_6 = "Kandinsky 5", "Kandinsky 6"
LATENT_CHANNELS = 16
AUDIO_CHANNELS = 40  # of latents of sound, in all releases of Kandinsky 6
PATCH = 2  # height and width of a token in latent pixels
T2V, I2V, T2I = "t2v", "i2v", "t2i"
TI2VA = "ti2va"  # clips with sound, from a text and perhaps an image: Kandinsky 6
LITE, PRO, IMAGE = "lite", "pro", "image"  # sizes of transformers
DIM_BY_SIZE = {LITE: 1792, PRO: 4096, IMAGE: 2560}
SD_AREA, HD_AREA = 512 * 768, 1024 * 1024  # largest areas of a clip that starts from an image
# torch's default, with which the releases normalize heads: that of float32 for heads of 16 bits too
HEAD_EPS = 2.0**-23
IMAGE_SIZES = ((1024, 1024), (640, 1408), (1408, 640), (768, 1280), (1280, 768), (896, 1152), (1152, 896))


@dataclass(frozen=True)
class KandinskyConfig:
    """Dimensions of a Kandinsky 5 transformer, read from a checkpoint's tensors."""

    dim: int
    ffn_dim: int
    head_width: int
    num_layers: int  # visual blocks
    text_layers: int  # blocks for the text alone
    in_channels: int  # 16 noisy ones or, with a condition, 33: noisy ones, condition, mask
    out_channels: int
    text_dim: int  # width of the language model's states
    pooled_dim: int  # width of CLIP's pooled state
    time_dim: int
    eps: float = 1e-5
    head_eps: float = HEAD_EPS

    @property
    def has_condition(self) -> bool:
        """Whether the input has channels for a known frame and its mask."""
        return self.in_channels > self.out_channels

    @property
    def kind(self) -> str:
        """Kind of the model: for clips (video) or for images from text (t2i)."""
        return "video" if self.has_condition else "t2i"

    @property
    def num_heads(self) -> int:
        """Return the number of attention heads."""
        return self.dim // self.head_width

    @property
    def rotary_widths(self) -> tuple[int, int, int]:
        """Return the channels of a head that encode the position in frames, rows and columns."""
        return split_head(self.head_width)


@dataclass(frozen=True)
class KandinskyStream:
    """Dimensions of the blocks for one of Kandinsky 6's streams of tokens, video or sound."""

    dim: int
    ffn_dim: int
    head_width: int
    time_dim: int
    eps: float = 1e-5
    head_eps: float = HEAD_EPS


@dataclass(frozen=True)
class Kandinsky6Config:
    """Dimensions of a Kandinsky 6 transformer, read from a checkpoint's tensors."""

    video: KandinskyStream
    audio: KandinskyStream
    num_layers: int  # fused blocks of both streams
    text_layers: int  # blocks for the text alone, in each stream
    in_channels: int  # 33: noisy ones, condition, mask
    out_channels: int
    audio_channels: int
    text_dim: int
    pooled_dim: int
    num_token_types: int  # 2: of frames and of a given image; 0: the file takes no image

    kind = TI2VA
    has_condition = True

    @property
    def dim(self) -> int:
        """Width of the video's tokens."""
        return self.video.dim

    @property
    def rotary_widths(self) -> tuple[int, int, int]:
        """Return the channels of a head that encode the position in frames, rows and columns."""
        return split_head(self.video.head_width)


def split_head(width: int) -> tuple[int, int, int]:
    """Return the channels of a head of this width that encode frames, rows and columns."""
    frames = width // 4
    return frames, (width - frames) // 2, (width - frames) // 2


@dataclass(frozen=True)
class KandinskyTask:
    """One use of a transformer, and its default settings."""

    name: str
    kind: str  # T2V, I2V, T2I or TI2VA
    size: str  # LITE, PRO or IMAGE
    frames: int
    width: int
    height: int
    area: int  # largest area in pixels of a clip that starts from an image
    guidance: float
    flow_shift: float
    # rows and columns count as this many fewer positions: rotary angles are divided by it
    position_scale: float
    steps: int = 50

    # what no task has, for forms, which ask every family with tasks
    has_control = False
    high_noise_guidance = None  # of a second transformer

    @property
    def makes_images(self) -> bool:
        """Whether the task makes images, with FLUX.1's autoencoder and the text template for images."""
        return self.kind == T2I

    @property
    def has_audio(self) -> bool:
        """Whether clips have sound: the task is one of Kandinsky 6."""
        return self.kind == TI2VA

    @property
    def takes_clean_first_frame(self) -> bool:
        """Whether a clip may begin with an image, which may be left out."""
        return self.kind == TI2VA

    @property
    def requires_image(self) -> bool:
        """Whether a clip begins with a given image."""
        return self.kind == I2V


def _make_clip_task(size: str, kind: str, seconds: int, definition: str) -> KandinskyTask:
    is_hd = definition == "hd"
    return KandinskyTask(
        name=f"k5-{size}-{kind}-{seconds}s-{definition}",
        kind=kind,
        size=size,
        frames=24 * seconds + 1,
        width=1280 if is_hd else 768,
        height=768 if is_hd else 512,
        area=HD_AREA if is_hd else SD_AREA,
        guidance=5.0,
        flow_shift=10.0,
        position_scale=3.16 if is_hd else 2.0,
    )


_CLIP_TASKS = (
    _make_clip_task(LITE, T2V, 5, "sd"),
    _make_clip_task(LITE, T2V, 10, "sd"),
    _make_clip_task(LITE, I2V, 5, "sd"),
    _make_clip_task(PRO, T2V, 5, "sd"),
    _make_clip_task(PRO, T2V, 5, "hd"),
    _make_clip_task(PRO, T2V, 10, "sd"),
    _make_clip_task(PRO, T2V, 10, "hd"),
    _make_clip_task(PRO, I2V, 5, "sd"),
    _make_clip_task(PRO, I2V, 5, "hd"),
)
IMAGE_TASK = KandinskyTask(
    name="k5-lite-t2i-hd",
    kind=T2I,
    size=IMAGE,
    frames=1,
    width=1024,
    height=1024,
    area=HD_AREA,
    guidance=3.5,
    flow_shift=3.0,
    position_scale=1.0,
)


def _make_audio_task(size: str) -> KandinskyTask:
    return KandinskyTask(
        name=f"k6-{size}-5s",
        kind=TI2VA,
        size=size,
        frames=121,
        width=768,
        height=512,
        area=SD_AREA,
        guidance=5.0,
        flow_shift=5.0,
        position_scale=2.0,
    )


AUDIO_TASKS = {size: _make_audio_task(size) for size in (LITE, PRO)}
TASKS = {task.name: task for task in (*_CLIP_TASKS, IMAGE_TASK, *AUDIO_TASKS.values())}
DEFAULT_TASK = _CLIP_TASKS[0]
REFUSED_TASKS = {
    "k5-lite-i2i-hd": "images that are edited are not built yet; k5-lite-t2i-hd makes images from text",
}


def guess_task(file_name: str, dim: int, kind: str) -> KandinskyTask:
    """Return the task that a file's name and dimensions suggest.

    Files of a size have equal tensors, whether they start from text or an image, and whatever the length.

    Args:
        file_name: Name of the file and of its release's folder.
        dim: Width of the transformer.
        kind: Kind of the transformer, as the configuration says it: "video", T2I or TI2VA.
    """
    if kind == T2I:
        return IMAGE_TASK
    size = PRO if dim >= DIM_BY_SIZE[PRO] else LITE
    if kind == TI2VA:
        return AUDIO_TASKS[size]
    name = file_name.lower()
    kind = I2V if "i2v" in name else T2V
    seconds = 10 if "10s" in name and kind == T2V else 5
    definition = "hd" if size == PRO and ("hd" in name or "1024" in name) else "sd"
    return TASKS[f"k5-{size}-{kind}-{seconds}s-{definition}"]
