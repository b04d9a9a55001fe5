"""Read the dimensions of GIMM-VFI off the tensors of a file."""

from collections.abc import Callable, Set

from modules.checkpoints.dialects import LoadPlan, checked_shapes_of, count, other_kind, rename_sources
from modules.checkpoints.opening import Checkpoint, plain_sources
from post.interpolation.correlation import CHANNELS
from post.interpolation.gimm import GimmConfig
from post.interpolation.motion import MotionConfig
from post.interpolation.refinement import RefinementConfig, UpdateConfig
from post.interpolation.synthesis import PER_BLEND, SynthesisConfig

ESTIMATOR = "flow_estimator."  # the optical flow inside the original files
IGNORED = ("*.num_batches_tracked", "g_filter", f"{ESTIMATOR}*")  # g_filter is a constant
PROJECTIONS = ("amt_second_last_cproj", "amt_last_cproj", "amt_fproj")

Of = Callable[[str], tuple[int, ...]]  # name of a convolution -> shape of its weight


def read_gimm(checkpoint: Checkpoint) -> LoadPlan[GimmConfig]:
    """Plan how to load the network without its flow. Raises CheckpointError for any other file."""
    checkpoint = checkpoint.without_prefix("module.")
    sources = plain_sources(checkpoint)
    other = other_kind(checkpoint, "GIMM-VFI", "--model", "the folder with gimmvfi_r_arb or gimmvfi_f_arb")
    if not {"hyponet.params_dict.linear_wb0", "amt_init_decoder.convblock.4.weight"} <= sources.keys():
        raise other
    shape = checked_shapes_of(checkpoint, sources, other)

    def of(name: str, axes: int = 4) -> tuple[int, ...]:
        return shape(f"{name}.weight" if axes == 4 else name, axes)

    layers = count((f"{name}." for name in sources), r"hyponet\.params_dict\.linear_wb\d+")
    widths = tuple(of(f"hyponet.params_dict.linear_wb{layer}", 2)[1] for layer in range(layers))
    config = GimmConfig(_motion(sources.keys(), of, widths), _synthesis(sources.keys(), of))
    last, first = config.synthesis.last, config.synthesis.first
    if (
        last.outputs % PER_BLEND
        or config.synthesis.feature <= 0
        or any(decoder.side > decoder.width for decoder in (first, last))
        or of("amt_update4_low.convc1")[1] != 2 * CHANNELS
    ):
        raise other
    return LoadPlan(config, checkpoint, rename_sources(sources, _ours), IGNORED)


def is_with_raft(config: GimmConfig) -> bool:
    """Return whether a network works with RAFT, whose features it projects; FlowFormer's it takes as is."""
    return bool(config.synthesis.projections)


def _ours(name: str) -> str:
    """Return the name in our network, which has two parts."""
    if name.startswith("amt_"):
        return f"synthesis.{name}"
    return name if name == "g_filter" or name.startswith(ESTIMATOR) else f"motion.{name}"


def _motion(names: Set[str], of: Of, layers: tuple[int, ...]) -> MotionConfig:
    encoder, residual = (count(names, rf"{part}\.\d+\.layers") for part in ("cnn_encoder", "res_conv"))
    return MotionConfig(
        encoder=(of("cnn_encoder.0")[0], of("cnn_encoder.1")[0], of(f"cnn_encoder.{encoder + 4}")[0]),
        encoder_blocks=encoder,
        residual=(of("res_conv.0")[0], of("res_conv.1")[0]),
        residual_blocks=residual,
        layers=layers,
    )


def _synthesis(names: Set[str], of: Of) -> SynthesisConfig:
    first, last = _decoder("amt_init_decoder", 1, of), _decoder("amt_final_decoder", 2, of)
    shapes = [of(name) for name in PROJECTIONS if f"{PROJECTIONS[0]}.weight" in names]
    return SynthesisConfig(
        projections=tuple((inputs, outputs) for outputs, inputs, *_ in shapes),
        quarter=16 * of("amt_final_decoder.upsample.2.0")[1],
        eighth=4 * of("amt_init_decoder.upsample.1.0")[1],
        first=first,
        last=last,
        low=_update("amt_update4_low", of),
        high=_update("amt_update4_high", of),
        mixed=of("amt_comb_block.0")[0],
    )


def _decoder(name: str, doublings: int, of: Of) -> RefinementConfig:
    entry = of(f"{name}.convblock.0.0")
    return RefinementConfig(
        doublings=doublings,
        first=entry[2],
        upsample=(of(f"{name}.upsample.{doublings}.0")[0], of(f"{name}.upsample.{doublings + 4}.0")[0]),
        width=entry[0],
        side=of(f"{name}.convblock.1.conv2.0")[0],
        outputs=of(f"{name}.convblock.4")[0],
    )


def _update(name: str, of: Of) -> UpdateConfig:
    return UpdateConfig(
        correlation=(of(f"{name}.convc1")[0], of(f"{name}.convc2")[0]),
        flow=(of(f"{name}.convf1")[0], of(f"{name}.convf2")[0]),
        motion=of(f"{name}.conv")[0],
        hidden=of(f"{name}.gru.0")[0],
    )
