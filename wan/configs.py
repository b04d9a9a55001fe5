"""Wan2.1 and Wan2.2 as data: dimensions, the meaning of each `--task`, and the released VAEs."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class VaeRelease:
    """One generation of the VAE, identified by the dimensions in its file."""

    name: str
    models: str  # models that use these latents
    channels: int  # number of latent channels
    stride: tuple[int, int, int]  # pixels of a latent: frames, height, width
    mean: tuple[float, ...]  # statistics of the latents, per channel
    std: tuple[float, ...]
    file: str  # its file in the folder of the official release
    alternative_files: str  # published files with the same tensors, for messages

    @property
    def description(self) -> str:
        """Name, models and latent size of the VAE, for messages."""
        size = f"{self.channels} latent channels, {self.stride[1]}x{self.stride[2]} pixels each"
        return f"the {self.name} VAE (of {self.models}: {size})"

    @property
    def files(self) -> str:
        """Names of the released files, for messages."""
        return f"{self.file}, {self.alternative_files}"


# fmt: off
WAN_2_1 = VaeRelease(
    "Wan2.1",
    "Wan2.1 and Wan2.2 A14B",
    16,
    (4, 8, 8),
    # released code, wan/modules/vae.py
    mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
    file="Wan2.1_VAE.pth",
    alternative_files="wan_2.1_vae.safetensors or a diffusers vae folder",
)

WAN_2_2 = VaeRelease(
    "Wan2.2",
    "Wan2.2 TI2V-5B",
    48,
    (4, 16, 16),
    # released code, wan/modules/vae2_2.py
    mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
        0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
        -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313,
        -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
        0.3573, -0.0548, -0.1681, -0.0667,
    ),
    std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
    file="Wan2.2_VAE.pth",
    alternative_files="wan2.2_vae.safetensors or the vae folder of Wan2.2-TI2V-5B-Diffusers",
)
# fmt: on

RELEASES = {release.channels: release for release in (WAN_2_1, WAN_2_2)}  # by the channels of their latents


FUN_CONTROL = "fun-control"  # model kind of Wan2.1 Fun-Control
VACE = "vace"  # the kind of a text-to-video model with a second stack, for control, masks and references
BERNINI = "bernini"  # the kind of a text-to-video model with sources in its sequence, see `wan.bernini`
VACE_DIM = 96  # channels of its control, see `wan.vace`
HEAD_WIDTH = 128  # head width of all released sizes, because tensors do not show it


@dataclass(frozen=True)
class WanConfig:
    """Dimensions of a Wan transformer, read from a checkpoint's tensors."""

    dim: int
    ffn_dim: int
    freq_dim: int
    text_dim: int
    num_heads: int
    num_layers: int
    in_dim: int
    out_dim: int
    text_len: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    has_image: bool = False  # cross-attention to image tokens: the file has k_img, v_img and img_emb
    image_dim: int = 1280  # width of the CLIP features that img_emb takes
    image_positions: int = 0  # length of img_emb.emb_pos (FLF2V: 514); 0: the model has none
    has_ref_conv: bool = False  # Fun-Control v1.1 and of Wan2.2
    vace_layers: int = 0  # blocks of VACE's second stack; 0: the model has none
    vace_dim: int = 0  # channels that vace_patch_embedding takes

    @property
    def kind(self) -> str:
        """Kind of the model, a key in `INPUT_CHANNELS`. Wan2.1 and 2.2 share one for text-to-video."""
        if self.vace_layers:
            return VACE if self.in_dim == INPUT_CHANNELS[False]["t2v"] else "unknown"
        if self.image_positions:
            return "flf2v"
        kinds = {channels: kind for kind, channels in INPUT_CHANNELS[self.has_image].items()}
        return kinds.get(self.in_dim, "unknown")


# Kinds of models, with and without attention to image features -> channels that the network takes: noise 16;
# a mask of 4 and an image of 16; a control video of 16. The 5B model has its own VAE, with 48 channels.
# Fun-Control of Wan2.1 takes the image without its mask, that of Wan2.2 with it.
INPUT_CHANNELS: dict[bool, dict[str, int]] = {
    True: {"i2v": 36, "fun-control": 48},
    False: {"t2v": 16, "i2v-2.2": 36, "ti2v": 48, "fun-control-2.2": 52},
}


