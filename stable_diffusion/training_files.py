"""The checkpoint of a family: which model it is, and its networks, each loaded when needed.

gen_img.py loads all networks at once (`loading.py`); here the VAE and the text encoders leave the device.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from checkpoints.dialects import LoadPlan, load_planned
from checkpoints.dits import FP8_COMPUTE, select_quantized_layers
from checkpoints.filling import load_module
from checkpoints.model_files import require_file
from checkpoints.opening import fingerprint, open_checkpoint
from encoders.clip_l import ClipWords
from encoders.clip_layers import ClipText, check_activation
from encoders.tiles import sample_posterior
from modules.devices import dtype_name
from modules.errors import CheckpointError, OptionError
from modules.media.pixels import from_bytes
from modules.speed_options import SDPA
from protocols.family import DitSpec, NumberedBlocks
from protocols.loading import Placement
from stable_diffusion import checkpoints, folders, loading
from stable_diffusion.attention import ChosenAttention
from stable_diffusion.contract import SD1, SD2, SDXL, ModelKind
from stable_diffusion.diffusers_parts import unet_class, vae_class
from stable_diffusion.files import ModelType, read_model_type
from stable_diffusion.names import unet_blocks, unet_samplers
from stable_diffusion.options import ModelOptions
from stable_diffusion.resnets import use_fewer_kernels
from stable_diffusion.text_checkpoints import TextPlan
from stable_diffusion.tokenizers import load_tokenizers
from stable_diffusion.training_options import CKPT

FIRST_LAYER = "conv_in.weight"
TRAINED_BY = {
    SD1: "train_network.py trains",
    SD2: "train_network.py trains",
    SDXL: "sdxl_train_network.py trains",
}
FULL_BY = {
    SD1: "train_db.py and fine_tune.py train",
    SD2: "train_db.py and fine_tune.py train",
    SDXL: "sdxl_train.py trains",
}
GENERATED_BY = {
    SD1: "sd_generate_image.py takes",
    SD2: "sd_generate_image.py takes",
    SDXL: "sdxl_generate_image.py takes",
}


class UnetInput(Enum):
    """Kind of U-Net that a run accepts: plain (4 input channels) or inpainting (9 input channels)."""

    ANY = "4 or 9"
    LATENTS = "4"
    INPAINTING = "9"
    WIDENED = "9, made of 4 if need be"


@dataclass(frozen=True)
class TrainingFiles:
    """Paths and dtypes of the networks in a Stable Diffusion checkpoint."""

    kinds: tuple[ModelKind, ...]  # kinds that the script accepts; a VAE without a checkpoint is of the first
    ckpt: Path | None = None
    vae: Path | None = None
    tokenizer_cache_dir: Path | None = None
    v2: bool = False  # --v2
    v_parameterization: bool = False  # --v_parameterization
    dtype: torch.dtype = torch.float32  # dtype of the U-Net and the text encoders
    # kind -> text with the script for it; error messages for a checkpoint of another kind suggest it
    scripts: Mapping[ModelKind, str] = field(default_factory=lambda: TRAINED_BY)
    unet_input: UnetInput = UnetInput.ANY

    @cached_property
    def path(self) -> Path:
        """Path of the checkpoint, downloaded if necessary; raises CheckpointError if none is found."""
        return loading.find_checkpoint(require_file(self.ckpt, CKPT, "the checkpoint"))

    @cached_property
    def model_type(self) -> ModelType:
        """Return what the checkpoint's header says about its model.

        Raises:
            CheckpointError: If this script does not support the model.
            OptionError: If the model contradicts --v2.
        """
        path = self.path
        if path.is_dir():
            model_type = folders.read_folder_model_type(path)
        else:
            with open_checkpoint(path) as checkpoint:
                model_type = read_model_type(path, checkpoint.tensors, checkpoint.metadata)
        kind = model_type.kind
        if kind not in self.kinds:
            raise CheckpointError(
                f"--ckpt {path} is {kind.title}, which {self.scripts[kind]}. Use that, or "
                f"pass a checkpoint of {' or '.join(supported.title for supported in self.kinds)}.",
                path,
            )
        if self.v2 and kind is not SD2:
            raise OptionError(
                f"--v2: {path} is {kind.title}, by its tensors. Omit --v2, or pass a checkpoint "
                f"of {SD2.title}"
            )
        return model_type

    @property
    def hashed(self) -> Mapping[str, Path]:
        """Return the single files whose hashes are written to metadata: the checkpoint and --vae."""
        paths = {"sd_model": None if self.ckpt is None else self.path, "vae": self.vae}
        return {name: path for name, path in paths.items() if path is not None and path.is_file()}

    @property
    def kind(self) -> ModelKind:
        """Kind of the checkpoint; without a checkpoint, the first kind supported by the script."""
        return self.kinds[0] if self.ckpt is None else self.model_type.kind

    @property
    def predicts_v(self) -> bool:
        """Whether the U-Net predicts v instead of noise, as given by an option or the checkpoint."""
        return self.v_parameterization or (self.ckpt is not None and self.model_type.predicts_velocity)

    @contextmanager
    def open_plan(self) -> Iterator[loading.CheckpointPlan]:
        """Open the checkpoint and plan how to load its networks; the context manager closes its files."""
        _ = self.model_type  # raises if the script does not support the model
        options = ModelOptions.from_defaults(
            ckpt=self.path, vae=self.vae, v_parameterization=self.v_parameterization
        )
        with ExitStack() as files:
            checkpoint_plan = loading.plan_checkpoint(options, files)
            yield replace(checkpoint_plan, unet=self._fit_input_channels(checkpoint_plan.unet))

    def _fit_input_channels(self, plan: LoadPlan[checkpoints.UnetSizes]) -> LoadPlan[checkpoints.UnetSizes]:
        """Return the U-Net's plan if its input channels suit the run, widened for inpainting where necessary.

        Raises:
            CheckpointError: If the run needs other input channels.
        """
        is_for_inpainting = is_inpainting(plan.config)
        if self.unet_input is UnetInput.ANY:
            return plan
        if self.unet_input is UnetInput.LATENTS:
            if not is_for_inpainting:
                return plan
            raise CheckpointError(
                f"--ckpt {self.path} is an inpainting checkpoint, whose U-Net also takes a mask and a masked "
                "image: 9 channels instead of 4. Train it with --train_inpainting (LoRAs, textual inversion "
                "and whole checkpoints), or pass a checkpoint for images.",
                self.path,
            )
        if is_for_inpainting:
            return plan
        if self.unet_input is UnetInput.INPAINTING:
            raise CheckpointError(
                f"--ckpt {self.path} is a checkpoint for images, and --train_inpainting needs one for "
                "inpainting: its U-Net has no input for a mask, and what is trained here cannot contain one. "
                "Pass an inpainting checkpoint, or make one first by training all weights of this one: "
                f"{'sdxl_train.py' if self.kind is SDXL else 'fine_tune.py'} --train_inpainting.",
                self.path,
            )
        return widen_input(plan)

    @cached_property
    def inpaints(self) -> bool:
        """Whether the U-Net is an inpainting model, which also takes a mask and a masked image."""
        return is_inpainting(self.unet_config)

    def check(self) -> None:
        """Check the model files by their headers.

        Raises:
            CheckpointError: If a file is unusable.
            OptionError: If an option does not fit a file.
        """
        if self.ckpt is not None:
            with self.open_plan():
                pass
        elif self.vae is not None:
            with self.opened_vae():
                pass

    # the U-Net

    @cached_property
    def unet_config(self) -> Mapping[str, Any]:
        """The U-Net's config with diffusers' keys."""
        with self.open_plan() as checkpoint_plan:
            return checkpoint_plan.unet.config

    @property
    def unet_path(self) -> Path:
        """Return the path of the file with the U-Net's weights."""
        if not self.path.is_dir():
            return self.path
        with folders.open_network_weights(self.path / "unet", ("diffusion_pytorch_model",)) as checkpoint:
            return checkpoint.path

    def load_unet(self, placement: Placement, spec: DitSpec) -> nn.Module:
        """Load the U-Net with the device, dtype and quantization of a placement, for inference.

        Raises:
            CheckpointError: If the file is damaged.
        """
        with self.open_plan() as checkpoint_plan:
            plan = checkpoint_plan.unet
            unet: nn.Module = checkpoints.build_network(unet_class(), plan.config, plan.checkpoint.path)
            unet.spec = spec  # type: ignore[assignment]  # its module names, for LoRAs and others
            dtype = self.unet_dtype(placement)
            description = checkpoint_plan.kind.title
            if prediction := checkpoint_plan.model_type.describe_prediction():
                description += f", which {prediction}"
            loading.logger.info(
                "Loading %s: the U-Net of %s, as %s", self.path, description, dtype_name(dtype)
            )
            load_module(
                unet,
                plan.checkpoint,
                plan.sources,
                device=placement.device,
                dtype=lambda *_: dtype,
                patch=placement.patch,
                ignore=plan.ignore,
                label="the U-Net of --ckpt",
                quantized=select_quantized_layers(
                    unet, plan.checkpoint, plan.sources, placement=placement, spec=spec
                ),
                host=placement.host_weights,
                check=placement.check,
            )
        # diffusers' default processor also calls torch's attention, but lets torch choose the kernel: on a
        # Hopper GPU that is cuDNN's, whose gradients may be NaN for batches (sdpa.py)
        if placement.attention != SDPA or placement.device.type == "cuda":
            unet.set_attn_processor(ChosenAttention(placement.attention))  # type: ignore[operator]
        use_fewer_kernels(unet)
        return unet.eval()

    def unet_dtype(self, placement: Placement) -> torch.dtype:
        """Return the U-Net's compute dtype; a dtype set in `placement` takes precedence."""
        dtype = placement.compute_dtype or placement.storage_dtype or self.dtype
        return dtype if dtype.itemsize > 1 else FP8_COMPUTE

    # the VAE

    @contextmanager
    def opened_vae(self) -> Iterator[LoadPlan[checkpoints.VaeSizes]]:
        """Open only the VAE, from --vae or from the checkpoint, and plan how it is loaded."""
        with ExitStack() as files:
            if self.vae is not None:
                yield loading.read_chosen_vae(self.vae, "--vae", self.kind, files)
            elif self.path.is_dir():
                yield loading.read_chosen_vae(self.path / "vae", "--ckpt", self.model_type.kind, files)
            else:
                checkpoint = files.enter_context(open_checkpoint(self.path))
                yield checkpoints.read_vae(checkpoint, "--ckpt", self.model_type.kind.latent_scale)

    def vae_identity(self) -> Mapping[str, str]:
        """Return the VAE's fingerprint and dtype, on which cached latents depend."""
        with self.opened_vae() as plan:
            return {"vae": fingerprint(plan.checkpoint.path), "vae_dtype": dtype_name(torch.float32)}

    def load_vae(self, device: torch.device) -> "DiffusersVae":
        """Load the VAE in float32, because SDXL's VAE overflows in float16."""
        with self.opened_vae() as plan:
            network = checkpoints.build_network(vae_class(), plan.config, plan.checkpoint.path)
            vae = load_planned(
                plan, lambda _: network, device=device, dtype=torch.float32, label="the VAE"
            ).requires_grad_(False)
        return DiffusersVae(vae)

    # texts

    @cached_property
    def tokenizers(self) -> list[ClipWords]:
        """Tokenizers of the text encoders, read only once; raises CheckpointError if one cannot be read."""
        with self.open_plan() as checkpoint_plan:
            are_open_clip = [text.is_open_clip for text in checkpoint_plan.text_encoders]
        return load_tokenizers(self.tokenizer_cache_dir, self.path, are_open_clip)

    def load_text(self, plan: TextPlan, device: torch.device, dtype: torch.dtype) -> ClipText:
        """Load a text encoder of an open checkpoint onto a device."""
        check_activation(plan.load_plan.config, self.path, "CLIP has quick_gelu or gelu")
        return load_planned(
            plan.load_plan, ClipText, device=device, dtype=dtype, label="the text encoder of --ckpt"
        ).requires_grad_(False)


