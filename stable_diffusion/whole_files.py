"""Write a whole checkpoint after a training: what was trained from the networks, all else from the source.

A file has the tensor names and dtypes of the one that was trained. Frozen parts are copied byte by byte; so
the VAE is that of the source, also if latents were made with another one.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan
from checkpoints.opening import Checkpoint, open_checkpoint
from checkpoints.writing import stream_tensors
from contract.loading import TensorInfo
from contract.whole import DIT
from stable_diffusion.contract import text_encoder_name
from stable_diffusion.files import EMA, UNET, VAE
from stable_diffusion.text_checkpoints import CLIP_L, OPEN_CLIP, SD1_TEXT, SD2_TEXT, join_released
from stable_diffusion.training_files import TrainingFiles

logger = logging.getLogger(__name__)

NETWORKS = (UNET, VAE, CLIP_L, OPEN_CLIP, SD1_TEXT, SD2_TEXT)  # beginnings of the names of their tensors


@dataclass(frozen=True)
class LearnedTensor:
    """A tensor of the file that is made of weights of a network that learns."""

    network: str  # name of the network: DIT, or that of a text encoder
    weights: Sequence[str]  # names of its weights, in their order in the tensor

    def make(self, info: TensorInfo, name: str, states: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Return the tensor. name: in the file, as `info`. states: weights of each network by name."""
        weights = [states[self.network][weight] for weight in self.weights]
        return join_released(name, weights).reshape(info.shape)


@dataclass(frozen=True, eq=False)
class SingleFileWriter:
    """Writes checkpoints with the names of a single file.

    The source stays open while the training runs, so that nobody can take it away.
    """

    source: Checkpoint
    networks: Mapping[str, nn.Module]  # that learn
    learned: Mapping[str, LearnedTensor]  # by the names in the file

    def write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write a file, completely or not at all. dtype: of the networks; None: that of the source."""
        states = {name: network.state_dict() for name, network in self.networks.items()}
        infos: dict[str, TensorInfo] = {}
        for name, info in self.source.tensors.items():
            if name.startswith(EMA):
                continue
            changes = dtype is not None and info.dtype.is_floating_point and name.startswith(NETWORKS)
            infos[name] = TensorInfo(dtype if changes and dtype is not None else info.dtype, info.shape)

        def read(name: str) -> Tensor:
            learned = self.learned.get(name)
            tensor = self.source.read(name) if learned is None else learned.make(infos[name], name, states)
            return tensor.detach().to(infos[name].dtype)

        stream_tensors(path, infos, read, metadata)


def make_writer(checkpoint: TrainingFiles, networks: Mapping[str, nn.Module]) -> SingleFileWriter:
    """Return the writer for the checkpoint of a training. networks: those that learn."""
    learned: dict[str, LearnedTensor] = {}
    path = checkpoint.path
    with checkpoint.opened() as release:
        texts = {text_encoder_name(number): text.network for number, text in enumerate(release.texts)}
        plans: Mapping[str, LoadPlan[object]] = {DIT: release.unet, **texts}
        for name, network in networks.items():
            learned |= _invert(name, network, plans[name])
    source = open_checkpoint(path)
    averages = sum(name.startswith(EMA) for name in source.tensors)
    if averages:
        logger.info(
            "Saved checkpoints leave out the %d averaged tensors (model_ema.) of %s, which are of the "
            "untrained U-Net.",
            averages,
            path,
        )
    return SingleFileWriter(source, networks, learned)


def _invert(name: str, network: nn.Module, plan: LoadPlan[object]) -> dict[str, LearnedTensor]:
    """Return how each tensor of a file is made of a network's weights, by its name in the file."""
    weights: dict[str, list[str]] = {}
    for weight in network.state_dict():
        source = plan.sources[weight]
        weights.setdefault(plan.checkpoint.stored_name(*source.names), []).append(weight)
    return {tensor: LearnedTensor(name, names) for tensor, names in weights.items()}