@dataclass(frozen=True)
class WanTask:
    """Requirements of a `--task` on the checkpoint, and its defaults for generation."""

    name: str
    # t2v, i2v, flf2v: what conditions the video; ti2v: a text, and an image if there is one; vace, bernini:
    # see `VACE` and `BERNINI`
    kind: str
    has_control: bool
    dim: int  # width of the released model; a file with another width is used, and this is logged
    steps: int
    frames: int
    sizes: tuple[tuple[int, int], ...]  # width, height as trained
    repositories: tuple[str, ...]  # repositories of the release on the hub
    version: str = "2.1"
    flow_shift: float = 5.0
    guidance: float = 5.0
    # guidance scale of the high-noise expert; None if there is one expert
    high_noise_guidance: float | None = None
    boundary: float | None = None  # timestep from which on the high-noise expert works
    fps: float = 16.0
    # an image, if one is given, becomes the first latent frame, which stays clean
    takes_clean_first_frame: bool = False
    # probability that a training batch of clips keeps its first latent frame clean; None: the model cannot
    first_frame_probability: float | None = None
    # derived from the fields above
    requires_image: bool = field(init=False)  # whether the task requires an image in the condition channels
    uses_clip_features: bool = field(init=False)  # image features are inputs of the network: only Wan2.1
    model_kind: str = field(init=False)  # kind of the model, with the version if it changes input channels

    def __post_init__(self) -> None:
        requires_image = self.kind in {"i2v", "flf2v"}
        model_kind = "i2v-2.2" if self.kind == "i2v" and self.version == "2.2" else self.kind
        if self.kind == BERNINI:  # its tensors are those of text to video
            model_kind = "t2v"
        if self.has_control:
            model_kind = FUN_CONTROL if self.version == "2.1" else "fun-control-2.2"
        object.__setattr__(self, "requires_image", requires_image)
        object.__setattr__(self, "uses_clip_features", requires_image and self.version == "2.1")
        object.__setattr__(self, "model_kind", model_kind)

    @property
    def takes_references(self) -> bool:
        """Whether the video may be made from a clip and from references, or from neither."""
        return self.kind in (VACE, BERNINI)

    @property
    def side_step(self) -> int:
        """Number of pixels that widths and heights are multiples of."""
        return 32 if self.kind == "ti2v" else 16

    @property
    def in_dim(self) -> int:
        """Number of input channels of the transformer."""
        kinds = {"flf2v": 36, VACE: 16, **INPUT_CHANNELS[True], **INPUT_CHANNELS[False]}
        return kinds[self.model_kind]


