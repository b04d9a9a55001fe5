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
class SavedTensor:
    """A tensor to save in a checkpoint, and the network weights that it is computed from."""

    network: str  # DIT, or the name of a text encoder or the VAE
    weights: Sequence[str]  # names of its weights, in their order in the tensor
    info: TensorInfo  # dtype and shape in the source


@dataclass(frozen=True, eq=False)
class CheckpointFiles:
    """Write a training run's single-file checkpoints.

    The source file stays open, so it may be deleted during training.
    """

    networks: Mapping[str, nn.Module]  # trained networks, by name
    # by name in the file: tensors of trained networks, and all tensors if the source is a folder
    computed_tensors: Mapping[str, SavedTensor]
    plans: Plans = field(default_factory=dict)  # load plans of a folder's networks
    source: Checkpoint | None = None  # a single file
    opened: ExitStack | None = None  # keeps the files of the plans open
    prediction_markers: Sequence[str] = ()  # names of empty tensors that record what the model predicts
    keep_tokenizer: Callable[[Path], None] = lambda _: None  # puts a tokenizer next to a file

    def write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write a file, completely or not at all, with a tokenizer next to it.

        Args:
            path: Path of the file.
            dtype: Dtype of the networks; None keeps the source's dtype.
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
            dtype: Dtype of the networks; None keeps the source's dtype.
        """
        infos = {name: TensorInfo(torch.float32, (0,)) for name in self.prediction_markers}
        source_infos = dict({} if self.source is None else self.source.tensors)
        source_infos |= {name: tensor.info for name, tensor in self.computed_tensors.items()}
        for name, info in source_infos.items():
            if name.startswith(EMA):  # averages of the untrained U-Net
                continue
            is_weight = info.dtype.is_floating_point and name.startswith(NETWORKS)
            saved_dtype = dtype if dtype is not None and is_weight else info.dtype
            infos[name] = TensorInfo(saved_dtype, info.shape)
        return infos

    def _make(self, name: str, states: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
        """Compute one tensor of the saved checkpoint from the trained weights."""
        computed = self.computed_tensors.get(name)
        if computed is not None:
            weights = [
                read_weight(self.plans, states, computed.network, weight) for weight in computed.weights
            ]
            return join_released(name, weights).reshape(computed.info.shape)
        if self.source is None or name in self.prediction_markers:
            return torch.empty(0)  # only the marker's name matters
        return self.source.read(name)


def read_weight(plans: Plans, states: Mapping[str, Mapping[str, Tensor]], network: str, name: str) -> Tensor:
    """Return a network's weight: from `states` if the network is trained, otherwise from its source file."""
    if network in states:
        return states[network][name]
    plan = plans[network]
    source = plan.sources[name]
    return source.build_tensor([plan.checkpoint.read(stored) for stored in source.names])


def make_writer(
    checkpoint: TrainingFiles, networks: Mapping[str, nn.Module], model_type: ModelType
) -> CheckpointFiles:
    """Return the writer that saves the checkpoints of a training run as single files.

    Args:
        checkpoint: The source checkpoint.
        networks: The trained networks, by name.
        model_type: What the trained model predicts; empty tensors in the file record it.
    """
    if checkpoint.path.is_dir():
        return _make_writer_for_folder(checkpoint, networks, model_type)
    path = checkpoint.path
    with checkpoint.open_plan() as checkpoint_plan:
        keep_tokenizer_next_to = _make_tokenizer_copier(checkpoint, checkpoint_plan)
        plans = list_plans(checkpoint_plan)
        trained_tensors: dict[str, SavedTensor] = {}
        for name, network in networks.items():
            trained_tensors |= _plan_trained_tensors(name, network, plans[name])
    source = open_checkpoint(path)
    num_averages = sum(name.startswith(EMA) for name in source.tensors)
    if num_averages:
        logger.info(
            "Saved checkpoints omit the %d averaged tensors (model_ema.) of %s, which are of the "
            "untrained U-Net.",
            num_averages,
            path,
        )
    return CheckpointFiles(
        networks,
        trained_tensors,
        source=source,
        prediction_markers=[name for name in _list_markers(model_type) if name not in source.tensors],
        keep_tokenizer=keep_tokenizer_next_to,
    )


