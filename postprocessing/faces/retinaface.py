"""RetinaFace: find faces, their eyes, noses and corners of the mouth in one pass over three scales.

Source: Deng et al. 2019, arXiv 1905.00641, as in the files of facexlib (from
biubug6/Pytorch_Retinaface, MIT).
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from checkpoints.dialects import LoadPlan, count, load_planned, make_shape_reader, make_wrong_kind_error
from checkpoints.opening import Checkpoint, list_tensor_sources
from modules.devices import dtype_name
from modules.errors import CheckpointError
from modules.integers import ceil_div
from modules.layers.convolution import memory_formats, set_memory_format
from postprocessing.contract import batch_norm
from postprocessing.faces.boxes import FoundFace, select_best, shrunk
from postprocessing.faces.retinaface_bodies import (
    MOBILE_STRIDES,
    MobileNet,
    MobileNetConfig,
    ResNet,
    ResNetConfig,
)

logger = logging.getLogger(__name__)

# Letters: B batch, C channels, H W height and width of the image, h w of features, N anchors

MEAN = (104.0, 117.0, 123.0)  # mean blue, green and red of the training images
STEPS = (8, 16, 32)  # pixels between the anchors of each scale
SIZES = ((16, 32), (64, 128), (256, 512))  # sides of the anchors of each scale: two at each place
CENTER_SCALE, SIZE_SCALE = 0.1, 0.2  # scales of the heads' output
MAX_OVERLAP = 0.4
NARROW = 64  # networks up to this width use leaky ReLUs
RELEASED_FILES = (
    "detection_Resnet50_Final or detection_mobilenet0.25_Final (.pth or .safetensors), or an .onnx of YuNet "
    "or of a YOLO for faces"
)


@dataclass(frozen=True)
class RetinaFaceConfig:
    """Backbone and channel count of a RetinaFace."""

    body: ResNetConfig | MobileNetConfig
    width: int  # channels of the features that the heads take


class Pyramid(nn.Module):
    """Feature pyramid: adds coarser features to each finer scale."""

    def __init__(self, widths: Sequence[int], width: int, slope: float) -> None:
        super().__init__()
        self.output1, self.output2, self.output3 = (_make_conv(inner, width, 1, slope) for inner in widths)
        self.merge1 = _make_conv(width, width, 3, slope)
        self.merge2 = _make_conv(width, width, 3, slope)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return three feature maps, fine to coarse; each includes the coarser ones, upsampled."""
        fine, middle, coarse = self.output1(features[0]), self.output2(features[1]), self.output3(features[2])
        middle = self.merge2(middle + interpolate(coarse, size=middle.shape[2:], mode="nearest"))
        fine = self.merge1(fine + interpolate(middle, size=fine.shape[2:], mode="nearest"))
        return [fine, middle, coarse]


class Context(nn.Module):
    """Concatenate features of 3x3, 5x5 and 7x7 neighborhoods; larger ones use several convolutions."""

    def __init__(self, width: int, slope: float) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.conv3X3 = _make_conv(width, half, 3, None)
        self.conv5X5_1 = _make_conv(width, quarter, 3, slope)
        self.conv5X5_2 = _make_conv(quarter, quarter, 3, None)
        self.conv7X7_2 = _make_conv(quarter, quarter, 3, slope)
        self.conv7x7_3 = _make_conv(quarter, quarter, 3, None)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of three neighborhood sizes, concatenated along channels."""
        shared = self.conv5X5_1(x)
        views = [self.conv3X3(x), self.conv5X5_2(shared), self.conv7x7_3(self.conv7X7_2(shared))]
        return relu(torch.cat(views, dim=1))


class AnchorHead(nn.Module):
    """Predict `values` numbers for each anchor box."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Conv2d(width, len(SIZES[0]) * values, 1)
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        """Return the predictions, B N values, row by row, with consecutive anchors for each position.

        Args:
            x: Features, B C h w.
        """
        return rearrange(self.conv1x1(x), "b (a v) h w -> b (h w a) v", v=self.values)


