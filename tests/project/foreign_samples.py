"""Projects of other trainers as their users have them, small, and what each of them means.

They are written after the public formats; sizes are those of tiny pictures.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FIXED_ADAFACTOR = ["scale_parameter=False", "relative_step=False", "warmup_init=False"]


@dataclass(frozen=True)
class Sample:
    """Files of a project, the model that it trains, and values of the run that follow from them."""

    files: Mapping[str, Any]  # the first one is the project
    model: str  # of tests/tiny/new_models.py: family and task
    script: str
    training: Mapping[str, Any]
    general: Mapping[str, Any] = field(default_factory=dict)  # of dataset.toml
    told: tuple[str, ...] = ()
    words: tuple[str, ...] = ()  # that are typed too
    media: str = "photos"  # or edits, controls, clips


def _job(model: dict[str, Any], train: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a job of AI Toolkit. more: keys of its process; data: of its dataset."""
    dataset = {"folder_path": "/somewhere/else", "caption_ext": "txt", "cache_latents_to_disk": True}
    process = {
        "type": "diffusion_trainer",
        "training_folder": "output",
        "device": "cuda:0",
        "save": {"dtype": "float16", "save_every": 250, "max_step_saves_to_keep": 4, "push_to_hub": False},
        "datasets": [{**dataset, "resolution": [64], **more.pop("data", {})}],
        "train": {
            "batch_size": 1,
            "train_unet": True,
            "train_text_encoder": False,
            "gradient_checkpointing": True,
            "noise_scheduler": "flowmatch",
            "dtype": "bf16",
            **train,
        },
        "model": {"quantize": True, **model},
        "sample": {"sampler": "flowmatch", "sample_every": 250, "samples": [{"prompt": "a cat"}], "neg": ""},
        **more,
    }
    config = {"name": "first_try", "process": [process]}
    return {"job": "extension", "config": config, "meta": {"name": "[name]", "version": "1.0"}}


_LORA = {"type": "lora", "linear": 8, "linear_alpha": 4}
_PIPE = """
output_dir = 'out'
dataset = 'data.toml'
epochs = 3
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 0.5
warmup_steps = {warmup}
save_every_n_epochs = 2
eval_every_n_epochs = 1
activation_checkpointing = true
[model]
{model}
dtype = 'bfloat16'
{adapter}
[optimizer]
type = 'adamw_optimi'
lr = 2e-5
betas = [0.9, 0.99]
weight_decay = 0.02
[monitoring]
enable_wandb = false
"""
_PIPE_LORA = "[adapter]\ntype = 'lora'\nrank = 6\ndtype = 'bfloat16'"
_DATA = "resolutions = [64]\nenable_ar_bucket = true\nnum_repeats = 4\n[[directory]]\npath = 'photos'\n"
_ONETRAINER = {
    "batch_size": 2,
    "epochs": 2,
    "learning_rate": 0.0003,
    "resolution": "64",
    "text_encoder": {"train": False, "weight_dtype": "FLOAT_8", "offload_fraction": 0.5},
    "vae": {"weight_dtype": "FLOAT_32"},
    "train_dtype": "BFLOAT_16",
    "layer_filter": "attn",
    "timestep_distribution": "LOGIT_NORMAL",
    "quantization": {"layer_filter": "attn", "layer_filter_preset": "blocks"},
}
_SIMPLETUNER = {
    "data_backend_config": "backends.json",
    "gradient_checkpointing": True,
    "lora_rank": 8,
    "lora_type": "standard",
    "learning_rate": "1e-4",
    "lr_scheduler": "constant",
    "max_train_steps": 7,
    "num_train_epochs": 0,
    "optimizer": "adamw_bf16",
    "model_type": "lora",
    "resolution": 1024,
    "train_batch_size": 1,
    "seed": 11,
    "validation_steps": 50,
    "validation_prompt": "a cat",
}
_BACKENDS = [
    {
        "id": "a",
        "type": "local",
        "instance_data_dir": "photos",
        "repeats": 2,
        "resolution": 64,
        "crop": False,
    },
    {"id": "t", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "c"},
]
_GUI = {
    "LoRA_type": "Standard",
    "train_data_dir": "photos",
    "max_resolution": "64,64",
    "min_bucket_reso": 64,
    "max_bucket_reso": 128,
    "bucket_reso_steps": 32,
    "enable_bucket": True,
    "train_batch_size": 1,
    "epoch": 2,
    "max_train_epochs": 0,
    "max_train_steps": 0,
    "learning_rate": 0.0001,
    "unet_lr": 0.0001,
    "text_encoder_lr": 0,
    "network_dim": 8,
    "network_alpha": 4,
    "optimizer": "AdamW",
    "optimizer_args": "",
    "lr_scheduler": "cosine",
    "lr_warmup": 0,
    "sdxl": True,
    "v2": False,
    "seed": "12",
    "metadata_author": "False",
    "save_model_as": "safetensors",
}

