"""Wan2.1 variants as data: the dimensions of a transformer, and the meaning of each `--task`."""

from dataclasses import dataclass

from modules.contract.release import ModelRelease

HEAD_WIDTH = 128  # of all released sizes; cannot be read from the tensors of a file


@dataclass(frozen=True)
class WanConfig:
    """Dimensions of a Wan2.1 transformer, read from a checkpoint's tensors."""

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
    has_ref_conv: bool = False  # Fun-Control v1.1

    @property
    def kind(self) -> str:
        """What the model is conditioned on: t2v, i2v, flf2v or fun-control."""
        if self.in_dim == 48:
            return "fun-control"
        if self.image_positions:
            return "flf2v"
        return "i2v" if self.has_image else "t2v"


@dataclass(frozen=True)
class WanTask:
    """What a `--task` requires of the checkpoint, and its defaults for generation."""

    name: str
    kind: str  # t2v, i2v, flf2v: what conditions the video
    has_control: bool
    dim: int  # of the released checkpoint; if a file has another, this is logged and the file used
    steps: int
    frames: int
    sizes: tuple[tuple[int, int], ...]  # width, height as trained
    repositories: tuple[str, ...]  # of the release, on the hub

    @property
    def release(self) -> ModelRelease:
        """Where the task's model comes from."""
        return ModelRelease(
            self.repositories, "Apache-2.0", "apache-2.0", "https://www.apache.org/licenses/LICENSE-2.0"
        )

    @property
    def in_dim(self) -> int:
        """Input channels: noise 16, plus control 16 and image 16, or mask 4 and image 16."""
        if self.has_control:
            return 48
        return 16 if self.kind == "t2v" else 36


_480P = ((480, 832), (832, 480))
_720P = ((720, 1280), (1280, 720), *_480P)
_I2V = ("Wan-AI/Wan2.1-I2V-14B-480P", "Wan-AI/Wan2.1-I2V-14B-720P")
_FUN = ("alibaba-pai/Wan2.1-Fun-14B-Control",)

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
    )
}

# the release's text, with which the models are used
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
FIRST_LAST_NEGATIVE_PROMPT = "镜头切换，" + NEGATIVE_PROMPT  # no cut between the two given frames

FLOW_SHIFT = 5.0
IMAGE_480P_FLOW_SHIFT = 3.0  # i2v at 480x832 or 832x480
FIRST_LAST_FLOW_SHIFT = 16.0


def default_flow_shift(task: WanTask, width: int, height: int) -> float:
    """Return the released code's shift for a task and an output size."""
    if task.kind == "flf2v":
        return FIRST_LAST_FLOW_SHIFT
    return IMAGE_480P_FLOW_SHIFT if task.kind == "i2v" and (width, height) in _480P else FLOW_SHIFT