def _make_writer_for_folder(
    checkpoint: TrainingFiles, networks: Mapping[str, nn.Module], model_type: ModelType
) -> CheckpointFiles:
    """Return the writer of single files for a run whose source checkpoint is a diffusers folder."""
    opened = ExitStack()  # stays open: frozen networks are read when a checkpoint is written
    without_vae_option = replace(checkpoint, vae=None)  # the folder's own VAE is saved
    checkpoint_plan = opened.enter_context(without_vae_option.open_plan())
    plans = list_plans(checkpoint_plan)
    logger.info(
        "Trained checkpoints of %s are single files, with the names of the released ones.", checkpoint.path
    )
    # Map each LDM tensor name of a single file to the diffusers weights it is computed from
    tensors = {}
    unet_layers = count_layers(checkpoint_plan.unet.config)
    for ldm_name, weight in ldm_unet_names(unet_layers, checkpoint_plan.unet.sources):
        tensors[ldm_name] = _plan_ldm_tensor(ldm_name, DIT, [weight], plans)
    for index, text_encoder in enumerate(checkpoint_plan.text_encoders):
        weight_names = list_weights(text_encoder.load_plan)
        fused_weights = ldm_text_encoder_names(checkpoint_plan.kind, index, weight_names)
        for ldm_name, weights in fused_weights.items():
            tensors[ldm_name] = _plan_ldm_tensor(ldm_name, text_encoder_name(index), weights, plans)
    for weight in checkpoint_plan.vae.sources:
        ldm_name = ldm_vae_name(weight)
        tensors[ldm_name] = _plan_ldm_tensor(ldm_name, VAE_PART, [weight], plans)
    return CheckpointFiles(
        networks,
        tensors,
        plans,
        opened=opened,
        prediction_markers=_list_markers(model_type),
        keep_tokenizer=_make_tokenizer_copier(checkpoint, checkpoint_plan),
    )


def _make_tokenizer_copier(
    checkpoint: TrainingFiles, checkpoint_plan: CheckpointPlan
) -> Callable[[Path], None]:
    """Return a function that copies the source's tokenizer next to a saved checkpoint."""
    # With --tokenizer_cache_dir the function does nothing, because printed commands contain this option too.
    if checkpoint.tokenizer_cache_dir is not None:
        return lambda _: None
    are_open_clip = [text.is_open_clip for text in checkpoint_plan.text_encoders]
    return lambda path: keep_tokenizer(checkpoint.path, path, are_open_clip)


def list_plans(checkpoint_plan: CheckpointPlan) -> Plans:
    """Return each network's load plan, keyed by its name in training."""
    texts = {
        text_encoder_name(index): text.load_plan for index, text in enumerate(checkpoint_plan.text_encoders)
    }
    return {DIT: checkpoint_plan.unet, **texts, VAE_PART: checkpoint_plan.vae}


def _list_markers(model_type: ModelType) -> list[str]:
    """Return the names of the empty tensors that mark v-prediction and zero terminal SNR in a file."""
    names = []
    if model_type.predicts_velocity:
        names.append(V_PRED)
    if model_type.zero_terminal_snr:
        names.append(ZTSNR)
    return names


def _plan_trained_tensors(name: str, network: nn.Module, plan: LoadPlan[Any]) -> dict[str, SavedTensor]:
    """Map each tensor name of a single-file checkpoint to the network weights that it is computed from."""
    # by tensor name in the file; several weights if it fuses them, as OpenCLIP's query, key and value
    weights: dict[str, list[str]] = {}
    infos: dict[str, TensorInfo] = {}
    for weight, trained in network.state_dict().items():
        (stored_name,) = plan.sources[weight].names
        name_in_file = plan.checkpoint.stored_name(stored_name)
        weights.setdefault(name_in_file, []).append(weight)
        info = plan.checkpoint.tensors[stored_name]
        if weight == FIRST_LAYER:  # for inpainting it may be wider than in the source
            info = TensorInfo(info.dtype, tuple(trained.shape))
        infos[name_in_file] = info
    return {
        name_in_file: SavedTensor(name, weight_names, infos[name_in_file])
        for name_in_file, weight_names in weights.items()
    }


def list_weights(plan: LoadPlan[Any]) -> list[str]:
    """Return a text encoder's weight names, without tensors that only files have, such as position_ids."""
    with on_meta_device():
        known = ClipText(plan.config).state_dict().keys()
    return [name for name in plan.sources if name in known]


def _plan_ldm_tensor(released: str, network: str, weights: Sequence[str], plans: Plans) -> SavedTensor:
    """Return how to compute a single-file checkpoint's tensor from the weights of a diffusers folder."""
    plan = plans[network]
    meta_tensors = []  # for dtype and shape
    for weight in weights:
        source = plan.sources[weight]
        meta_tensors.append(
            source.build_tensor([plan.checkpoint.tensors[name].hollow() for name in source.names])
        )
    joined = join_released(released, meta_tensors)
    shape = ldm_vae_shape(released, tuple(joined.shape))
    return SavedTensor(network, weights, TensorInfo(joined.dtype, shape))
