"""The recorded cases of interpolation: networks with the weights that they were recorded with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from post.interpolation.layers import EncodedPicture, FlowEstimator
from post.interpolation.motion import GimmVfi, Interpolation
from tests.golden_cases import make_weights
from tests.manifests import tensor_list


def recorded_weights(manifest: str, damped: Mapping[str, float]) -> dict[str, Tensor]:
    """The weights of a published file by the rule. damped: beginning or middle of a name -> factor."""
    table = [
        [name, list(shape)]
        for name, (dtype, shape) in tensor_list(manifest).items()
        if dtype == "F32" and name != "g_filter"
    ]
    weights = make_weights(manifest, table)
    for name in weights:
        for part, factor in damped.items():
            if part in name:
                weights[name] = weights[name] * factor
    return weights


def write_recorded(folder: Path, case: Mapping[str, Any], main: str, flow: str) -> tuple[Path, Path]:
    """Write both files of a case into a folder, under their published names."""
    paths = (
        folder / f"{main.replace('-', '_')}_arb_lpips_fp32.safetensors",
        folder / f"{flow}_fp32.safetensors",
    )
    save_file(
        {**recorded_weights(main, case["damped_main"]), "g_filter": torch.zeros(1, 1, 1, 3, 3)}, paths[0]
    )
    save_file(recorded_weights(flow, {"flow_head.conv2": 0.05}), paths[1])
    return paths


@torch.no_grad()
def check_recorded(
    case: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    network: GimmVfi,
    estimator: FlowEstimator,
    times: Sequence[float] | None = None,
) -> None:
    """Compare flows, motion and, at these times or all, pictures of a whole network with those of a case."""
    times = times or case["times"]
    recording = Recording(estimator)
    whole = Interpolation(network, recording)
    first, second = (whole.frame(tensors[f"image{number}"] / 255) for number in (0, 1))
    pictures = whole.between(first, second, times)
    made = [next(pictures)]
    limit = {"rtol": 0, "atol": case["tolerance"]["flow"]["atol"]}
    forth, back = recording.flows
    torch.testing.assert_close(forth[..., ::4, ::4], tensors["flow01_every_4th"], **limit)
    torch.testing.assert_close(back[..., ::4, ::4], tensors["flow10_every_4th"], **limit)
    motion = network.motion.between(forth, back)
    for time in case["times"]:
        flow = network.motion.at(motion, time)
        torch.testing.assert_close(flow[..., ::4, ::4], tensors[f"flowt_t{time}_every_4th"], **limit)
    for time, picture in zip(times, (*made, *pictures), strict=True):
        # the case allows 5e-4; float32 is better than that
        torch.testing.assert_close(
            picture[..., ::2, ::2], tensors[f"frame_t{time}_every_2nd"], rtol=0, atol=1e-4
        )


class Recording:
    """An estimator that keeps its flows, so that they need not be computed twice."""

    def __init__(self, inner: FlowEstimator) -> None:
        self.inner = inner
        self.flows: list[Tensor] = []

    def encode(self, image: Tensor) -> EncodedPicture:
        return self.inner.encode(image)

    def flow(self, first: EncodedPicture, second: EncodedPicture) -> Tensor:
        self.flows.append(self.inner.flow(first, second))
        return self.flows[-1]
