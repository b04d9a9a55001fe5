"""Write a whole checkpoint as a folder in diffusers' layout, which its pipelines and `loading.py` open.

Trained networks are written from memory, frozen ones with the values of the source. All files are safetensors
and JSON.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoints.shards import IN_ONE_FILE, SavedForm
from checkpoints.tokenizers import TokenizerFiles
from encoders.clip_checkpoints import CLIP_END, CLIP_START, ClipTextConfig
from encoders.text_encoder import find_merges
from modules.atomic_write import atomic_folder, check_space
from modules.text_files import parse_json
from networks.names.texts import published_parameter
from protocols.full_model import DIT
from protocols.loading import TensorInfo
from stable_diffusion.contract import SD1, SDXL, text_encoder_name
from stable_diffusion.diffusers_parts import diffusers_version
from stable_diffusion.files import ModelType
from stable_diffusion.folders import read_settings
from stable_diffusion.loading import CheckpointPlan
from stable_diffusion.text_checkpoints import PROJECTION
from stable_diffusion.tokenizers import OPEN_CLIP_PAD, fetch_tokenizer_files
from stable_diffusion.training_files import TrainingFiles, is_inpainting
from stable_diffusion.whole_files import VAE_PART, Plans, list_plans, list_weights, read_weight

_UNET_FOLDER = "unet"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_TEXT_WEIGHTS = "model.safetensors"
_METADATA = {"format": "pt"}  # transformers rejects a file without it
_INDEX = "model_index.json"
_SCHEDULE = "scheduler/scheduler_config.json"
# schedulers of the released models; gen_img.py uses its own samplers
_SCHEDULERS: Mapping[str, Mapping[str, Any]] = {
    "sd1": {
        "_class_name": "PNDMScheduler",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
    },
    "sd2": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
}
_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
# other settings for zero terminal SNR. Source: Lin et al. 2023, arXiv 2305.08891
_ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@dataclass(frozen=True)
class NetworkFile:
    """The tensors of one network in a diffusers folder, with dtypes and shapes."""

    name: str  # its path in the folder
    weights: Mapping[str, str]  # name in the file -> name in the network here
    infos: Mapping[str, TensorInfo]  # dtype and shape in the source, by the name in the file


@dataclass(frozen=True, eq=False)
class FolderWriter:
    """Write trained checkpoints in diffusers' layout. The source stays open, in case it is deleted."""

    networks: Mapping[str, nn.Module]  # trained networks, by name
    plans: Plans
    files: Mapping[str, NetworkFile]  # by network name
    other_files: Mapping[str, bytes]  # configurations and tokenizers: path in the folder -> content
    opened: ExitStack  # keeps the files of the plans open
    form: SavedForm  # form of each network's file

    def write(self, path: Path, dtype: torch.dtype | None, metadata: Mapping[str, str]) -> None:
        """Write a folder, completely or not at all.

        Args:
            path: Folder to write.
            dtype: Dtype of the networks; None keeps the source's dtype.
            metadata: Metadata for the U-Net's file.
        """
        states = {name: network.state_dict() for name, network in self.networks.items()}
        infos = {network: self._list_infos(network, dtype) for network in self.files}
        tensor_bytes = sum(info.size_bytes for file_infos in infos.values() for info in file_infos.values())
        check_space(path, tensor_bytes + sum(map(len, self.other_files.values())))
        with atomic_folder(path) as folder:
            for network, file_infos in infos.items():
                file_metadata = {**metadata, **_METADATA} if network == DIT else _METADATA
                self.form.write_in(
                    folder / self.files[network].name,
                    file_infos,
                    partial(self._read, states, network, file_infos),
                    file_metadata,
                )
            for name, content in self.other_files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(content)

    def _read(
        self,
        states: Mapping[str, Mapping[str, Tensor]],
        network: str,
        infos: Mapping[str, TensorInfo],
        name: str,
    ) -> Tensor:
        """Return the tensor to write to a network's file: the trained one, or else the source's."""
        weight_name = self.files[network].weights[name]
        weight = read_weight(self.plans, states, network, weight_name)
        return weight.detach().to(infos[name].dtype)

    def _list_infos(self, network: str, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
        """Return dtypes and shapes of the tensors to write for one network, by tensor name."""
        infos = {}
        for name, info in self.files[network].infos.items():
            written = info.dtype if dtype is None or not info.dtype.is_floating_point else dtype
            infos[name] = TensorInfo(written, info.shape)
        return infos


def make_folder_writer(
    checkpoint: TrainingFiles,
    networks: Mapping[str, nn.Module],
    model_type: ModelType,
    form: SavedForm = IN_ONE_FILE,
) -> FolderWriter:
    """Return a writer that saves the checkpoints of a training run as folders in diffusers' layout.

    Args:
        checkpoint: The source checkpoint.
        networks: The trained networks, by name.
        model_type: What the trained model predicts.
        form: Whether each network is saved as one file or as shards.

    Raises:
        CheckpointError: If a tokenizer is missing.
    """
    opened = ExitStack()
    # vae=None: the saved VAE is the checkpoint's own, not --vae
    checkpoint_plan = opened.enter_context(replace(checkpoint, vae=None).open_plan())
    plans = list_plans(checkpoint_plan)
    files = {network: _plan_file(network, plans) for network in plans}
    other_files = _make_config_and_tokenizer_files(checkpoint, checkpoint_plan, model_type)
    return FolderWriter(networks, plans, files, other_files, opened, form)


def _plan_file(network: str, plans: Plans) -> NetworkFile:
    """Plan a network's file in diffusers' layout; text encoder tensors get transformers' names."""
    plan = plans[network]
    if network in (DIT, VAE_PART):
        folder = _UNET_FOLDER if network == DIT else network
        path = f"{folder}/{_WEIGHTS}"
        weights = {weight: weight for weight in plan.sources}
    else:
        path = f"{network}/{_TEXT_WEIGHTS}"
        weights = {
            (weight if weight == PROJECTION else published_parameter(weight)): weight
            for weight in list_weights(plan)
        }
    infos = {}
    for name_in_file, weight in weights.items():
        source = plan.sources[weight]
        # meta tensors, only for dtype and shape
        stored_tensors = [plan.checkpoint.tensors[stored_name].hollow() for stored_name in source.names]
        tensor = source.build_tensor(stored_tensors)
        infos[name_in_file] = TensorInfo(tensor.dtype, tuple(tensor.shape))
    return NetworkFile(path, weights, infos)


# Files other than weights


def _make_config_and_tokenizer_files(
    checkpoint: TrainingFiles, checkpoint_plan: CheckpointPlan, model_type: ModelType
) -> dict[str, bytes]:
    """Return the content of a diffusers folder's files, except weights, by path in the folder."""
    schedule = _describe_schedule(checkpoint.path, checkpoint_plan.model_type, model_type)
    unet_config = _describe("UNet2DConditionModel", _simplify(checkpoint_plan.unet.config))
    vae_config = {"sample_size": checkpoint_plan.kind.size, **checkpoint_plan.vae.config}
    configs = {
        f"{_UNET_FOLDER}/config.json": unet_config,
        f"{VAE_PART}/config.json": _describe("AutoencoderKL", vae_config),
        _SCHEDULE: schedule,
        _INDEX: _describe_index(checkpoint.path, checkpoint_plan, schedule["_class_name"]),
    }
    for index, plan in enumerate(checkpoint_plan.text_encoders):
        tokenizer = checkpoint.tokenizers[index]
        pad = OPEN_CLIP_PAD if plan.is_open_clip else tokenizer.end
        tokens = {"bos_token_id": tokenizer.start, "eos_token_id": tokenizer.end, "pad_token_id": pad}
        config = _describe_text_encoder(plan.load_plan.config, index, tokens)
        configs[f"{text_encoder_name(index)}/config.json"] = config
    files = {name: _as_json(config) for name, config in configs.items()}
    return files | _make_tokenizer_files(checkpoint, checkpoint_plan)


def _make_tokenizer_files(checkpoint: TrainingFiles, checkpoint_plan: CheckpointPlan) -> dict[str, bytes]:
    """Return the contents of all files in the folders tokenizer and tokenizer_2, by path."""
    files: dict[str, bytes] = {}
    are_open_clip = [plan.is_open_clip for plan in checkpoint_plan.text_encoders]
    tokenizers = fetch_tokenizer_files(checkpoint.tokenizer_cache_dir, checkpoint.path, are_open_clip)
    for index, (source, file) in enumerate(tokenizers):
        folder = text_encoder_name(index).replace("text_encoder", "tokenizer")
        for name, content in _read_tokenizer(source, file).items():
            files[f"{folder}/{name}"] = content
        tokens = {
            "bos_token": CLIP_START,
            "eos_token": CLIP_END,
            "unk_token": CLIP_END,
            "pad_token": "!" if are_open_clip[index] else CLIP_END,
        }
        default = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
        files[f"{folder}/tokenizer_config.json"] = _as_json({**default, **tokens})
        files[f"{folder}/special_tokens_map.json"] = _as_json(tokens)
    return files


def _as_json(value: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode()


def _describe(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"_class_name": name, "_diffusers_version": diffusers_version(), **config}


def _simplify(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a U-Net config in which lists of equal layer or head counts are single numbers."""
    simple = dict(config)
    for name in ("layers_per_block", "attention_head_dim"):
        value = config.get(name)
        if isinstance(value, list | tuple) and len({*value}) == 1:
            simple[name] = value[0]
    return simple


def _describe_schedule(source: Path, source_model_type: ModelType, model_type: ModelType) -> dict[str, Any]:
    """Return the content of scheduler_config.json for the trained model."""
    # It is the source folder's content if training has not changed the prediction type; otherwise the default
    # for the trained model's kind and prediction type.
    if source.is_dir() and source_model_type == model_type and (source / _SCHEDULE).is_file():
        return read_settings(source / _SCHEDULE)
    settings = dict(_SCHEDULERS[model_type.kind.name])
    if model_type.zero_terminal_snr:
        if model_type.kind is SD1:  # its PNDM cannot start from pure noise
            settings = dict(_SCHEDULERS["sd2"])
        settings |= _ZERO_SNR
    prediction = "v_prediction" if model_type.predicts_velocity else "epsilon"
    class_name = settings.pop("_class_name")
    return _describe(class_name, {**_NOISE, "prediction_type": prediction, **settings})


def _describe_index(source: Path, checkpoint_plan: CheckpointPlan, scheduler: str) -> dict[str, Any]:
    """Return the content of model_index.json: the pipeline's class and the classes of its components."""
    # If the source is a folder, other settings than components in its model_index.json are kept.
    is_xl = checkpoint_plan.kind is SDXL
    index: dict[str, Any] = {"force_zeros_for_empty_prompt": True} if is_xl else {}
    if source.is_dir() and (source / _INDEX).is_file():
        declared = read_settings(source / _INDEX)
        # components are lists [library, class]; they are replaced
        index |= {name: value for name, value in declared.items() if not isinstance(value, list | dict)}
    # Library and class of each component of a pipeline with this class of scheduler
    num_text_encoders = len(checkpoint_plan.text_encoders)
    components = {
        "scheduler": ["diffusers", scheduler],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for number in range(num_text_encoders):
        name = text_encoder_name(number)
        components[name] = ["transformers", _text_class(number)]
        components[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    index |= components
    if not is_xl:  # diffusers' pipeline expects entries for these components, even without them
        index |= {
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
        }
    model = "StableDiffusionXL" if is_xl else "StableDiffusion"
    task = "Inpaint" if is_inpainting(checkpoint_plan.unet.config) else ""
    return _describe(f"{model}{task}Pipeline", index)


def _text_class(number: int) -> str:
    return "CLIPTextModelWithProjection" if number else "CLIPTextModel"


def _describe_text_encoder(config: ClipTextConfig, index: int, tokens: Mapping[str, int]) -> dict[str, Any]:
    """Return the content of a text encoder's config.json, with the names of transformers' CLIPTextConfig."""
    dimensions = asdict(config)
    field_by_setting = {  # name in transformers -> field of `ClipTextConfig`
        "vocab_size": "vocabulary",
        "max_position_embeddings": "positions",
        "hidden_size": "dim",
        "intermediate_size": "ffn_dim",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "hidden_act": "activation",
        "layer_norm_eps": "eps",
    }
    settings = {transformers_name: dimensions[name] for transformers_name, name in field_by_setting.items()}
    return {
        "architectures": [_text_class(index)],
        "model_type": "clip_text_model",
        **settings,
        "projection_dim": config.projection_dim or config.dim,
        **tokens,
    }


def _read_tokenizer(source: TokenizerFiles, file: Path) -> dict[str, bytes]:
    """Return the contents of a tokenizer's vocab.json and merges.txt, even if it is a tokenizer.json."""
    merges = find_merges(file)
    if merges is not None:
        return {"vocab.json": source.read_bytes(file), "merges.txt": source.read_bytes(merges)}
    with source.convert_errors(file):
        content = parse_json(source.read_bytes(file).decode("utf-8"))
        model = content["model"]
        vocabulary = dict(model["vocab"])
        vocabulary |= {token["content"]: token["id"] for token in content.get("added_tokens", ())}
        lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        text = "\n".join(["#version: 0.2", *lines])
        return {"vocab.json": _as_json(vocabulary), "merges.txt": f"{text}\n".encode()}
