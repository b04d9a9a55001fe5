"""The JSON that the GUI of kohya_ss saves."""

from project.foreign import rules
from project.foreign.contract import TRAINING, KeyRule, Program, left, number, whole

_OF_UI = "the form has it for its own use"

PROGRAM = Program(
    title="the GUI of kohya_ss",
    suffixes=(".json",),
    alpha=1,
    marks=("LoRA_type", "train_data_dir"),
    rules={
        "output_name": rules.OUTPUT_NAME,
        "LoRA_type": rules.NETWORK_KIND,
        "network_dim": rules.RANK,
        "network_alpha": rules.ALPHA,
        "learning_rate": rules.LEARNING_RATE,
        "unet_lr": KeyRule(TRAINING, "unet_lr", number(1e-12, 10)),
        "lr_scheduler": rules.SCHEDULER,
        "lr_warmup": left("it is a share of the steps there: lr_warmup_steps in run.toml"),
        "optimizer": rules.OPTIMIZER,
        "max_grad_norm": rules.GRADIENT_LIMIT,
        "gradient_accumulation_steps": rules.ACCUMULATED,
        "seed": KeyRule(TRAINING, "seed", whole(1, 2**32 - 1)),
        "epoch": rules.NUM_EPOCHS,
        "max_train_epochs": rules.NUM_EPOCHS,
        "max_train_steps": rules.STEPS,
        "train_batch_size": rules.BATCH_SIZE,
        "max_resolution": rules.RESOLUTION,
        "train_data_dir": rules.MEDIA_FOLDER,
        "pretrained_model_name_or_path": rules.MODEL_NAME,
        "sdxl": rules.MODEL_NAME,
        "flux1_checkbox": rules.MODEL_NAME,
        "v2": rules.MODEL_NAME,
        "caption_extension": rules.CAPTIONS,
        "save_every_n_steps": rules.SAVE_STEPS,
        "save_every_n_epochs": rules.SAVE_EPOCHS,
        "sample_prompts": rules.SAMPLES,
        "cache_latents": rules.CACHES,
        "cache_latents_to_disk": rules.CACHES,
        "gradient_checkpointing": rules.OF_CARD,
        "mixed_precision": rules.OF_CARD,
        "save_precision": rules.OF_CARD,
        "xformers": rules.OF_CARD,
        "output_dir": rules.OUTPUT_FOLDER,
        "logging_dir": left("logging_dir below [training] says where logs go"),
        "enable_bucket": rules.BUCKETS,
        "model_list": left(_OF_UI),
        "LyCORIS_preset": left(_OF_UI),
        "save_model_as": left("files are safetensors"),
    },
    models={
        "sdxl=True": ("stable_diffusion", "xl"),
        "flux1_checkbox=True": ("flux", "dev"),
        "v2=True": ("stable_diffusion", "2.1"),
        "runwayml/stable-diffusion-v1-5": ("stable_diffusion", "1.5"),
    },
)