def is_inpainting(config: checkpoints.UnetSizes) -> bool:
    """Return whether a U-Net also takes a mask and the latents of the masked image."""
    return int(config["in_channels"]) == checkpoints.INPAINTING_CHANNELS


def widen_input(plan: LoadPlan[checkpoints.UnetSizes]) -> LoadPlan[checkpoints.UnetSizes]:
    """Return a U-Net's plan with additional input channels for inpainting, whose weights start at 0."""
    added = checkpoints.INPAINTING_CHANNELS - checkpoints.LATENT_CHANNELS
    sources = dict(plan.sources)
    sources[FIRST_LAYER] = sources[FIRST_LAYER].with_step(lambda weight: pad(weight, (0, 0, 0, 0, 0, added)))
    config = {**plan.config, "in_channels": checkpoints.INPAINTING_CHANNELS}
    return replace(plan, config=config, sources=sources)


@dataclass(frozen=True, eq=False)
class DiffusersVae:
    """Diffusers VAE that encodes and decodes images one at a time; latents are not scaled."""

    network: Any  # diffusers' AutoencoderKL

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        device: torch.device = next(self.network.parameters()).device
        return device

    def to(self, device: torch.device) -> "DiffusersVae":
        """Move the network to a device and return self."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, clips: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Encode images and sample the posteriors; return latents, B 4 1 h w float32.

        Args:
            clips: Images, B 3 1 H W uint8.
            generators: One generator per image.
        """
        pixels = [from_bytes(clip[:, 0]) for clip in clips]
        return self.encode_pixels(torch.stack(pixels), generators)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Encode images and sample the posteriors; return latents, B 4 1 h w float32.

        Args:
            pixels: Images, B 3 H W in -1..1.
            generators: One generator per image.
        """
        samples = []
        for image, generator in zip(pixels, generators, strict=True):
            moments = self.network.encode(image[None].to(self.device)).latent_dist.parameters.float()
            samples.append(sample_posterior(moments.clone(), [generator], limits=(-30.0, 20.0)))
        return torch.cat(samples).unsqueeze(2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to pixels, B 3 1 H W in -1..1.

        Args:
            latents: VAE latents without the scaling factor, B 4 1 h w.
        """
        pixels: Tensor = self.network.decode(latents.squeeze(2).float().to(self.device)).sample
        return pixels.clamp(-1, 1).unsqueeze(2)


