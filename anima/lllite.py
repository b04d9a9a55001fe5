"""ControlNet-LLLite for Anima in use: read from files, attached to the transformer, and saved."""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anima.lllite_modules import (
    DILATIONS,
    PREFIX,
    TRUNK,
    AnimaLllite,
    AnimaLlliteModule,
    LlliteConfig,
    list_layers,
)
from anima.options import TARGETS, AnimaLlliteTrainingOptions, read_targets
from checkpoints.dialects import LoadPlan, count, load_planned, make_wrong_kind_error
from checkpoints.model_files import require_file
from checkpoints.opening import Checkpoint, list_tensor_sources, open_checkpoint
from encoders.control_pictures import CONTROL_MASK, MASK_PATH, check_control
from modules.control_codes import shorten
from modules.errors import CheckpointError, OptionError, UserError
from modules.media.random_masks import draw_mask
from modules.option_values import Placeholder, option_argv
from protocols.data import CONTROL_PIXELS, Conditions
from protocols.family_networks import CustomNetwork, DefaultRate, describe_start

DISPLAY_NAME = "ControlNet-LLLite"
MODULE = "networks.control_net_lllite_anima"  # as other programs call it
MODEL_KIND = "a ControlNet-LLLite for Anima"
WEIGHTS = "--network_weights"
# of a control image for inpainting: red, green, blue and the mask
MASKED_CHANNELS = 4
HIDES_MASKED = "lllite.inpaint_masked_input"  # in metadata
LLLITE_FILES = "a file of anima_train_control_net_lllite.py"
VERSION = "2"
# maximum dilation of the trunk's convolutions; the largest control images are 256 positions wide there
MAX_DILATION = 64


@dataclass(frozen=True)
class LllitePlan:
    """Dimensions and target layers of a ControlNet-LLLite file."""

    config: LlliteConfig
    num_blocks: int
    input_widths: dict[str, int]  # input width of each layer of a block


