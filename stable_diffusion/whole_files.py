"""Write a full checkpoint: trained tensors from the networks, all others from the source file.

A file has the tensor names and dtypes of the one that was trained, and its frozen parts are copied byte by
byte, so the VAE is the source's even if latents were made with another one. A model that was trained from a
folder in diffusers' layout becomes one file with the released names.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.dialects import LoadPlan
from checkpoints.filling import on_meta_device
from checkpoints.opening import Checkpoint, open_checkpoint
from checkpoints.writing import stream_tensors
from encoders.clip_layers import ClipText
from protocols.full_model import DIT
from protocols.loading import TensorInfo
from stable_diffusion.contract import text_encoder_name
from stable_diffusion.files import EMA, UNET, V_PRED, VAE, ZTSNR, ModelType
from stable_diffusion.loading import CheckpointPlan
from stable_diffusion.released_names import (
    ldm_text_encoder_names,
    ldm_unet_names,
    ldm_vae_name,
    ldm_vae_shape,
)
from stable_diffusion.text_checkpoints import CLIP_L, OPEN_CLIP, SD1_TEXT, SD2_TEXT, join_released
from stable_diffusion.tokenizers import keep_tokenizer
from stable_diffusion.training_files import FIRST_LAYER, TrainingFiles, count_layers

logger = logging.getLogger(__name__)

NETWORKS = (UNET, VAE, CLIP_L, OPEN_CLIP, SD1_TEXT, SD2_TEXT)  # prefixes of tensor names
VAE_PART = "vae"
Plans = Mapping[str, LoadPlan[Any]]  # by network name


@dataclass(frozen=True)
class PartTensor:
    """A tensor of a saved checkpoint and the weights of one network that it is computed from."""

    network: str  # DIT, or the name of a text encoder or the VAE
    weights: Sequence[str]  # names of its weights, in their order in the tensor
    info: TensorInfo  # dtype and shape in the source


@dataclass(frozen=True, eq=False)
class CheckpointFiles:
    """Write the single-file checkpoints of a training run.

    The source file stays open, so it may be deleted during the training.
    """

    networks: Mapping[str, nn.Module]  # trained networks, by name
    parts: Mapping[str, PartTensor]  # by name in the file: trained tensors, and those from a folder
    plans: Plans = field(default_factory=dict)  # load plans of a folder's networks
    source: Checkpoint | None = None  # a single file
    opened: ExitStack | None = None  # keeps the files of the plans open
    marks: Sequence[str] = ()  # names of empty tensors that record what the model predicts
    keep_tokenizer: Callable[[Path], None] = lambda _: None  # puts a tokenizer next to a file

    def write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write a file, completely or not at all, with a tokenizer next to it.

        Args:
            path: Path of the file.
            dtype: Dtype of the networks; None keeps that of the source.
            metadata: Metadata of the file.
        """
        self.keep_tokenizer(path)
        states = {name: network.state_dict() for name, network in self.networks.items()}
        infos = self.list_infos(dtype)

        def read(name: str) -> Tensor:
            return self._make(name, states).detach().to(infos[name].dtype)

        stream_tensors(path, infos, read, metadata)

    def list_infos(self, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
        """Return dtypes and shapes of the tensors in a saved checkpoint.

        Args:
            dtype: Dtype of the networks; None keeps that of the source.
        """
        infos = {name: TensorInfo(torch.float32, (0,)) for name in self.marks}
        stored = {} if self.source is None else self.source.tensors
        for name, info in (stored | {name: part.info for name, part in self.parts.items()}).items():
            is_of_network = info.dtype.is_floating_point and name.startswith(NETWORKS)
            tensor_dtype = info.dtype if dtype is None or not is_of_network else dtype
            if not name.startswith(EMA):
                infos[name] = TensorInfo(tensor_dtype, info.shape)
        return infos

    def _make(self, name: str, states: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Compute one tensor of the saved checkpoint from the trained weights.

        Args:
            name: Name of the tensor.
            states: Weights of the trained networks, by network name.
        """
        part = self.parts.get(name)
        if part is not None:
            weights = [read_weight(self.plans, states, part.network, weight) for weight in part.weights]
            return join_released(name, weights).reshape(part.info.shape)
        return torch.empty(0) if self.source is None or name in self.marks else self.source.read(name)


def read_weight(plans: Plans, states: Mapping[str, Mapping[str, Tensor]], network: str, name: str) -> Tensor:
    """Return a network's weight: from `states` if it is trained, otherwise from its source file."""
    if network in states:
        return states[network][name]
    plan = plans[network]
    source = plan.sources[name]
    return source.make([plan.checkpoint.read(stored) for stored in source.names])


def make_writer(
    checkpoint: TrainingFiles, networks: Mapping[str, nn.Module], marks: ModelType
) -> CheckpointFiles:
    """Return the writer for the checkpoint of a training run.

    Args:
        checkpoint: The source checkpoint.
        networks: The trained networks, by name.
        marks: What the trained model predicts, which the file records by empty tensors.
    """
    path = checkpoint.path
    if path.is_dir():
        opened = ExitStack()  # stays open: frozen parts are read when a checkpoint is written
        checkpoint_plan = opened.enter_context(
            replace(checkpoint, vae=None).open_plan()
        )  # not the VAE of --vae
        plans = list_plans(checkpoint_plan)
        logger.info("Trained checkpoints of %s are single files, with the names of the released ones.", path)
        parts = _name_parts(checkpoint_plan, plans)
        return CheckpointFiles(
            networks,
            parts,
            plans,
            opened=opened,
            marks=_list_marks(marks),
            keep_tokenizer=_make_keeper(checkpoint, checkpoint_plan),
        )
    with checkpoint.open_plan() as checkpoint_plan:
        keeper = _make_keeper(checkpoint, checkpoint_plan)
        plans = list_plans(checkpoint_plan)
        parts = {}
        for name, network in networks.items():
            parts |= _invert(name, network, plans[name])
    source = open_checkpoint(path)
    averages = sum(name.startswith(EMA) for name in source.tensors)
    if averages:
        logger.info(
            "Saved checkpoints leave out the %d averaged tensors (model_ema.) of %s, which are of the "
            "untrained U-Net.",
            averages,
            path,
        )
    added = [name for name in _list_marks(marks) if name not in source.tensors]
    return CheckpointFiles(networks, parts, source=source, marks=added, keep_tokenizer=keeper)


def _make_keeper(checkpoint: TrainingFiles, checkpoint_plan: CheckpointPlan) -> Callable[[Path], None]:
    """Return a function that copies the source's tokenizer next to a saved checkpoint.

    With --tokenizer_cache_dir the function does nothing, because printed commands contain this option too.
    """
    if checkpoint.tokenizer_cache_dir is not None:
        return lambda _: None
    are_open_clip = [text.is_open_clip for text in checkpoint_plan.text_encoders]
    return lambda path: keep_tokenizer(checkpoint.path, path, are_open_clip)


def list_plans(checkpoint_plan: CheckpointPlan) -> Plans:
    """Return the load plan of each network, by the network's name in training."""
    texts = {
        text_encoder_name(index): text.load_plan for index, text in enumerate(checkpoint_plan.text_encoders)
    }
    return {DIT: checkpoint_plan.unet, **texts, VAE_PART: checkpoint_plan.vae}


def _list_marks(marks: ModelType) -> list[str]:
    """Return the names of the empty tensors that mark v-prediction and zero terminal SNR in a file."""
    names = []
    if marks.predicts_velocity:
        names.append(V_PRED)
    if marks.zero_terminal_snr:
        names.append(ZTSNR)
    return names


def _invert(name: str, network: nn.Module, plan: LoadPlan[Any]) -> dict[str, PartTensor]:
    """Map each tensor name of a single-file checkpoint to the network weights that it is computed from."""
    weights: dict[str, list[str]] = {}
    infos: dict[str, TensorInfo] = {}
    for weight, learned in network.state_dict().items():
        (stored,) = plan.sources[weight].names
        released = plan.checkpoint.stored_name(stored)
        weights.setdefault(released, []).append(weight)
        infos[released] = plan.checkpoint.tensors[stored]
        if weight == FIRST_LAYER:  # for inpainting it may be wider than in the source
            infos[released] = TensorInfo(infos[released].dtype, tuple(learned.shape))
    return {released: PartTensor(name, names, infos[released]) for released, names in weights.items()}


def _name_parts(checkpoint_plan: CheckpointPlan, plans: Plans) -> dict[str, PartTensor]:
    """Map each tensor name of a single file to the folder's weights that it is computed from."""
    unet = ldm_unet_names(count_layers(checkpoint_plan.unet.config), checkpoint_plan.unet.sources)
    parts = {released: _join_part(released, DIT, [ours], plans) for released, ours in unet}
    for index, text in enumerate(checkpoint_plan.text_encoders):
        name = text_encoder_name(index)
        joined = ldm_text_encoder_names(checkpoint_plan.kind, index, list_weights(text.load_plan))
        parts |= {released: _join_part(released, name, ours, plans) for released, ours in joined.items()}
    for ours in checkpoint_plan.vae.sources:
        released = ldm_vae_name(ours)
        parts[released] = _join_part(released, VAE_PART, [ours], plans)
    return parts


def list_weights(plan: LoadPlan[Any]) -> list[str]:
    """Return a text encoder's weight names, without tensors that only files have, such as position_ids."""
    with on_meta_device():
        known = ClipText(plan.config).state_dict().keys()
    return [name for name in plan.sources if name in known]


def _join_part(released: str, network: str, weights: Sequence[str], plans: Plans) -> PartTensor:
    """Return how a tensor of a single file is computed from the weights of a folder's network."""
    plan = plans[network]
    hollow = []
    for weight in weights:
        source = plan.sources[weight]
        hollow.append(source.make([plan.checkpoint.tensors[name].hollow() for name in source.names]))
    joined = join_released(released, hollow)
    shape = ldm_vae_shape(released, tuple(joined.shape))
    return PartTensor(network, weights, TensorInfo(joined.dtype, shape))
