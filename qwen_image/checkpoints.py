"""Checkpoints of the Qwen-Image transformer: the released names, which diffusers and ComfyUI have too."""

from modules.checkpoints.dialects import DitShapes, other_kind
from modules.checkpoints.dits import DitFormat, DitHeader, own_names
from modules.checkpoints.opening import Checkpoint
from modules.errors import CheckpointError
from qwen_image.configs import PATCH, QwenImageConfig
from qwen_image.model import QwenImageModel
from qwen_image.options import NAME

WHAT = f"a {NAME} transformer"
OPTION = "--dit"
FILES = (
    "qwen_image_bf16.safetensors, qwen_image_2512_bf16.safetensors, or the folder transformer of "
    "Qwen/Qwen-Image"
)
MARK = "transformer_blocks.0.img_mod.1.weight"


def _header(checkpoint: Checkpoint) -> DitHeader[QwenImageConfig]:
    names = checkpoint.tensors
    if MARK not in names:
        raise other_kind(checkpoint, WHAT, OPTION, FILES)
    shapes = DitShapes(checkpoint.path, {name: info.shape for name, info in names.items()}, NAME)
    dim, numbers = shapes.of("img_in.weight")
    (width,) = shapes.of("transformer_blocks.0.attn.norm_q.weight", axes=1)
    if dim % width or width % 16 or numbers % PATCH**2:
        raise CheckpointError(
            f"{checkpoint.path}: width {dim}, heads of {width} and tokens of {numbers} numbers are not those "
            f"of {WHAT}. Copy the file again.",
            checkpoint.path,
        )
    query = "transformer_blocks.0.attn.to_q.weight"
    shapes.of(query)  # that it is there
    config = QwenImageConfig(
        dim=dim,
        ffn_dim=shapes.of("transformer_blocks.0.img_mlp.net.0.proj.weight")[0],
        num_heads=dim // width,
        num_layers=shapes.blocks("transformer_blocks"),
        channels=numbers // PATCH**2,
        text_dim=shapes.of("txt_in.weight")[1],
        freq_dim=shapes.of("time_text_embed.timestep_embedder.linear_1.weight")[1],
    )
    return DitHeader(config, "released", names[query].dtype)


FORMAT = DitFormat(_header, lambda _: WHAT, QwenImageModel, own_names, OPTION)
read_dit_header, identify, load_dit = FORMAT.read_header, FORMAT.identify, FORMAT.load