class AttachedLllite(AnimaLllite):
    """A ControlNet-LLLite that modifies the inputs of a transformer's layers in every forward pass."""

    def __init__(self, plan: LllitePlan, scale: float, dropout: float = 0.0) -> None:
        """Build the modules; `scale` multiplies their outputs, also in training."""
        super().__init__(plan.config, plan.num_blocks, plan.input_widths, dropout)
        self.scale = scale
        self.takes_mask = plan.config.cond_in_channels == MASKED_CHANNELS
        self.hides_masked = plan.config.hides_masked
        self.multiplier = 1.0  # strength of the modules; 0 turns them off
        # of the current call, and of blocks that a backward pass computes again: the trunk's output for the
        # control images, B L E (None: the base alone), and the strength of a sample
        self.condition: Tensor | None = None
        self.strength = 1.0

    def set_multiplier(self, multiplier: float) -> None:
        """Set the factor on the outputs of all modules."""
        self.multiplier = multiplier

    def embed_control(self, controls: Tensor | None, strength: float, mask: Tensor | None = None) -> None:
        """Embed the control images for the transformer's next call.

        Args:
            controls: Control images, B 3 H W in 0..1; None for none.
            strength: Strength of the modules in this call.
            mask: B 1 H W, 1 where the image is repainted; for networks that take a mask.
        """
        self.strength = strength
        self.condition = None
        if controls is None or strength * self.multiplier == 0:
            return
        trunk = self.lllite_conditioning1
        inputs = controls * 2 - 1  # 0..1 to -1..1
        if self.takes_mask:
            assert mask is not None  # given together with the control images
            if self.hides_masked:
                inputs = inputs * (1 - mask)
            inputs = torch.cat([inputs, mask * 2 - 1], dim=1)
        self.condition = trunk(inputs.to(trunk.conv1.weight.dtype))

    def attach_to(self, dit: nn.Module, path: Path | None) -> None:
        """Attach the LLLite modules to a transformer, whose layer inputs they modify in every call.

        Raises CheckpointError if they do not fit the transformer.
        """
        layers_by_name = {
            PREFIX + module_path.replace(".", "_"): layer for module_path, layer in dit.named_modules()
        }
        for name, module in self.named_children():
            if isinstance(module, AnimaLlliteModule):  # not the shared encoder of the control image
                layer: Any = layers_by_name.get(name)
                width = module.down.in_features
                if layer is None or layer.in_features != width:
                    has = (
                        "has no such layer"
                        if layer is None
                        else f"takes {layer.in_features} channels in this layer"
                    )
                    raise CheckpointError(
                        f"{path} does not fit the transformer: it is made for {name.removeprefix(PREFIX)} "
                        "with inputs "
                        f"of {width} channels, but the model {has}. Pass {LLLITE_FILES} for this model.",
                        path,
                    )
                layer.register_forward_pre_hook(partial(self._change_input, module))
        # `predict` passes the control images through this attribute
        dit.attached_control = UnregisteredModule(self)  # type: ignore[assignment]

    def _change_input(
        self, module: AnimaLlliteModule, _: nn.Module, inputs: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Forward pre-hook: return a layer's modified inputs, or None without a control image."""
        if self.condition is None:
            return None
        x, *others = inputs
        change = module(x.to(module.down.weight.dtype), self.condition)
        return x + self.scale * self.multiplier * self.strength * change.to(x.dtype), *others


@dataclass(frozen=True)
class UnregisteredModule:
    """Wrapper that keeps a network from being registered as a submodule of the module that stores it."""

    lllite: AttachedLllite


def read_lllite(checkpoint: Checkpoint, option: str) -> LoadPlan[LllitePlan]:
    """Plan how to load the ControlNet-LLLite given by `option`; raise CheckpointError for other files."""
    _check_kind(checkpoint, option)
    names = checkpoint.tensors
    # The input width of each modified layer of a block, by path, and the number of blocks
    input_widths = {}
    num_blocks = 0
    for name in checkpoint.tensors:
        match = re.fullmatch(rf"{PREFIX}blocks_(\d+)_(self_attn|cross_attn|mlp)_(\w+)\.down\.weight", name)
        if match is not None:
            block, part, layer = match.groups()
            input_widths[f"{part}.{layer}"] = _read_tensor_shape(checkpoint, name, 2)[1]
            num_blocks = max(num_blocks, int(block) + 1)
    first_down = next(name for name in names if name.startswith(PREFIX) and name.endswith(".down.weight"))
    channels = _read_tensor_shape(checkpoint, f"{TRUNK}.conv1.weight", 4)[1]
    if channels not in {3, MASKED_CHANNELS}:
        raise CheckpointError(
            f"{option} {checkpoint.path} takes control images of {channels} channels; only 3, and "
            f"{MASKED_CHANNELS} for inpainting, are supported. Pass another file.",
            checkpoint.path,
        )
    config = LlliteConfig(
        cond_in_channels=channels,
        hides_masked=checkpoint.metadata.get(HIDES_MASKED) == "true",
        cond_emb_dim=_read_tensor_shape(checkpoint, f"{TRUNK}.out_norm.weight", 1)[0],
        cond_dim=_read_tensor_shape(checkpoint, f"{TRUNK}.conv3.weight", 4)[0],
        resblocks=count(names, rf"{TRUNK}\.resblocks\.\d+"),
        mlp_dim=_read_tensor_shape(checkpoint, first_down, 2)[0],
        use_aspp=f"{TRUNK}.aspp.proj.0.weight" in names,
        dilations=_read_dilations(checkpoint),
        layers=tuple(input_widths),
    )
    return LoadPlan(LllitePlan(config, num_blocks, input_widths), checkpoint, list_tensor_sources(checkpoint))


def _check_kind(checkpoint: Checkpoint, option: str) -> None:
    """Raise CheckpointError unless a file is an Anima ControlNet-LLLite of the current format."""
    names = checkpoint.tensors
    if any(name.startswith("lllite_modules.") for name in names):
        raise CheckpointError(
            f"{option} {checkpoint.path} is an older form of ControlNet-LLLite for Anima (lllite_modules.*). "
            f"Pass {LLLITE_FILES}, or train it again.",
            checkpoint.path,
        )
    if any(name.startswith("lllite_unet_") for name in names):
        raise CheckpointError(
            f"{option} {checkpoint.path} is a ControlNet-LLLite for Stable Diffusion XL. "
            f"Pass {LLLITE_FILES}.",
            checkpoint.path,
        )
    if f"{TRUNK}.out_norm.weight" not in names or not any(name.startswith(PREFIX) for name in names):
        raise make_wrong_kind_error(checkpoint, MODEL_KIND, option, LLLITE_FILES)


def _read_tensor_shape(checkpoint: Checkpoint, name: str, axes: int) -> tuple[int, ...]:
    """Return a tensor's shape. Raises CheckpointError if it is missing or has a different number of axes."""
    info = checkpoint.tensors.get(name)
    if info is None or len(info.shape) != axes or 0 in info.shape:
        raise CheckpointError(
            f"{checkpoint.path} is not {MODEL_KIND}, or is damaged: {name} is missing or has an unexpected "
            "shape. Copy or download it again.",
            checkpoint.path,
        )
    return info.shape


def _read_dilations(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Return the trunk's dilations from the file's metadata; raise CheckpointError if unsupported."""
    stored = checkpoint.metadata.get("lllite.aspp_dilations", "")
    dilations = tuple(int(number) for number in re.findall(r"\d{1,9}", stored)) or DILATIONS
    if all(1 <= dilation <= MAX_DILATION for dilation in dilations):
        return dilations
    raise CheckpointError(
        f"{checkpoint.path} is damaged: lllite.aspp_dilations in its metadata is "
        f"{shorten(stored, 60)!r}. Copy or download it again.",
        checkpoint.path,
    )


def load_lllite(
    path: Path, option: str, dit: nn.Module, device: torch.device, dtype: torch.dtype, multiplier: float
) -> AttachedLllite:
    """Load a ControlNet-LLLite file and attach it to a transformer; CheckpointError if it does not fit."""
    with open_checkpoint(require_file(path, option, "")) as checkpoint:
        plan = read_lllite(checkpoint, option)
        _check_blocks(plan.config, path, dit)
        build = partial(AttachedLllite, scale=multiplier)
        attached = load_planned(plan, build, device=device, dtype=dtype, label=MODEL_KIND)
    attached.attach_to(dit, path)
    return attached


def check_file(path: Path, option: str) -> LllitePlan:
    """Check a file's header for the expected tensors, and return its plan.

    Raises CheckpointError if the tensors differ.
    """
    with open_checkpoint(require_file(path, option, "")) as checkpoint:
        plan = read_lllite(checkpoint, option)
        build = partial(AttachedLllite, scale=1.0)
        load_planned(plan, build, device=torch.device("meta"), dtype=torch.float32, label=MODEL_KIND)
    return plan.config


def check_mask(path: Path, config: LlliteConfig, mask: Path | None) -> None:
    """Raise OptionError if the ControlNet-LLLite in `path` needs a mask but none is given, or vice versa."""
    if config.cond_in_channels == MASKED_CHANNELS:
        if mask is None:
            raise OptionError(f"--lllite_weights {path} is for inpainting. Pass its mask to --mask_image")
        check_control("--mask_image", mask)
    elif mask is not None:
        raise OptionError(f"--mask_image {mask}: --lllite_weights {path} takes no mask. Omit it")


def _check_blocks(plan: LllitePlan, path: Path, dit: nn.Module) -> None:
    """Raise CheckpointError if the file was made for a transformer with a different number of blocks."""
    depth: int = dit.config.num_layers  # type: ignore[union-attr,assignment]
    if plan.num_blocks != depth:
        raise CheckpointError(
            f"{path} is made for {plan.num_blocks} blocks, but the transformer has {depth}: each module was "
            "trained for its own block. Pass the model that it was trained with, or another file.",
            path,
        )


# Training


def describe_lllite(options: AnimaLlliteTrainingOptions) -> CustomNetwork:
    """Describe how a training run builds and checks a ControlNet-LLLite, how to use it, and its metadata."""
    config = _initial_config(options)
    return CustomNetwork(
        label=DISPLAY_NAME,
        description=describe_start(
            DISPLAY_NAME, f" at {options.lllite_target_layers}", options.network_weights
        ),
        architecture_suffix="control-net-lllite",
        make=partial(make_lllite, options),
        check=partial(_check_start, options),
        generate=partial(_make_generation_command, config.cond_in_channels == MASKED_CHANNELS),
        # the lowest, a typical and the highest learning rate
        default_rate=DefaultRate(1e-5, "2e-4", 5e-3),
        values={
            "lllite.version": VERSION,  # metadata of the saved file
            "lllite.cond_emb_dim": config.cond_emb_dim,
            "lllite.cond_dim": config.cond_dim,
            "lllite.cond_resblocks": config.resblocks,
            "lllite.use_aspp": str(config.use_aspp).lower(),
            "lllite.aspp_dilations": ",".join(map(str, config.dilations)),
            "lllite.cond_in_channels": config.cond_in_channels,
            HIDES_MASKED: str(config.hides_masked).lower(),
            "lllite.mlp_dim": config.mlp_dim,
            "lllite.target_layers": options.lllite_target_layers,
            "lllite.target_atomics": ",".join(read_targets(options.lllite_target_layers)),
        },
    )


def _config_from_options(options: AnimaLlliteTrainingOptions) -> LlliteConfig:
    """Return the ControlNet-LLLite dimensions given by the options."""
    targets = read_targets(options.lllite_target_layers)
    return LlliteConfig(
        cond_emb_dim=options.cond_emb_dim,
        cond_dim=options.lllite_cond_dim,
        resblocks=options.lllite_cond_resblocks,
        mlp_dim=options.lllite_mlp_dim,
        use_aspp=options.lllite_use_aspp,
        cond_in_channels=options.lllite_cond_in_channels,
        hides_masked=options.lllite_inpaint_masked_input,
        layers=tuple(layer for target in targets for layer in TARGETS[target]),
    )


def _initial_config(options: AnimaLlliteTrainingOptions) -> LlliteConfig:
    """Return the dimensions in --network_weights; if it is missing or unreadable, those of the options."""
    path = options.network_weights
    if path is None:
        return _config_from_options(options)
    try:
        return check_file(path, WEIGHTS).config
    except (UserError, OSError):  # the check at the start of training reports what is wrong with it
        return _config_from_options(options)


def make_lllite(options: AnimaLlliteTrainingOptions, dit: nn.Module, with_values: bool) -> AttachedLllite:
    """Build a ControlNet-LLLite for a transformer, and attach it.

    With `with_values`, it loads the weights in --network_weights, if given. Raises CheckpointError if the
    file does not fit.
    """
    dropout = options.lllite_dropout or 0.0
    path = options.network_weights
    build = partial(AttachedLllite, scale=options.lllite_multiplier, dropout=dropout)
    if path is not None and with_values:
        with open_checkpoint(path) as checkpoint:
            plan = read_lllite(checkpoint, WEIGHTS)
            _check_blocks(plan.config, path, dit)
            attached = load_planned(plan, build, torch.device("cpu"), torch.float32, label=MODEL_KIND)
    else:
        # Plan a new ControlNet-LLLite for a transformer: its config, and the layers to modify in each block
        config = _initial_config(options)
        num_blocks: int = dit.config.num_layers  # type: ignore[union-attr,assignment]
        input_widths = {}
        for _, layer_path in list_layers(config.layers, 1):
            layer: Any = dit.get_submodule(layer_path)
            # the path inside the block, without the list of blocks and the index
            input_widths[layer_path.split(".", 2)[2]] = layer.in_features
        attached = build(LllitePlan(config, num_blocks, input_widths))
    attached.attach_to(dit, path)
    return attached


def _check_start(options: AnimaLlliteTrainingOptions) -> None:
    """Check that the file --network_weights has the dimensions given by the options."""
    path = options.network_weights
    if path is None:
        return
    stored = check_file(path, WEIGHTS).config
    new = _config_from_options(options)
    values_by_option = {  # (value of the options, value in the file)
        "cond_emb_dim": (new.cond_emb_dim, stored.cond_emb_dim),
        "lllite_cond_dim": (new.cond_dim, stored.cond_dim),
        "lllite_cond_resblocks": (new.resblocks, stored.resblocks),
        "lllite_mlp_dim": (new.mlp_dim, stored.mlp_dim),
        "lllite_cond_in_channels": (new.cond_in_channels, stored.cond_in_channels),
        "lllite_inpaint_masked_input": (new.hides_masked, stored.hides_masked),
        "lllite_use_aspp": (new.use_aspp, stored.use_aspp),
        "lllite_target_layers": (sorted(new.layers), sorted(stored.layers)),
    }
    for name, (new_value, stored_value) in values_by_option.items():
        if new_value != stored_value:
            raise OptionError(
                f"--{name} is {new_value}, but {path}, whose training continues, has {stored_value}. "
                "Pass the same value."
            )


def draw_masks(inputs: Conditions, _: str, generator: torch.Generator) -> Conditions:
    """Draw a random mask, B 1 H W uint8, for each control image of a batch; return `inputs` with the masks.

    1 marks pixels to repaint. The masks are drawn as for --train_inpainting.
    """
    controls = inputs[CONTROL_PIXELS]
    assert isinstance(controls, Tensor)
    rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    height, width = controls.shape[-2:]
    masks = [torch.from_numpy(draw_mask(height, width, rng)) for _ in controls]
    return {**inputs, CONTROL_MASK: torch.stack(masks).unsqueeze(1).to(torch.uint8)}


def _make_generation_command(
    takes_mask: bool, file: Path, sample: Mapping[str, Any], base_command: Sequence[str]
) -> list[str]:
    """Return the generation command for a trained file, built from `base_command`, which lacks the file."""
    control = sample.get("control_path") or Placeholder("CONTROL_PICTURE")
    further = {"--lllite_weights": file, "--control_image": control}
    if takes_mask:
        further["--mask_image"] = (sample.get("extra") or {}).get(MASK_PATH) or Placeholder("MASK")
    return [*base_command, *option_argv(further)]
