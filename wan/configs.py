"""Wan2.1 and Wan2.2 as data: the dimensions of a transformer, and the meaning of each `--task`."""

from dataclasses import dataclass
from typing import Any

from modules.contract.rules import ModelRelease

HEAD_WIDTH = 128  # of all released sizes; cannot be read from the tensors of a file


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

    @property
    def kind(self) -> str:
        """Return the kind of condition: a name of `INPUT_CHANNELS`.

        Text-to-video models of Wan2.1 and of Wan2.2 have the same tensors.
        """
        if self.image_positions:
            return "flf2v"
        kinds = {channels: kind for kind, channels in INPUT_CHANNELS[self.has_image].items()}
        return kinds.get(self.in_dim, "unknown")


# Kinds of models, with and without attention to image features -> channels that the network takes: noise 16;
# a mask of 4 and an image of 16; a control video of 16. The 5B model has a VAE of its own, of 48 channels.
# Fun-Control of Wan2.1 takes the image without its mask, that of Wan2.2 with it.
INPUT_CHANNELS: dict[bool, dict[str, int]] = {
    True: {"i2v": 36, "fun-control": 48},
    False: {"t2v": 16, "i2v-2.2": 36, "ti2v": 48, "fun-control-2.2": 52},
}


@dataclass(frozen=True)
class WanTask:
    """Requirements of a `--task` on the checkpoint, and its defaults for generation."""

    name: str
    # t2v, i2v, flf2v: what conditions the video; ti2v: a text, and an image if there is one
    kind: str
    has_control: bool
    dim: int  # of the released checkpoint; if a file has another, this is logged and the file used
    steps: int
    frames: int
    sizes: tuple[tuple[int, int], ...]  # width, height as trained
    repositories: tuple[str, ...]  # of the release, on the hub
    version: str = "2.1"
    flow_shift: float = 5.0
    guidance: float = 5.0
    high_noise_guidance: float | None = None  # of the second expert; None: there is one expert
    boundary: float | None = None  # timestep from which on the high-noise expert works
    fps: float = 16.0
    # with which a training batch of clips keeps its first latent frame clean; None: the model cannot
    first_frame_probability: float | None = None

    @property
    def release(self) -> ModelRelease:
        """Where the task's model comes from."""
        return ModelRelease(
            self.repositories, "Apache-2.0", "apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0"
        )

    @property
    def takes_image(self) -> bool:
        """Whether an image is among the condition channels of the network; a task with it needs one."""
        return self.kind in {"i2v", "flf2v"}

    @property
    def keeps_image(self) -> bool:
        """Whether an image, if one is given, becomes the first latent frame, which stays clean."""
        return self.kind == "ti2v"

    @property
    def has_features(self) -> bool:
        """Whether the network attends to features of the image, which CLIP makes."""
        return self.takes_image and self.version == "2.1"

    @property
    def model_kind(self) -> str:
        """The `WanConfig.kind` that the task needs."""
        if self.has_control:
            return "fun-control" if self.version == "2.1" else "fun-control-2.2"
        return "i2v-2.2" if self.kind == "i2v" and self.version == "2.2" else self.kind

    @property
    def appends_end(self) -> bool:
        """Whether an end image becomes one more latent frame; else it is the last frame of the clip."""
        return self.kind == "i2v" and self.version == "2.1"

    @property
    def in_dim(self) -> int:
        """Input channels of the network."""
        kinds = {"flf2v": 36, **INPUT_CHANNELS[True], **INPUT_CHANNELS[False]}
        return kinds[self.model_kind]


_480P = ((480, 832), (832, 480))
_5B = ((1280, 704), (704, 1280))
_720P = ((720, 1280), (1280, 720), *_480P)
_I2V = ("Wan-AI/Wan2.1-I2V-14B-480P", "Wan-AI/Wan2.1-I2V-14B-720P")
_FUN = ("alibaba-pai/Wan2.1-Fun-14B-Control",)
_FUN_A14B = ("alibaba-pai/Wan2.2-Fun-A14B-Control",)
# Of the release's own script: VideoX-Fun, examples/wan2.2_fun/predict_v2v_control.py and its configuration
_FUN_A14B_SETTINGS: dict[str, Any] = {
    "version": "2.2",
    "guidance": 6.0,
    "high_noise_guidance": 6.0,
    "boundary": 900.0,
}
TASKS: dict[str, WanTask] = {
    task.name: task
    for task in (
        WanTask("t2v-14B", "t2v", False, 5120, 50, 81, _720P, ("Wan-AI/Wan2.1-T2V-14B",)),
        WanTask("t2v-1.3B", "t2v", False, 1536, 50, 81, _480P, ("Wan-AI/Wan2.1-T2V-1.3B",)),
        WanTask("i2v-14B", "i2v", False, 5120, 40, 81, _720P, _I2V),
        WanTask("flf2v-14B", "flf2v", False, 5120, 50, 81, _720P, ("Wan-AI/Wan2.1-FLF2V-14B-720P",)),
        WanTask("t2i-14B", "t2v", False, 5120, 50, 1, (*_720P, (1024, 1024)), ("Wan-AI/Wan2.1-T2V-14B",)),
        WanTask("t2v-1.3B-FC", "t2v", True, 1536, 50, 81, _480P, ("alibaba-pai/Wan2.1-Fun-1.3B-Control",)),
        WanTask("t2v-14B-FC", "t2v", True, 5120, 50, 81, _720P, _FUN),
        WanTask("i2v-14B-FC", "i2v", True, 5120, 40, 81, _720P, _FUN),
        WanTask(
            *("t2v-A14B", "t2v", False, 5120, 40, 81, _720P, ("Wan-AI/Wan2.2-T2V-A14B",)),
            version="2.2",
            flow_shift=12.0,
            guidance=3.0,
            high_noise_guidance=4.0,
            boundary=875.0,
        ),
        WanTask(
            *("i2v-A14B", "i2v", False, 5120, 40, 81, _720P, ("Wan-AI/Wan2.2-I2V-A14B",)),
            version="2.2",
            guidance=3.5,
            high_noise_guidance=3.5,
            boundary=900.0,
        ),
        WanTask("t2v-A14B-FC", "t2v", True, 5120, 50, 81, _720P, _FUN_A14B, **_FUN_A14B_SETTINGS),
        WanTask("i2v-A14B-FC", "i2v", True, 5120, 50, 81, _720P, _FUN_A14B, **_FUN_A14B_SETTINGS),
        WanTask(
            *("ti2v-5B", "ti2v", False, 3072, 50, 121, _5B, ("Wan-AI/Wan2.2-TI2V-5B",)),
            version="2.2",
            fps=24.0,
            # it makes videos from text and from images, so a LoRA learns both
            first_frame_probability=0.5,
        ),
    )
}

# the release's text, with which the models are used
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
FIRST_LAST_NEGATIVE_PROMPT = "镜头切换，" + NEGATIVE_PROMPT  # no cut between the two given frames

IMAGE_480P_FLOW_SHIFT = 3.0  # i2v at 480x832 or 832x480
FIRST_LAST_FLOW_SHIFT = 16.0


def default_flow_shift(task: WanTask, width: int, height: int) -> float:
    """Return the released code's shift for a task and an output size."""
    if task.kind == "flf2v":
        return FIRST_LAST_FLOW_SHIFT
    is_small = (width, height) in _480P
    return IMAGE_480P_FLOW_SHIFT if task.has_features and is_small else task.flow_shift