class RetinaFace(nn.Module):
    """RetinaFace network with the module names of the published files."""

    def __init__(self, config: RetinaFaceConfig) -> None:
        super().__init__()
        slope = 0.1 if config.width <= NARROW else 0.0
        body = config.body
        self.body = MobileNet(body) if isinstance(body, MobileNetConfig) else ResNet(body)
        self.fpn = Pyramid(body.widths, config.width, slope)
        self.ssh1, self.ssh2, self.ssh3 = (Context(config.width, slope) for _ in STEPS)
        self.ClassHead = nn.ModuleList(AnchorHead(config.width, 2) for _ in STEPS)
        self.BboxHead = nn.ModuleList(AnchorHead(config.width, 4) for _ in STEPS)
        self.LandmarkHead = nn.ModuleList(AnchorHead(config.width, 10) for _ in STEPS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores B N (0..1), and boxes B N 4 and landmarks B N 10 relative to the anchors; float32.

        Args:
            x: Images, B 3 H W, in the order blue, green, red, 0..255 minus MEAN.
        """
        fine, middle, coarse = self.fpn(self.body(x))
        scales = [self.ssh1(fine), self.ssh2(middle), self.ssh3(coarse)]

        def run_heads(heads: nn.ModuleList) -> Tensor:
            return torch.cat([head(scale) for head, scale in zip(heads, scales, strict=True)], dim=1).float()

        classes = run_heads(self.ClassHead)
        boxes = run_heads(self.BboxHead)
        landmarks = run_heads(self.LandmarkHead)
        # class 0 is the background, class 1 a face
        return classes.softmax(dim=-1)[..., 1], boxes, landmarks


@lru_cache(maxsize=4)
def anchors(height: int, width: int) -> Tensor:
    """Return RetinaFace's anchors, N 4: center x and y, width, height as fractions of the image sides."""
    anchors_by_stride = []
    for stride, sizes in zip(STEPS, SIZES, strict=True):
        rows = torch.arange(ceil_div(height, stride), dtype=torch.float64)
        columns = torch.arange(ceil_div(width, stride), dtype=torch.float64)
        y, x = torch.meshgrid(
            (rows + 0.5) * stride / height,
            (columns + 0.5) * stride / width,
            indexing="ij",
        )
        # positions 1 2, repeated for the sizes of anchors at each position
        centers = torch.stack([x, y], dim=-1).reshape(-1, 1, 2).expand(-1, len(sizes), -1)
        extents = torch.tensor([[size / width, size / height] for size in sizes], dtype=torch.float64)
        # width and height of each anchor, equal at all positions
        extents = extents.expand(len(centers), -1, -1)
        anchors_by_stride.append(torch.cat([centers, extents], dim=-1).reshape(-1, 4))
    return torch.cat(anchors_by_stride).float()


def decode_boxes(values: Tensor, priors: Tensor) -> Tensor:
    """Convert network outputs and anchors (both N 4) to boxes (left, top, right, bottom)."""
    center = priors[:, :2] + CENTER_SCALE * values[:, :2] * priors[:, 2:]
    half = priors[:, 2:] * torch.exp(SIZE_SCALE * values[:, 2:]) / 2
    return torch.cat([center - half, center + half], dim=-1)


def decode_landmarks(values: Tensor, priors: Tensor) -> Tensor:
    """Convert network outputs (N 10) and anchors (N 4) to landmarks (N 5 2)."""
    offsets = rearrange(values, "n (p d) -> n p d", d=2)
    return priors[:, None, :2] + CENTER_SCALE * offsets * priors[:, None, 2:]


@dataclass(frozen=True)
class RetinaFaceDetector:
    """Finds faces with a loaded RetinaFace; large images are reduced to a short side of `side`."""

    network: RetinaFace
    input_size: int | None  # None: every image at its full size
    device: torch.device

    @torch.inference_mode()
    def find(self, pixels: NDArray[np.uint8], least_score: float) -> Sequence[FoundFace]:
        """Return the faces in an image (H W 3, RGB) with at least `least_score`, best first."""
        height, width = pixels.shape[:2]
        scale = 1.0 if self.input_size is None else min(1.0, self.input_size / min(height, width))
        image = self._to_input(shrunk(pixels, scale))
        scores, boxes, landmarks = (output[0].cpu() for output in self._run(image))
        selected = (scores >= least_score).nonzero()[:, 0]
        selected_anchors = anchors(*image.shape[2:])[selected]
        size = torch.tensor([width, height], dtype=torch.float32)
        # decoded positions are fractions of the image; `repeat` gives width, height, width, height
        corners = (decode_boxes(boxes[selected], selected_anchors) * size.repeat(2)).numpy()
        points = (decode_landmarks(landmarks[selected], selected_anchors) * size).numpy()
        selected_scores = scores[selected].numpy()
        faces = []
        for index in select_best(corners, selected_scores, MAX_OVERLAP):
            box = tuple(corners[index].tolist())
            faces.append(FoundFace(box, float(selected_scores[index]), points[index]))
        return faces

    def _run(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run RetinaFace; if its output is not finite in half precision, switch to float32 permanently."""
        dtype = next(self.network.parameters()).dtype
        outputs: tuple[Tensor, Tensor, Tensor] = self.network(image.to(dtype))
        if all(bool(output.isfinite().all()) for output in outputs):
            return outputs
        if dtype == torch.float32:
            raise CheckpointError(
                "The result of RetinaFace is NaN or infinite: its file may be damaged. Download or copy it "
                "again."
            )
        logger.info("A result of RetinaFace in %s is not finite: it continues in float32.", dtype_name(dtype))
        self.network.float()
        return self._run(image)

    def _to_input(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Convert H W 3 (RGB) to 1 3 H W float32: blue, green, red minus MEAN, on the device."""
        blue_first = torch.from_numpy(np.ascontiguousarray(pixels[..., ::-1])).to(self.device)
        image = rearrange(blue_first, "h w c -> 1 c h w").float()
        image = image - torch.tensor(MEAN, device=self.device).view(1, 3, 1, 1)
        return image.contiguous(memory_format=memory_formats(self.device)[1])


def read_retinaface(checkpoint: Checkpoint, option: str) -> LoadPlan[RetinaFaceConfig]:
    """Plan the loading of a RetinaFace with either body, of any width.

    Raises:
        CheckpointError: If the file is not a RetinaFace file.
    """
    checkpoint = checkpoint.without_prefix("module.")
    tensor_names = checkpoint.tensors
    is_resnet = "body.conv1.weight" in tensor_names
    is_mobile = "body.stage1.0.0.weight" in tensor_names
    if "BboxHead.0.conv1x1.weight" not in tensor_names or not (is_resnet or is_mobile):
        raise make_wrong_kind_error(checkpoint, "a detector of faces", option, RELEASED_FILES)
    sources = list_tensor_sources(checkpoint)
    shape_error = CheckpointError(
        f"{checkpoint.path} is not a RetinaFace: one of its tensors has an unexpected shape. Pass "
        f"{RELEASED_FILES} to {option}.",
        checkpoint.path,
    )
    shape = make_shape_reader(checkpoint, sources, shape_error)
    body: ResNetConfig | MobileNetConfig = (
        _read_resnet(tensor_names, shape) if is_resnet else _read_mobile_net(shape)
    )
    config = RetinaFaceConfig(body, shape("fpn.output1.0.weight")[0])
    return LoadPlan(config, checkpoint, sources, ignore=("*.num_batches_tracked",))


def _read_resnet(names: Iterable[str], shape: Callable[..., tuple[int, ...]]) -> ResNetConfig:
    layers = [f"body.layer{number}" for number in (1, 2, 3, 4)]
    last = [shape(f"{layer}.0.conv3.weight") for layer in layers]
    return ResNetConfig(
        stem=shape("body.conv1.weight")[0],
        blocks=tuple(count(names, rf"{layer}\.\d+") for layer in layers),
        inner=tuple(sizes[1] for sizes in last),
        outer=tuple(sizes[0] for sizes in last),
    )


def _read_mobile_net(shape: Callable[..., tuple[int, ...]]) -> MobileNetConfig:
    widths = []
    for stage, strides in enumerate(MOBILE_STRIDES, start=1):
        names = [f"body.stage{stage}.{block}.3.weight" for block in range(len(strides))]
        if stage == 1:
            names[0] = "body.stage1.0.0.weight"  # the first block has no other convolution
        widths.append(tuple(shape(name)[0] for name in names))
    return MobileNetConfig(tuple(widths))


def load_retinaface(
    plan: LoadPlan[RetinaFaceConfig], device: torch.device, dtype: torch.dtype, side: int | None, option: str
) -> RetinaFaceDetector:
    """Load the network of a plan while its file is open.

    Raises:
        CheckpointError: If tensors have unexpected shapes.
    """
    network = load_planned(plan, RetinaFace, device=device, dtype=dtype, label=option)
    set_memory_format(network, device)
    return RetinaFaceDetector(network, side, device)


def _make_conv(width: int, wider: int, size: int, slope: float | None) -> nn.Sequential:
    """Return a convolution with its normalization, and a leaky ReLU unless `slope` is None."""
    layers: list[nn.Module] = [
        nn.Conv2d(width, wider, size, padding=size // 2, bias=False),
        batch_norm(wider),
    ]
    if slope is not None:
        layers.append(nn.LeakyReLU(slope))
    return nn.Sequential(*layers)
