"""What a resumed run has to share stands at the options themselves."""

import pytest

from frame_pack.options import FramePackTrainingOptions
from hunyuan_model.options import HunyuanTrainingOptions
from modules.options import facts_of, options_with
from training.options import TrainingOptions
from wan.options import WanTrainingOptions

OWN = (WanTrainingOptions, HunyuanTrainingOptions, FramePackTrainingOptions)
SHARED = {
    *("network_module", "network_dim", "network_alpha", "network_args", "trainable_modules", "full_bf16"),
    "lora_per_expert",
    *("optimizer_type", "optimizer_args", "learning_rate", "unet_lr", "text_encoder_lr"),
    *("network_train_unet_only", "network_train_text_encoder_only"),
}
CHANGEABLE = {
    *(
        "max_grad_norm",
        "fused_backward_pass",
        "lr_scheduler",
        "lr_scheduler_type",
        "lr_scheduler_args",
        "lr_warmup_steps",
    ),
    *(
        "lr_decay_steps",
        "lr_scheduler_num_cycles",
        "lr_scheduler_power",
        "lr_scheduler_timescale",
        "lr_scheduler_min_lr_ratio",
    ),
    *(
        "timestep_sampling",
        "discrete_flow_shift",
        "sigmoid_scale",
        "weighting_scheme",
        "logit_mean",
        "logit_std",
        "mode_scale",
    ),
    *(
        "min_timestep",
        "max_timestep",
        "preserve_distribution_shape",
        "num_timestep_buckets",
        "network_dropout",
    ),
    *(
        "scale_weight_norms",
        "base_weights_multiplier",
        "mixed_precision",
        "fp8_base",
        "fp8_scaled",
        "fp8_fast",
    ),
    *("ip_noise_gamma", "ip_noise_gamma_random_strength", "model_prediction_type"),
    *("loss_type", "huber_schedule", "huber_c", "huber_scale"),
    *("cuda_allow_tf32", "cuda_cudnn_benchmark"),
    *("upcast_quantization", "fp16_accumulation", "compile", "dynamo_backend", "guidance_scale"),
}


@pytest.mark.parametrize("record", [TrainingOptions, *OWN])
def test_every_option_of_training_says_whether_a_resumed_run_may_change_it(record: type) -> None:
    assert {
        name
        for name, facts in facts_of(record).items()
        if facts.get("resume") not in {"identity", "habit", "free"}
    } == set()


def test_records_name_the_options_that_stood_in_lists() -> None:
    assert set(options_with(TrainingOptions, "resume", "identity")) == SHARED
    assert set(options_with(TrainingOptions, "resume", "habit")) == CHANGEABLE


def test_an_option_in_two_records_is_judged_alike() -> None:
    shared = facts_of(TrainingOptions)
    for record in OWN:
        for name, facts in facts_of(record).items():
            assert name not in shared or shared[name]["resume"] == facts["resume"], name