_480P = ((480, 832), (832, 480))
_5B = ((1280, 704), (704, 1280))
_720P = ((720, 1280), (1280, 720), *_480P)
_I2V = ("Wan-AI/Wan2.1-I2V-14B-480P", "Wan-AI/Wan2.1-I2V-14B-720P")
_FUN = ("alibaba-pai/Wan2.1-Fun-14B-Control",)
_FUN_A14B = ("alibaba-pai/Wan2.2-Fun-A14B-Control",)
# Settings of the release's script: VideoX-Fun, examples/wan2.2_fun/predict_v2v_control.py
_FUN_A14B_SETTINGS: dict[str, Any] = {
    "version": "2.2",
    "guidance": 6.0,
    "high_noise_guidance": 6.0,
    "boundary": 900.0,
}
TASKS: dict[str, WanTask] = {
    task.name: task
    for task in (
        WanTask(
            "t2v-14B",
            "t2v",
            has_control=False,
            dim=5120,
            steps=50,
            frames=81,
            sizes=_720P,
            repositories=("Wan-AI/Wan2.1-T2V-14B",),
        ),
        WanTask(
            "t2v-1.3B",
            "t2v",
            has_control=False,
            dim=1536,
            steps=50,
            frames=81,
            sizes=_480P,
            repositories=("Wan-AI/Wan2.1-T2V-1.3B",),
        ),
        WanTask(
            "i2v-14B",
            "i2v",
            has_control=False,
            dim=5120,
            steps=40,
            frames=81,
            sizes=_720P,
            repositories=_I2V,
        ),
        WanTask(
            "flf2v-14B",
            "flf2v",
            has_control=False,
            dim=5120,
            steps=50,
            frames=81,
            sizes=_720P,
            repositories=("Wan-AI/Wan2.1-FLF2V-14B-720P",),
        ),
        WanTask(
            "t2i-14B",
            "t2v",
            has_control=False,
            dim=5120,
            steps=50,
            frames=1,
            sizes=(*_720P, (1024, 1024)),
            repositories=("Wan-AI/Wan2.1-T2V-14B",),
        ),
        WanTask(
            "t2v-1.3B-FC",
            "t2v",
            has_control=True,
            dim=1536,
            steps=50,
            frames=81,
            sizes=_480P,
            repositories=("alibaba-pai/Wan2.1-Fun-1.3B-Control",),
        ),
        WanTask(
            "t2v-14B-FC",
            "t2v",
            has_control=True,
            dim=5120,
            steps=50,
            frames=81,
            sizes=_720P,
            repositories=_FUN,
        ),
        WanTask(
            "i2v-14B-FC",
            "i2v",
            has_control=True,
            dim=5120,
            steps=40,
            frames=81,
            sizes=_720P,
            repositories=_FUN,
        ),
        WanTask(
            "t2v-A14B",
            "t2v",
            has_control=False,
            dim=5120,
            steps=40,
            frames=81,
            sizes=_720P,
            repositories=("Wan-AI/Wan2.2-T2V-A14B",),
            version="2.2",
            flow_shift=12.0,
            guidance=3.0,
            high_noise_guidance=4.0,
            boundary=875.0,
        ),
        WanTask(
            "i2v-A14B",
            "i2v",
            has_control=False,
            dim=5120,
            steps=40,
            frames=81,
            sizes=_720P,
            repositories=("Wan-AI/Wan2.2-I2V-A14B",),
            version="2.2",
            guidance=3.5,
            high_noise_guidance=3.5,
            boundary=900.0,
        ),
        WanTask(
            "vace-1.3B",
            VACE,
            has_control=False,
            dim=1536,
            steps=50,
            frames=81,
            sizes=_480P,
            repositories=("Wan-AI/Wan2.1-VACE-1.3B",),
        ),
        WanTask(
            "vace-14B",
            VACE,
            has_control=False,
            dim=5120,
            steps=50,
            frames=81,
            sizes=_720P,
            repositories=("Wan-AI/Wan2.1-VACE-14B",),
        ),
        WanTask(
            "vace-A14B",
            VACE,
            has_control=False,
            dim=5120,
            steps=50,
            frames=81,
            sizes=_720P,
            repositories=("alibaba-pai/Wan2.2-VACE-Fun-A14B",),
            version="2.2",
            high_noise_guidance=5.0,
            boundary=875.0,
        ),
        WanTask(
            "bernini-1.3B",
            BERNINI,
            has_control=False,
            dim=1536,
            steps=40,
            frames=81,
            sizes=_480P,
            repositories=("ByteDance/Bernini-R-1.3B-Diffusers",),
            flow_shift=3.0,
            guidance=4.0,
        ),
        WanTask(
            "bernini-14B",
            BERNINI,
            has_control=False,
            dim=5120,
            steps=40,
            frames=81,
            sizes=_480P,
            repositories=("ByteDance/Bernini-R-Diffusers",),
            version="2.2",
            flow_shift=3.0,
            # all weights of the guidance are smaller for low noise, see `LOW_NOISE_FACTOR`
            guidance=3.2,
            high_noise_guidance=4.0,
            boundary=875.0,
        ),
        WanTask(
            "t2v-A14B-FC",
            "t2v",
            has_control=True,
            dim=5120,
            steps=50,
            frames=81,
            sizes=_720P,
            repositories=_FUN_A14B,
            **_FUN_A14B_SETTINGS,
        ),
        WanTask(
            "i2v-A14B-FC",
            "i2v",
            has_control=True,
            dim=5120,
            steps=50,
            frames=81,
            sizes=_720P,
            repositories=_FUN_A14B,
            **_FUN_A14B_SETTINGS,
        ),
        WanTask(
            "ti2v-5B",
            "ti2v",
            has_control=False,
            dim=3072,
            steps=50,
            frames=121,
            sizes=_5B,
            repositories=("Wan-AI/Wan2.2-TI2V-5B",),
            version="2.2",
            fps=24.0,
            takes_clean_first_frame=True,
            # the model generates from text alone and from images, so a LoRA learns both
            first_frame_probability=0.5,
        ),
    )
}

# default negative prompt of the release
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
# the addition asks for no cut between the two given frames
FIRST_LAST_NEGATIVE_PROMPT = "镜头切换，" + NEGATIVE_PROMPT

IMAGE_480P_FLOW_SHIFT = 3.0  # i2v at 480x832 or 832x480
FIRST_LAST_FLOW_SHIFT = 16.0


def default_flow_shift(task: WanTask, width: int, height: int) -> float:
    """Return the released code's default flow shift for a task and an output size in pixels."""
    if task.kind == "flf2v":
        return FIRST_LAST_FLOW_SHIFT
    is_small = (width, height) in _480P
    return IMAGE_480P_FLOW_SHIFT if task.uses_clip_features and is_small else task.flow_shift