SAMPLES: dict[str, Sample] = {
    "AI Toolkit, FLUX.1": Sample(
        {
            "job.yaml": _job(
                {"name_or_path": "black-forest-labs/FLUX.1-dev", "is_flux": True},
                {
                    "steps": 9,
                    "gradient_accumulation": 2,
                    "optimizer": "adamw",
                    "lr": "1e-4",
                    "lr_scheduler": "polynomial",
                    "lr_scheduler_params": {"power": 0.2},
                    "loss_type": "mae",
                    "reg_weight": 0.6,
                    "ema_config": {"use_ema": True, "ema_decay": 0.9},
                },
                network={**_LORA, "network_kwargs": {"only_if_contains": ["transformer_blocks.0"]}},
                data={"shuffle_tokens": True, "keep_tokens": 2, "num_repeats": 3},
            )
        },
        "flux dev",
        "flux_train_network.py",
        {
            "max_train_steps": 9,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-4,
            "lr_scheduler": "polynomial",
            "lr_scheduler_power": 0.2,
            "loss_type": "l1",
            "ema_decay": 0.9,
            "network_dim": 8,
            "network_alpha": 4,
            "output_name": "first_try",
        },
        {"resolution": [64, 64], "shuffle_caption": True, "keep_tokens": 2, "num_repeats": 3},
        (
            "network_kwargs.only_if_contains: network_args",
            "sample.samples[0].prompt",
            "1 prompt in prompts.txt",
        ),
    ),
    "AI Toolkit, both networks of Wan2.2": Sample(
        {
            "job.yaml": _job(
                {
                    "name_or_path": "ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16",
                    "arch": "wan22_14b",
                    "model_kwargs": {"train_high_noise": True, "train_low_noise": True},
                },
                {
                    "steps": 9,
                    "lr": 2e-4,
                    "optimizer": "adamw",
                    "optimizer_params": {"weight_decay": 1e-4},
                    "switch_boundary_every": 10,
                },
                network=_LORA,
                data={"num_frames": 1, "caption_dropout_rate": 0.05},
            )
        },
        "wan22 t2v-A14B",
        "wan_train_network.py",
        {"task": "t2v-A14B", "learning_rate": 2e-4, "optimizer_args": ["weight_decay=0.0001"]},
        {"caption_dropout_rate": 0.05},
        ("switch_boundary_every: of two networks",),
    ),
    "AI Toolkit, Z-Image with Prodigy": Sample(
        {
            "job.yaml": _job(
                {
                    "name_or_path": "Tongyi-MAI/Z-Image-Turbo",
                    "arch": "zimage:turbo",
                    "layer_offloading": False,
                },
                {
                    "steps": 9,
                    "lr": 1.0,
                    "optimizer": "prodigy",
                    "batch_size": 2,
                    "diff_output_preservation": True,
                    "diff_output_preservation_class": "person",
                },
                network=_LORA,
                trigger_word="<zorb>",
            )
        },
        "z_image turbo",
        "zimage_train_network.py",
        {"optimizer_type": "prodigy", "learning_rate": 1.0},
        {"trigger_word": "zorb", "batch_size": 2},
        ("custom_attributes.diff_output_preservation in a subset",),
    ),
    "AI Toolkit, Lumina as a whole": Sample(
        {
            "job.yaml": _job(
                {"name_or_path": "Alpha-VLLM/Lumina-Image-2.0", "is_lumina2": True},
                {"steps": 9, "lr": 3e-5, "optimizer": "adafactor", "timestep_type": "lumina2_shift"},
            )
        },
        "lumina 2.0",
        "lumina_train.py",
        {"optimizer_args": FIXED_ADAFACTOR, "learning_rate": 3e-5, "fused_backward_pass": True},
    ),
    "AI Toolkit, edits of Qwen-Image": Sample(
        {
            "job.yaml": _job(
                {"name_or_path": "Qwen/Qwen-Image-Edit-2511", "arch": "qwen_image_edit_plus"},
                {"steps": 9, "lr": 1e-4, "optimizer": "adamw"},
                network=_LORA,
                data={"control_path": ["/somewhere/1", "/somewhere/2"]},
            )
        },
        "qwen_image edit-2511",
        "qwen_image_train_network.py",
        {"model_version": "edit-2511"},  # by its repository, as the other key names all edits of several
        media="edits",
    ),
    "ltx-trainer, LTX-2 with given parts": Sample(
        {
            "lora.yaml": {
                "model": {"model_path": "/d/ltx-2.3.safetensors", "training_mode": "lora"},
                "lora": {"rank": 6, "alpha": 3, "target_modules": ["to_k"]},
                "training_strategy": {
                    "name": "flexible",
                    "video": {
                        "is_generated": True,
                        "conditions": [
                            {"type": "first_frame", "probability": 0.2},
                            {"type": "prefix", "temporal_boundary": 1, "probability": 0.5},
                        ],
                    },
                },
                "optimization": {"learning_rate": 2e-4, "steps": 9, "optimizer_type": "adamw"},
                "data": {"preprocessed_data_root": "/d/.precomputed"},
                "checkpoints": {"interval": 3},
                "seed": 7,
            }
        },
        "ltx_2 av",
        "ltx2_train_network.py",
        {
            "learning_rate": 2e-4,
            "network_dim": 6,
            "network_alpha": 3,
            "ltx2_first_frame_conditioning_p": 0.2,
            "ltx2_extend_prefix_frames": 1,
            "ltx2_extend_prefix_p": 0.5,
            "seed": 7,
        },
        told=("`new` and `run` make caches of clips",),
        media="clips",
    ),
    "diffusion-pipe, HunyuanVideo": Sample(
        {
            "main.toml": _PIPE.format(
                warmup=5,
                model="type = 'hunyuan-video'\ntransformer_path = '/d/720.safetensors'\nvae_path = '/d/vae'",
                adapter=_PIPE_LORA,
            ),
            "data.toml": _DATA,
        },
        "hunyuan_video t2v",
        "hv_train_network.py",
        {
            "max_train_steps": 3 * 4 * 3,  # epochs, repeats, pictures
            "save_every_n_steps": 2 * 4 * 3,
            "network_dim": 6,
            "network_alpha": 6,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": 5,
            "max_grad_norm": 0.5,
            "optimizer_args": ["betas=0.9,0.99", "weight_decay=0.02"],
        },
        {"num_repeats": 4},
    ),
    "diffusion-pipe, MiniMax-H3 with a size of its own": Sample(
        {
            "main.toml": _PIPE.format(
                warmup=0,
                model="type = 'minimax_h3'\ncfg = 4\nimage_shift = 1\naudio_vae = '/d/a'\n"
                "text_encoders = [{path = '/d/q.safetensors', type = 'minimax'}]",
                adapter=_PIPE_LORA,
            ),
            "data.toml": "resolutions = [512]\n[[directory]]\npath = 'photos'\nresolutions = [64]\n",
        },
        "minimax_h3 t2va",
        "minimax_h3_train_network.py",
        {"max_train_steps": 3 * 3, "learning_rate": 2e-5},
        {"resolution": [64, 64]},
        (
            "dataset:resolutions: the folders of its list have their own",
            "model.cfg: targets below [training]",
        ),
        words=("--task", "t2va"),
    ),
    "diffusion-pipe, SDXL as a whole": Sample(
        {
            "main.toml": _PIPE.format(
                warmup=0,
                model="type = 'sdxl'\ncheckpoint_path = '/d/x.safetensors'\nunet_lr = 4e-5\n"
                "text_encoder_1_lr = 2e-5\ntext_encoder_2_lr = 0",
                adapter="",
            ),
            "data.toml": _DATA,
        },
        "stable_diffusion xl",
        "sdxl_train.py",
        {
            "learning_rate": 4e-5,
            "train_text_encoder": True,
            "learning_rate_te1": 2e-5,
            "learning_rate_te2": 0,
            "lr_warmup_steps": 0,
        },
        {"num_repeats": 4},
    ),
    "OneTrainer, FLUX.2": Sample(
        {
            "a.json": {
                **_ONETRAINER,
                "base_model_name": "black-forest-labs/FLUX.2-klein-base-4B",
                "model_type": "FLUX_2",
                "training_method": "LORA",
                "dynamic_timestep_shifting": True,
            }
        },
        "flux_2 klein-base-4b",
        "flux_2_train_network.py",
        {
            "max_train_steps": 2 * 2,
            "network_dim": 16,
            "network_alpha": 1.0,
            "lr_scheduler": "constant_with_warmup",
            "lr_warmup_steps": 200,
        },
        {"batch_size": 2},
        ("taken as OneTrainer has it", "quantization.layer_filter"),
    ),
    "OneTrainer, Anima with Adafactor": Sample(
        {
            "a.json": {
                **_ONETRAINER,
                "base_model_name": "circlestone-labs/Anima-Base-v1.0-Diffusers",
                "model_type": "ANIMA",
                "training_method": "LORA",
                "learning_rate_warmup_steps": 0,
                "optimizer": {
                    "optimizer": "ADAFACTOR",
                    "beta1": None,
                    "eps": 1e-30,
                    "eps2": 0.001,
                    "relative_step": False,
                    "weight_decay": 0.01,
                },
                "optimizer_defaults": {"ADAMW": {"optimizer": "ADAMW", "beta1": 0.9}},
            }
        },
        "anima base",
        "anima_train_network.py",
        {
            "learning_rate": 0.0003,
            "optimizer_args": [*FIXED_ADAFACTOR, "eps=1e-30,0.001", "weight_decay=0.01"],
        },
        told=(
            "optimizer_defaults.ADAMW.optimizer",
            "they belong to the optimizers that its page offers next",
        ),
    ),
    "OneTrainer, Stable Diffusion 1.5 as a whole": Sample(
        {
            "a.json": {
                "base_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5",
                "batch_size": 1,
                "concepts": [{"path": "photos", "balancing": 5.0, "balancing_strategy": "REPEATS"}],
                "epochs": 2,
                "max_noising_strength": 0.8,
                "model_type": "STABLE_DIFFUSION_15",
                "resolution": "64",
                "training_method": "FINE_TUNE",
            }
        },
        "stable_diffusion 1.5",
        "fine_tune.py",
        {"max_train_steps": 2 * 5 * 3, "max_timestep": 800, "train_text_encoder": True},
        {"num_repeats": 5},
    ),
    "OneTrainer, what its usual values are": Sample(
        {
            "a.json": {
                "epochs": 1,
                "batch_size": 2,
                "resolution": "64",
                "concepts": [{"path": "photos", "text": {"prompt_source": "concept"}}],
                "samples": [{"prompt": "a mouse", "width": 64}],
            }
        },
        "stable_diffusion 1.5",
        "fine_tune.py",
        {"learning_rate": 3e-6, "max_train_steps": 2},
        told=("model_type = STABLE_DIFFUSION_15", "samples[0].prompt"),
    ),
    "OneTrainer, an embedding": Sample(
        {
            "a.json": {
                **_ONETRAINER,
                "model_type": "STABLE_DIFFUSION_XL_10_BASE",
                "training_method": "EMBEDDING",
                "embedding": {"placeholder": "<zorb>", "initial_embedding_text": "cat", "token_count": 2},
            }
        },
        "stable_diffusion xl",
        "sdxl_train_textual_inversion.py",
        {"token_string": "zorb", "init_word": "cat", "num_vectors_per_token": 2},
    ),
    "SimpleTuner, FLUX.1 Kontext": Sample(
        {
            "config.json": {
                **_SIMPLETUNER,
                "model_family": "flux",
                "model_flavour": "kontext",
                "optimizer": "optimi-lion",
                "lr_warmup_steps": 3,
            },
            "backends.json": [
                {**_BACKENDS[0], "conditioning_data": ["b"]},
                {"id": "b", "dataset_type": "conditioning", "instance_data_dir": "other", "resolution": 512},
                _BACKENDS[1],
            ],
        },
        "flux_kontext dev",
        "flux_kontext_train_network.py",
        {"optimizer_type": "lion", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3},
        {"resolution": [64, 64], "num_repeats": 3},
        ("[1].resolution, ", "it is not learned there"),
        media="edits",
    ),
    "SimpleTuner, Chroma with a limit for each value": Sample(
        {
            "config.json": {
                **_SIMPLETUNER,
                "model_family": "chroma",
                "grad_clip_method": "value",
                "max_grad_norm": 0.01,
                "flow_schedule_shift": 3,
            },
            "backends.json": _BACKENDS,
        },
        "chroma hd",
        "flux_train_network.py",
        {"max_train_steps": 7, "seed": 11, "learning_rate": 1e-4, "network_alpha": 8},
        {"num_repeats": 3},
        ("max_grad_norm = 0.01 value: each value of a gradient is clipped there",),
    ),
    "SimpleTuner, a LoKr of SDXL": Sample(
        {
            "config.json": {
                **_SIMPLETUNER,
                "model_family": "sdxl",
                "lora_type": "lycoris",
                "lycoris_config": "lycoris.json",
                "loss_type": "huber",
                "grad_clip_method": "norm",
                "max_grad_norm": 0.5,
                "validation_guidance": 4.2,
            },
            "lycoris.json": {
                "algo": "lokr",
                "linear_dim": 10000,
                "linear_alpha": 1,
                "factor": 12,
                "apply_preset": {"target_module": ["Attention"]},
            },
            "backends.json": [
                {"id": "h", "type": "huggingface", "dataset_name": "a/b", "repeats": 1, "resolution": 64}
            ],
        },
        "stable_diffusion xl",
        "sdxl_train_network.py",
        {
            "network_module": "networks.lokr",
            "network_dim": 10000,
            "network_args": ["factor=12"],
            "loss_type": "huber",
            "max_grad_norm": 0.5,
        },
        {"num_repeats": 2, "resolution": [64, 64]},
        ("dataset_name: no dataset is downloaded",),
    ),
    "SimpleTuner, a video model": Sample(
        {
            "config.json": {**_SIMPLETUNER, "model_family": "wan", "use_dora": True},
            "backends.json": _BACKENDS,
        },
        "wan t2v-1.3B",
        "wan_train_network.py",
        {"task": "t2v-1.3B", "network_args": ["dora_wd=True"]},
    ),
    "the GUI of kohya_ss, SDXL": Sample(
        {"a.json": {**_GUI, "text_encoder_lr": 5e-5, "noise_offset": 0.05, "noise_offset_type": "Original"}},
        "stable_diffusion xl",
        "sdxl_train_network.py",
        {
            "max_train_steps": 2 * 3,
            "text_encoder_lr": [5e-5],
            "network_train_unet_only": False,
            "noise_offset": 0.05,
            "lr_warmup_steps": 0,
        },
        {"max_bucket_reso": 128},
        ("without effect there and here:", "metadata_author"),
    ),
    "the GUI of kohya_ss, a LoKr with Prodigy": Sample(
        {
            "a.json": {
                **_GUI,
                "LoRA_type": "LyCORIS/LoKr",
                "factor": 8,
                "dora_wd": True,
                "rank_dropout": 0.1,
                "optimizer": "Prodigy",
                "optimizer_args": "decouple=True d_coef=2",
                "learning_rate": 1.0,
                "unet_lr": 1.0,
                "text_encoder_lr": 0.5,
            }
        },
        "stable_diffusion xl",
        "sdxl_train_network.py",
        {
            "network_args": ["factor=8"],
            "optimizer_args": ["decouple=True", "d_coef=2"],
            "learning_rate": 1.0,
            "network_train_unet_only": False,
        },
        told=(
            "dora_wd = True: only a LoRA has it",
            "rank_dropout = 0.1: only a LoRA has it",
            "(0.5): prodigy takes only one rate",
        ),
    ),
    "the GUI of kohya_ss, DreamBooth": Sample(
        {
            "a.json": {
                **_GUI,
                "LoRA_type": "",
                "network_dim": "",
                "learning_rate_te": 3e-5,
                "learning_rate_te1": 1e-5,
                "learning_rate_te2": 0.0,
                "no_token_padding": False,
            }
        },
        "stable_diffusion xl",
        "sdxl_train.py",
        {"train_text_encoder": True, "learning_rate_te1": 1e-5, "learning_rate_te2": 0, "lr_warmup_steps": 0},
    ),
    "the GUI of kohya_ss, fine-tuning": Sample(
        {
            "a.json": {
                "create_buckets": False,
                "dataset_repeats": "4",
                "epoch": "2",
                "keep_tokens": 1,
                "learning_rate": "1e-6",
                "lr_scheduler": "adafactor",
                "lr_warmup": "10",
                "max_resolution": "64,64",
                "min_bucket_reso": "64",
                "max_bucket_reso": "128",
                "optimizer": "Adafactor",
                "optimizer_args": "scale_parameter=True relative_step=True warmup_init=True",
                "shuffle_caption": True,
                "train_batch_size": 1,
                "train_text_encoder": True,
                "v2": False,
            }
        },
        "stable_diffusion 1.5",
        "fine_tune.py",
        {
            "max_train_steps": 2 * 4 * 3,
            "lr_scheduler": "adafactor",
            "lr_warmup_steps": 0,
            "train_text_encoder": True,
        },
        {"shuffle_caption": True, "keep_tokens": 1, "num_repeats": 4},
        ("learning_rate = 1e-06: Adafactor with relative_step finds its own rate",),
    ),
    "the GUI of kohya_ss, a LLLite of Anima": Sample(
        {
            "a.json": {
                "anima_discrete_flow_shift": 2.0,
                "anima_timestep_sampling": "sigma",
                "anima_qwen3": "/d/q.safetensors",
                "anima_attn_mode": "torch",
                "conditioning_data_dir": "pairs",
                "enable_bucket": True,
                "learning_rate": 0.0002,
                "lllite_cond_dim": 3,
                "lllite_dropout": 0,
                "lr_scheduler": "cosine",
                "lr_warmup_steps": 0,
                "max_train_epochs": 0,
                "max_train_steps": 8,
                "optimizer": "AdamW",
                "resolution": "64,64",
                "train_batch_size": 1,
                "train_data_dir": "photos",
            }
        },
        "anima base",
        "anima_train_control_net_lllite.py",
        {
            "max_train_steps": 8,
            "learning_rate": 0.0002,
            "discrete_flow_shift": 2.0,
            "timestep_sampling": "sigma",
        },
        {"resolution": [64, 64]},
        told=("lllite_cond_dim = 3: --lllite_cond_dim 3 is odd",),
        media="controls",
    ),
}
