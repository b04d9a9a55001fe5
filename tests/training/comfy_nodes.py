"""A small schema of ComfyUI's nodes: inputs and outputs, as `INPUT_TYPES` and `RETURN_TYPES` name them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LINKED = {"MODEL", "CLIP", "VAE", "CONDITIONING", "LATENT", "IMAGE", "VIDEO"}  # by a link; else a value
TYPES = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool}
SAMPLERS = (
    *("euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2m", "dpmpp_2m_sde"),
    *("lcm", "ddim", "uni_pc", "uni_pc_bh2"),
)
SCHEDULERS = ("simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal")
CLIP_TYPES = ("stable_diffusion", "sd3", "wan", "lumina2", "qwen_image", "hunyuan_video", "flux2")
DEVICES = ("default", "cpu")
SWITCH = ("enable", "disable")


@dataclass(frozen=True)
class NodeSchema:
    """Inputs by name: a type, or the values of a choice; the types of the outputs."""

    inputs: Mapping[str, str | tuple[str, ...]]
    outputs: tuple[str, ...] = ()
    further: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)  # that may be left out


SIZE = {"width": "INT", "height": "INT", "batch_size": "INT"}
STEPS = {
    "model": "MODEL",
    "positive": "CONDITIONING",
    "negative": "CONDITIONING",
    "latent_image": "LATENT",
    "steps": "INT",
    "cfg": "FLOAT",
    "sampler_name": SAMPLERS,
    "scheduler": SCHEDULERS,
}
NODES = {
    "CheckpointLoaderSimple": NodeSchema({"ckpt_name": "STRING"}, ("MODEL", "CLIP", "VAE")),
    "UNETLoader": NodeSchema({"unet_name": "STRING", "weight_dtype": ("default",)}, ("MODEL",)),
    "CLIPLoader": NodeSchema({"clip_name": "STRING", "type": CLIP_TYPES, "device": DEVICES}, ("CLIP",)),
    "DualCLIPLoader": NodeSchema(
        {
            "clip_name1": "STRING",
            "clip_name2": "STRING",
            "type": ("sdxl", "sd3", "flux", "hunyuan_video"),
            "device": DEVICES,
        },
        ("CLIP",),
    ),
    "VAELoader": NodeSchema({"vae_name": "STRING"}, ("VAE",)),
    "LoraLoader": NodeSchema(
        {
            "model": "MODEL",
            "clip": "CLIP",
            "lora_name": "STRING",
            "strength_model": "FLOAT",
            "strength_clip": "FLOAT",
        },
        ("MODEL", "CLIP"),
    ),
    "LoraLoaderModelOnly": NodeSchema(
        {"model": "MODEL", "lora_name": "STRING", "strength_model": "FLOAT"}, ("MODEL",)
    ),
    "ModelSamplingSD3": NodeSchema({"model": "MODEL", "shift": "FLOAT"}, ("MODEL",)),
    "ModelSamplingAuraFlow": NodeSchema({"model": "MODEL", "shift": "FLOAT"}, ("MODEL",)),
    "ModelSamplingFlux": NodeSchema(
        {"model": "MODEL", "max_shift": "FLOAT", "base_shift": "FLOAT", "width": "INT", "height": "INT"},
        ("MODEL",),
    ),
    "ModelSamplingDiscrete": NodeSchema(
        {"model": "MODEL", "sampling": ("eps", "v_prediction", "lcm", "x0"), "zsnr": "BOOLEAN"}, ("MODEL",)
    ),
    "CLIPSetLastLayer": NodeSchema({"clip": "CLIP", "stop_at_clip_layer": "INT"}, ("CLIP",)),
    "CLIPTextEncode": NodeSchema({"text": "STRING", "clip": "CLIP"}, ("CONDITIONING",)),
    "FluxGuidance": NodeSchema({"conditioning": "CONDITIONING", "guidance": "FLOAT"}, ("CONDITIONING",)),
    "EmptyLatentImage": NodeSchema(SIZE, ("LATENT",)),
    "EmptySD3LatentImage": NodeSchema(SIZE, ("LATENT",)),
    "EmptyHunyuanLatentVideo": NodeSchema({**SIZE, "length": "INT"}, ("LATENT",)),
    "KSampler": NodeSchema({**STEPS, "seed": "INT", "denoise": "FLOAT"}, ("LATENT",)),
    "KSamplerAdvanced": NodeSchema(
        {
            **STEPS,
            "add_noise": SWITCH,
            "noise_seed": "INT",
            "start_at_step": "INT",
            "end_at_step": "INT",
            "return_with_leftover_noise": SWITCH,
        },
        ("LATENT",),
    ),
    "VAEDecode": NodeSchema({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": NodeSchema({"images": "IMAGE", "filename_prefix": "STRING"}),
    "CreateVideo": NodeSchema({"images": "IMAGE", "fps": "FLOAT"}, ("VIDEO",)),
    "SaveVideo": NodeSchema(
        {"video": "VIDEO", "filename_prefix": "STRING", "format": ("auto", "mp4"), "codec": ("auto", "h264")},
        further={"format.codec": ("auto", "h264", "av1")},
    ),
}


def check_workflow(nodes: Mapping[str, Any]) -> None:
    """Assert that nodes and inputs exist, that values and links have their types, and that all are used."""
    used = set()
    for number, node in nodes.items():
        assert set(node) == {"class_type", "inputs"}, node
        schema = NODES[node["class_type"]]
        inputs = node["inputs"]
        assert schema.inputs.keys() <= inputs.keys() <= {*schema.inputs, *schema.further}, node
        for name, value in inputs.items():
            kind = {**schema.inputs, **schema.further}[name]
            if kind in LINKED:
                source, output = value
                assert NODES[nodes[source]["class_type"]].outputs[output] == kind, (node, name)
                assert int(source) < int(number)  # a node comes behind what it needs: there is no circle
                used.add(source)
            elif isinstance(kind, tuple):
                assert value in kind, (node, name)
            else:
                assert isinstance(value, TYPES[kind]), (node, name)
    ends = {number for number, node in nodes.items() if not NODES[node["class_type"]].outputs}
    assert ends
    assert used | ends == nodes.keys()