def unet_parts(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return paths and lengths of a U-Net's lists of residual blocks and transformers, in forward order."""
    down_types: Sequence[str] = config["down_block_types"]
    counts = count_layers(config)
    parts: list[tuple[str, int]] = []
    for level, (kind, count) in enumerate(zip(down_types, counts, strict=True)):
        parts += _list_level_parts(f"down_blocks.{level}", kind, count)
    parts += [("mid_block.resnets", 2), ("mid_block.attentions", 1)]
    up_types: Sequence[str] = config["up_block_types"]
    for level, (kind, count) in enumerate(zip(up_types, reversed(counts), strict=True)):
        parts += _list_level_parts(f"up_blocks.{level}", kind, count + 1)
    return parts


def count_layers(config: Mapping[str, Any]) -> list[int]:
    """Return the number of residual blocks at each level of the down path, from a diffusers U-Net config."""
    layers = config.get("layers_per_block", 2)
    return [layers] * len(config["down_block_types"]) if isinstance(layers, int) else [*layers]


def _list_level_parts(path: str, kind: str, count: int) -> list[tuple[str, int]]:
    parts = [(f"{path}.resnets", count)]
    return [*parts, (f"{path}.attentions", count)] if kind.startswith("CrossAttn") else parts


@dataclass(frozen=True)
class _BlockNumbering:
    """Block indices that other trainers assign to a U-Net: down path, middle, then up path."""

    first_down: int  # number of input_blocks.0
    num_down: int
    num_middle: int  # 1 if the middle block has one number, 3 if each of its modules has one
    num_up: int

    @property
    def first_middle(self) -> int:
        return self.first_down + self.num_down

    @property
    def first_up(self) -> int:
        return self.first_middle + self.num_middle

    @property
    def end(self) -> int:
        """The index after the last block of the up path."""
        return self.first_up + self.num_up

    def number_of(self, ldm_path: str) -> int:
        """Return the number of a block, given its path in LDM, such as output_blocks.3.0."""
        ldm_list, index, *_ = ldm_path.split(".")
        if ldm_list == "input_blocks":
            return self.first_down + int(index)
        if ldm_list == "output_blocks":
            return self.first_up + int(index)
        return self.first_middle + (0 if self.num_middle == 1 else int(index))


def number_blocks(config: Mapping[str, Any]) -> NumberedBlocks:
    """Return each block of a U-Net with its number in the block-wise learning rates of other trainers.

    | numbers of | SDXL, 0 to 22 | other models, 0 to 24 |
    | --- | --- | --- |
    | embeddings of time and sizes | 0 | none |
    | input blocks | 1 to 9 | 0 to 11 |
    | middle block | 10 to 12, one for each module | 12 |
    | output blocks | 13 to 21 | 13 to 24 |
    | output layers | 22 | none |
    """
    layers = count_layers(config)
    # residual blocks, the first convolution, and a sampler after each level except the last
    num_blocks = sum(layers) + len(layers)  # on each of the two paths
    is_xl = config.get("addition_embed_type") is not None
    numbering = _BlockNumbering(
        first_down=1 if is_xl else 0,
        num_down=num_blocks,
        num_middle=3 if is_xl else 1,
        num_up=num_blocks,
    )
    # (module path, block number)
    numbered = [(block.diffusers_path, numbering.number_of(block.ldm_path)) for block in unet_blocks(layers)]
    for sampler in unet_samplers(layers):
        downsampler = sampler.downsampler.removesuffix(".conv")
        upsampler = sampler.upsampler.removesuffix(".conv")
        numbered.append((downsampler, numbering.number_of(sampler.ldm_downsampler)))
        numbered.append((upsampler, numbering.number_of(sampler.ldm_upsampler)))
    end = numbering.end
    if is_xl:
        numbered += [("time_embedding", 0), ("add_embedding", 0), ("conv_in", numbering.first_down)]
        numbered += [("conv_norm_out", numbering.end), ("conv_out", numbering.end)]
        end += 1  # the output layers
    rate_options = (  # option, number of its first block, number of its blocks
        ("down_lr_weight", numbering.first_down, numbering.num_down),
        ("mid_lr_weight", numbering.first_middle, numbering.num_middle),
        ("up_lr_weight", numbering.first_up, numbering.num_up),
    )
    return NumberedBlocks(end, rate_options, tuple(numbered))


def unet_spec(config: Mapping[str, Any]) -> DitSpec:
    """Return the names inside a U-Net: each residual block and each transformer counts as a block.

    LoRAs target the linear layers and 1x1 convolutions of transformers; with conv_dim, also all layers of
    residual blocks, and the samplers, as in other trainers.
    """
    parts = unet_parts(config)
    return DitSpec(
        swap_counts=None,  # no block swapping: the U-Net runs its blocks in its own way
        block_numbering=number_blocks(config),
        block_lists=tuple(name for name, _ in parts),
        shared_inputs=(
            ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            ("attn2.to_k", "attn2.to_v"),
        ),
        # recompute the blocks of a transformer, up to ten of them; its norm and projections, which launch
        # half of the kernels of a transformer with one block, keep their activations
        checkpointed_layers_attribute="transformer_blocks",
        lora_lists=("down_blocks", "mid_block", "up_blocks"),
        conv_lora_modules=(".resnets.", ".downsamplers.", ".upsamplers."),
        # inductor turns the sizes of a convolution's input into constants, and fails on transposed queries
        # whose length is a height times a width; inside these layers a length is one number
        compiled_layers_attribute="transformer_blocks",
    )
