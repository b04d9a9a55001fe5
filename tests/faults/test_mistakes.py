"""Mistakes on the command line: one short message with the remedy, before any model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.messages import assert_one_message, run_here
from tests.faults.mistakes import (
    COMMANDS,
    FULL_TRAININGS,
    GENERATIONS,
    LOADED,
    NETWORK_TRAININGS,
    TRAININGS,
    try_mistake,
)

WAN_TRAIN, HV_TRAIN, FP_TRAIN = NETWORK_TRAININGS
WAN_FULL, HV_FULL, FP_FULL = FULL_TRAININGS
WAN, HV, FP = GENERATIONS
CACHE, CACHE_TEXTS = "wan_cache_latents.py", "wan_cache_text_encoder_outputs.py"
MERGE, CONVERT, AVERAGE = "merge_lora.py", "convert_lora.py", "lora_post_hoc_ema.py"
HV_TEXTS = ("cache_text_encoder_outputs.py",)
SECOND = "model/text_encoder_2/model.safetensors"
SAMPLED = "--sample_at_first --sample_prompts samples.txt"


@dataclass(frozen=True)
class Mistake:
    """A line to add to a good command, options to take away, and what the message has to hold."""

    scripts: tuple[str, ...]
    line: str  # BAD stands for the folder of bad files
    words: tuple[str, ...]
    without: tuple[str, ...] = ()


def wrong(scripts: str | Sequence[str], line: str, *words: str, without: Sequence[str] = ()) -> Mistake:
    return Mistake((scripts,) if isinstance(scripts, str) else tuple(scripts), line, words, tuple(without))


NUMBERS = (
    wrong((WAN, HV), "--video_length 0", "--video_length 0", "from 1"),
    wrong((WAN, HV), "--video_size 16384 16384 --video_length 81", "16384 16384: 81", "Lower the size"),
    wrong(GENERATIONS, "--video_size 33 47", "--video_size 33 47", "Nearest"),
    wrong(GENERATIONS, "--video_size 832x480", "use height and width: --video_size 480 832"),
    wrong(WAN, "--video_size=480,832", "use height and width: --video_size 480 832"),
    wrong(GENERATIONS, "--video_size 480", "--video_size: use 2 values: HEIGHT and WIDTH, such as"),
    wrong(GENERATIONS, "--video_size large small", "large is not a whole number. Pass one"),
    wrong(GENERATIONS, f"--seed {2**70}", "--seed", "64 bits"),
    wrong(GENERATIONS, "--lora_weight lora.safetensors --lora_multiplier 1e9", "--lora_multiplier 1e+09"),
    wrong(GENERATIONS, "--slg_mode original --slg_layers one", "--slg_layers 'one'", "9,10"),
    wrong(GENERATIONS, "--cfg_schedule 1-99999", "--cfg_schedule", "the steps are 1 to 1"),
    wrong(
        GENERATIONS, "--cfg_schedule 1:nan", "--cfg_schedule entry '1:nan'", "pass a scale of at most 1000"
    ),
    wrong(GENERATIONS, "--guidance_scale 3 --cfgzerostar_init_steps 1", "none of the 1 steps", "fewer"),
    wrong(GENERATIONS, "--guidance_scale 1 --cfgzerostar_scaling", "--cfgzerostar_scaling", "pass a"),
    wrong(HV, "--te_multiplier 1 many", "--te_multiplier 1 many", "two numbers"),
    wrong(FP, "--video_sections 100000", "Lower --video_seconds"),
    wrong(TRAININGS, "--max_train_steps 1e3", "1e3 is not a whole number"),
    wrong(TRAININGS, f"--seed {2**70}", "--seed", "below 18,446,744,073,709,551,616"),
    wrong(TRAININGS, "--learning_rate 2e4", "--learning_rate 20000", "1e-4 is usual"),
    wrong(TRAININGS, "--min_timestep 900 --max_timestep 100", "--min_timestep 900", "min < max"),
    wrong(TRAININGS, "--lr_warmup_steps 200%", "'200%' is more than the whole run"),
    wrong(NETWORK_TRAININGS, "--network_dim 9999999", "--network_dim 9999999", "4096"),
    wrong(NETWORK_TRAININGS, "--network_args rank_dropout=7", "rank_dropout=7", "below 1"),
    wrong((*NETWORK_TRAININGS, WAN, FP), "--blocks_to_swap 99", "--blocks_to_swap 99", "Use", "or less"),
    wrong((WAN_TRAIN, WAN), "--blocks_to_swap many", "neither a number of blocks nor auto"),
    wrong(CACHE, "--vae_spatial_tile_sample_min_size 7", "multiple of 16"),
    wrong(TRAININGS, "--learning_rate 1e-4 1e-5", "--learning_rate takes one value but got 2, 1e-4 1e-5"),
    wrong(TRAININGS, "--learning_rate 0,0001", "write a decimal point: 0.0001"),
    wrong(GENERATIONS, "--lora_multiplier 0.5,0.7", "write several numbers apart: 0.5 0.7"),
)
NAMES = (
    wrong((WAN, WAN_TRAIN), "--task s2v-14B", "speech to video is not built yet", "Use t2v-14B"),
    wrong((WAN, WAN_TRAIN), "--task animate-14B", "not built yet; i2v-A14B-FC follows", "Use t2v-14B"),
    wrong((WAN, WAN_TRAIN), "--dit_dtype float7", "--dit_dtype float7", "bfloat16"),
    wrong(GENERATIONS, "--device gpu", "--device gpu", "Use cuda"),
    wrong(GENERATIONS, "--device cuda:99", "--device cuda:99"),
    wrong(GENERATIONS, "--device meta", "--device meta", "Use cuda, mps or cpu"),
    wrong((CACHE, *TRAININGS, *GENERATIONS), "--vae_dtype fp8", "--vae_dtype fp8", "Use bfloat16"),
    wrong((CACHE, WAN), "--vae_dtype halff", "--vae_dtype halff", "Use one of"),
    wrong(TRAININGS, "--optimizer_type AdamWW", "--optimizer_type AdamWW", "Did you mean adamw?"),
    wrong(TRAININGS, "--optimizer_type no_such_package.Fast", "has the module no_such_package"),
    wrong(TRAININGS, "--optimizer_args weigth_decay=0.1", "Did you mean weight_decay?", "betas"),
    wrong(TRAININGS, "--optimizer_args betas=2,3", "betas=(2, 3)"),
    wrong(TRAININGS, "--lr_scheduler polynomial --lr_scheduler_args powerr=2", "powerr"),
    wrong(TRAININGS, "--lr_scheduler_type StepLRR", "--lr_scheduler_type StepLRR"),
    wrong(TRAININGS, "--lr_scheduler_type StepLR --lr_scheduler_args step=2", "StepLR", "step"),
    wrong(TRAININGS, "--learning_rat 1e-4x", "1e-4x is not a number"),  # argparse takes beginnings
    wrong(TRAININGS, "--learnin_rate 1e-4", "Unknown option --learnin_rate", "--learning_rate?"),
    wrong(NETWORK_TRAININGS, "--rank 16 --lr 1e-4", "mean --network_dim?", "mean --learning_rate?"),
    wrong(TRAININGS, "--train_batch_size 2", "key of the dataset file: write batch_size = ..."),
    wrong(TRAININGS, "--cache_latents_to_disk", "the caching scripts make caches before a training"),
    wrong(TRAININGS, "--min_snr_gamma 5", "belongs to the noise of Stable Diffusion"),
    wrong(TRAININGS, "--xm_best_of_k 2", "the best of several noises is not built"),
    wrong(TRAININGS, "--save_precision bfloat16", "Did you mean bf16?"),
    wrong(TRAININGS, "--config_file dataset.toml", "describes a data set", "pass it to --dataset_config"),
    wrong(TRAININGS, "--config_file t.yaml", "t.yaml is not a TOML file"),
    wrong(GENERATIONS, "--cfg 5 --num_frames 9", "mean --guidance_scale?", "mean --video_length?"),
    wrong(GENERATIONS, "--lora x", "Unknown option --lora. Did you mean --lora_weight?"),
    wrong(GENERATIONS, "--frame 3", "Unknown option --frame. Did you mean --video_length?"),
    wrong(TRAININGS, "--output o --step 3", "--output. Did you mean --output_dir?", "--step. Omit it."),
    wrong(GENERATIONS, "--output out.mp4", "Unknown option --output. Did you mean --save_path?"),
    wrong(NETWORK_TRAININGS, "--dim 4 --resume_from x", "mean --network_dim?", "mean --resume?"),
    wrong(GENERATIONS, "--width 9", "Did you mean --video_size HEIGHT WIDTH?"),
    wrong((*GENERATIONS, *NETWORK_TRAININGS), "--int8", "--int8. Did you mean --convrot_int8?"),
    wrong(WAN, "--text_encoder x", "Unknown option --text_encoder. Pass --t5 (umT5 text encoder"),
    wrong(CACHE_TEXTS, "--gemma2 x", "Unknown option --gemma2. Pass --t5"),
    wrong(FP, "--t5 x", "Unknown option --t5. Pass --text_encoder1 (", "and --text_encoder2 ("),
    wrong(GENERATIONS, "--lora_scale 1", "Did you mean --lora_multiplier?"),
    wrong(WAN, "--sample_solver euler", "Did you mean vanilla?"),
    wrong(MERGE, "--models lora.safetensors", "Did you mean --lora_weight?"),
    wrong(TRAININGS, "--load_tensors", "key of the dataset file: write load_tensors = ... in its table"),
    wrong(NETWORK_TRAININGS, "--network_module networks.lora_wann", "Did you mean networks.lora_wan?"),
    wrong(NETWORK_TRAININGS, "--network_module networks.lora-wan", "is not an import path"),
    wrong(NETWORK_TRAININGS, "--network_module networks.lora_flux_2", "is for a different model than this"),
    wrong(NETWORK_TRAININGS, "--network_module networks.lora_flux", "is for a different model than this"),
    wrong(NETWORK_TRAININGS, "--network_module json", "Python's standard library"),
    wrong(NETWORK_TRAININGS, "--network_module packaging", "create_network"),
    wrong(NETWORK_TRAININGS, "--network_args include_patterns=.*ffn.*", "write a Python list"),
    wrong(NETWORK_TRAININGS, "--network_args rank_dropout 0.1", "'rank_dropout'", "write key=value"),
    wrong(GENERATIONS, "--lora_weight lora.safetensors --include_patterns [", "--include_patterns '['"),
    wrong(GENERATIONS, "--include_patterns a b", "is about LoRA files", "pass --lora_weight"),
    wrong(CACHE, "--debug_mode console --console_back pink", "--console_back pink", "use one of black"),
)
FILES = (
    wrong(GENERATIONS, "--dit BAD/cut.safetensors", "cut.safetensors is damaged or incomplete", "Download"),
    wrong(GENERATIONS, "--vae BAD/text.txt", "text.txt is neither a safetensors nor a PyTorch file"),
    wrong(GENERATIONS, "--dit BAD/folder", "without exactly one model", "Pass the path of the file"),
    wrong((*GENERATIONS, *TRAININGS), "--dit BAD/three", "a.safetensors, b.safetensors, c.safetensors"),
    wrong(TRAININGS, "--config_file BAD/none_in.toml", "omit the key"),
    wrong(GENERATIONS, "--dit 5", "--dit 5: no such file"),
    wrong(WAN, "--vae Wan-AI/Wan2.1-T2V-14B", "Repositories of the hub are not downloaded here"),
    wrong(GENERATIONS, "--dit=", "--dit is empty", "omit the option"),
    wrong(GENERATIONS, "--vae model/dit.safetensors", "dit.safetensors is not", "--vae"),
    wrong(
        GENERATIONS,
        "--lora_weight model/dit.safetensors",
        "is not a LoRA for a video or image model",
        "Pass a LoRA",
    ),
    wrong(GENERATIONS, "--lora_weight BAD/other_lora.safetensors", "is not known", "Pass the file"),
    wrong(GENERATIONS, "--save_path BAD/text.txt/inside", "--save_path", "Choose another folder"),
    wrong(GENERATIONS, "--from_file BAD/empty.safetensors", "has no prompt", "Write one per line"),
    wrong(GENERATIONS, "--from_file BAD/lfs.safetensors", "Git LFS pointer", "Download it again"),
    wrong(GENERATIONS, "--from_file BAD/utf16.txt", "utf16.txt", "not UTF-8"),
    wrong(GENERATIONS, "--latent_path BAD/folder", "--latent_path", "is a folder. Pass the files in it"),
    wrong(GENERATIONS, "--latent_path model/vae.safetensors", "vae.safetensors", "no tensor `latent`"),
    wrong(GENERATIONS, "--save_merged_model BAD/folder", "is a folder. Pass the name of the file"),
    wrong(GENERATIONS, "--save_merged_model merged.ckpt", "Pass a name that ends in .safetensors"),
    wrong(WAN, "--t5_tokenizer BAD/lfs.json", "--t5_tokenizer", "git lfs pull"),
    wrong(WAN, "--ckpt_dir BAD/text.txt", "--ckpt_dir", "no such folder"),
    wrong((HV, FP, *HV_TEXTS), "--text_encoder2 model/text_encoder", "--text_encoder2"),
    wrong((HV, FP), "--text_encoder2_tokenizer BAD/page.json", "--text_encoder2_tokenizer", "a web page"),
    wrong(HV, "--video_path BAD/text.txt", "--video_path", "text.txt"),
    wrong(FP, "--end_image_path BAD/text.txt", "--end_image_path", "Pass an image file"),
    wrong(FP, "--one_frame_inference default --control_image_path BAD/none.png", "--control_image_path"),
    wrong((WAN_TRAIN, WAN_FULL), "--t5 model/vae.safetensors", "is not an umT5 encoder", "--t5"),
    wrong(TRAININGS, "--output_name a/b", "--output_name 'a/b'", "which --output_dir names"),
    wrong(TRAININGS, "--resume BAD/text.txt", "--resume", "Pass a ...-state folder"),
    wrong(TRAININGS, "--resume BAD/folder", "is not a state folder", "Pass a ...-state folder"),
    wrong(TRAININGS, "--logging_dir logs --log_tracker_config BAD/text.toml", "is not valid TOML"),
    wrong(TRAININGS, "--sample_at_first", "pass --sample_prompts"),
    wrong(TRAININGS, "--sample_at_first --sample_prompts BAD/folder", "is a folder. Pass a .txt"),
    wrong(TRAININGS, "--sample_at_first --sample_prompts BAD/prompts.md", ".md is not supported. Use .txt"),
    wrong(
        TRAININGS, SAMPLED, "--vae is missing", "the samples of --sample_prompts need it", without=["--vae"]
    ),
    wrong(
        TRAININGS,
        "--sample_at_first --sample_prompts BAD/samples.txt",
        "samples.txt, line 2 'a cat --w abc': --w: 'abc' does not begin with a number",
        "line 3 'a dog --s x'",
    ),
    wrong(WAN_TRAIN, SAMPLED, "--t5 is missing", without=["--t5"]),
    wrong((HV_TRAIN, FP_TRAIN), SAMPLED, "--text_encoder1 is missing", without=["--text_encoder1"]),
    wrong(FP_TRAIN, SAMPLED, "--image_encoder is missing", without=["--image_encoder"]),
    wrong(
        NETWORK_TRAININGS,
        "--network_weights model/dit.safetensors",
        "is not a LoRA for a video or image model",
    ),
    wrong(NETWORK_TRAININGS, "--network_weights BAD/other_lora.safetensors", "is not known", "Pass the file"),
    wrong(NETWORK_TRAININGS, "--sample_lora BAD/other_lora.safetensors", "is not known", "Pass the file"),
    wrong(TRAININGS, "--sample_lora model/dit.safetensors", "is not a LoRA for a video or image model"),
    wrong(NETWORK_TRAININGS, "--network_module networks.lokr --network_args factor=0", "factor=0"),
    wrong(NETWORK_TRAININGS, "--network_module networks.loha --network_dropout 0.1", "for LoRAs only"),
    wrong(NETWORK_TRAININGS, "--network_module networks.oft --network_args rank_dropout=0.1", "has no ranks"),
    wrong(NETWORK_TRAININGS, "--network_module networks.oft --scale_weight_norms 1", "has no norm to scale"),
    wrong(NETWORK_TRAININGS, "--network_module networks.boft", "BOFT is not supported", "Use networks.oft"),
    wrong(NETWORK_TRAININGS, "--network_module networks.oft_v2", "is networks.oft here"),
    wrong(NETWORK_TRAININGS, "--network_module networks.dylora", "DyLoRA", "Use networks.lora"),
    wrong(NETWORK_TRAININGS, "--network_module networks.lora_fa", "LoRA-FA", "Use networks.lora"),
    wrong(NETWORK_TRAININGS, "--boft_block_size 4", "BOFT is not built"),
    wrong(NETWORK_TRAININGS, "--oft_block_size 32", "Did you mean --network_dim?"),
    wrong(NETWORK_TRAININGS, "--tlora True", "--network_args tlora=True"),
    wrong(NETWORK_TRAININGS, "--network_args tlora_alpha=2", "tlora_alpha is for T-LoRA: add tlora=True"),
    wrong(NETWORK_TRAININGS, "--network_module networks.loha --network_args tlora=True", "for LoRAs only"),
    wrong(NETWORK_TRAININGS, "--network_args tlora=True dora_wd=True", "cannot be used together"),
    wrong(TRAININGS, "--do_differential_guidance", "the same as a higher --learning_rate"),
    wrong(
        NETWORK_TRAININGS, "--network_module networks.lora_flux", "for a different model", "Pass networks."
    ),
    wrong(NETWORK_TRAININGS, "--base_weights BAD/other_lora.safetensors", "is not known"),
    wrong(TRAININGS, "--config_file BAD/none.toml", "--config_file", "Pass the path of a TOML file"),
    wrong(TRAININGS, "--config_file BAD/utf16.toml", "--config_file", "utf16.toml is not"),
    wrong(TRAININGS, "--config_file BAD/typo.toml", "no option is called learning_rat", "learning_rate?"),
    wrong(TRAININGS, "--config_file BAD/section.toml", "max_train_steps = 'ten'", "a whole number"),
    wrong(TRAININGS, "--config_file BAD/switch.toml", "sdpa = 'yes'", "true or false"),
    wrong(TRAININGS, "--config_file BAD/choice.toml", "mixed_precision", "Did you mean bf16?"),
    wrong(CACHE, "", "--vae is missing", without=["--vae"]),
    wrong("fpack_cache_latents.py", "", "--image_encoder is missing", without=["--image_encoder"]),
    wrong(MERGE, "--dit model/vae.safetensors", "is not a transformer that LoRAs can be merged into"),
    wrong(MERGE, "--lora_weight BAD/other_lora.safetensors", "is not known", "Pass the file"),
    wrong(MERGE, "--save_merged_model model/dit.safetensors", "would be lost. Pass a new name"),
    wrong(MERGE, "--dit_in_channels 7", "--dit_in_channels is 7"),
    wrong(CONVERT, "--input model/dit.safetensors", "is not a LoRA"),
    wrong(AVERAGE, "--output_file lora.safetensors", "--output_file lora.safetensors", "Pass a new name"),
    wrong(AVERAGE, "--output_file BAD/folder", "--output_file", "is a folder"),
)
OF_ANOTHER_KIND = (
    wrong((*GENERATIONS, *TRAININGS), "--dit model/vae.safetensors", "vae.safetensors is not", "--dit"),
    wrong(CACHE, "--vae model/t5.safetensors", "t5.safetensors is not", "--vae"),
    wrong(CACHE, "--clip model/dit.safetensors", "dit.safetensors is not", "--clip"),
    wrong(CACHE_TEXTS, "--t5 model/clip.safetensors", "clip.safetensors is not", "--t5"),
    wrong((HV, *HV_TEXTS), f"--text_encoder1 {SECOND}", f"{SECOND} is not", "--text_encoder1"),
    wrong((FP, "fpack_cache_latents.py"), "--image_encoder model/vae.safetensors", "vae.safetensors is not"),
    wrong(WAN_TRAIN, "--base_weights model/t5.safetensors", "t5.safetensors is not a LoRA"),
)
# a letter is wrong: the name that was meant is shown
NEARLY = (
    wrong((*GENERATIONS, *TRAININGS), "--dit model/dot.safetensors", "Did you mean model/dit.safetensors?"),
    wrong(GENERATIONS, "--vae modle/vae.safetensors", "Did you mean model/vae.safetensors?"),
    wrong(HV, "--vae modle/text_encoder", "Did you mean model/text_encoder?"),
    wrong(GENERATIONS, "--lora_weight lorra.safetensors", "Did you mean lora.safetensors?"),
    wrong(GENERATIONS, "--from_file promts.txt", "Did you mean prompts.txt?"),
    wrong(TRAININGS, "--config_file dataset.tml", "Did you mean dataset.toml?"),
    wrong(TRAININGS, "--dataset_config datasett.toml", "Did you mean dataset.toml?"),
    wrong(TRAININGS, "--resume modell", "Did you mean model?"),
    wrong(FP, "--end_image_path strat.png", "Did you mean start.png?"),
    wrong(MERGE, "--lora_weight lorra.safetensors", "Did you mean lora.safetensors?"),
    wrong(CONVERT, "--input lorra.safetensors", "Did you mean lora.safetensors?"),
    wrong(FP, "--end_image_path BAD/clip.png", "clip.png is a video, but an image is needed"),
)
# how paths go wrong on their way from a page or a shell
MISTYPED = (
    wrong(WAN, "--dit=https://example.org/wan.safetensors", "this is an address. Download"),
    wrong(WAN, "--dit=hf:owner/name", "this is an address"),
    wrong(WAN, "--dit=\u201cmodels/wan.safetensors\u201d", "--dit models/wan.safetensors: no such file"),
    wrong(WAN, "--dit='models/wan.safetensors", 'straight ones around: "models/wan.safetensors"'),
    wrong(WAN, "--dit='https://example.org/wan.safetensors'", "this is an address. Download"),
    wrong(WAN, "--dit='~nosuchuser/wan.safetensors'", "there is no such user"),
    wrong(WAN, "--dit=$MODELS/wan.safetensors", "$MODELS is not a folder, and no variable was substituted"),
    wrong(WAN, "--dit=%MODELS%/wan.safetensors", "%MODELS% is not a folder"),
    wrong(WAN, f"--dit={Path('/').absolute()}wan.safetensors", "is a variable that stood before it not set?"),
    wrong(WAN, "--dit=models/*.safetensors", "A pattern that matches no file stays unchanged"),
    wrong(WAN, "--lora_weight=models/*.safetensors", "A pattern that matches no file stays unchanged"),
    wrong(WAN, "--dit=None", "Omit it"),
    wrong(WAN, "--dit=~nosuchuser/wan.safetensors", "there is no such user"),
    wrong(WAN, f"--dit={'w' * 300}", "no file has so long a name"),
)
TOGETHER = (
    wrong(GENERATIONS, "--prompt=", "--prompt is empty", "say what the video should show"),
    wrong(GENERATIONS, "", "nothing to do", "--prompt", without=["--prompt"]),
    wrong(
        *(GENERATIONS, "--from_file dataset.toml", "a text file with a prompt on each line"),
        without=["--prompt"],
    ),
    wrong(GENERATIONS, "--from_file prompts.txt --interactive", "exclude each other"),
    wrong(
        GENERATIONS,
        "--cfgzerostar_scaling --perp_neg 1.5",
        "--perp_neg and --cfgzerostar_scaling",
        "pass one of them",
    ),
    wrong(GENERATIONS, "--perp_neg 1.5 --slg_mode original --slg_layers 1", "Use --slg_mode uncond"),
    wrong(
        GENERATIONS,
        "--guidance_scale 3 --cfg_schedule 1 --cfg_skip_mode late --cfg_apply_ratio 1",
        "--cfg_schedule '1' and --cfg_skip_mode late",
        "pass one of them",
    ),
    wrong(GENERATIONS, "--latent_path latent.safetensors --interactive", "--latent_path only decodes"),
    wrong(GENERATIONS, "--latent_path latent.safetensors --output_type latent", "Use video or images"),
    wrong(GENERATIONS, "--cfg_skip_mode early", "--cfg_skip_mode needs --cfg_apply_ratio"),
    wrong(TRAININGS, "--gradient_checkpointing True", "is a switch: omit True"),
    wrong(GENERATIONS, "--save_path bell.mp3", "--save_path bell.mp3", "written as WAV: pass bell.wav"),
    wrong(GENERATIONS, "--save_path made.gif", "--save_path made.gif", "Pass made.mp4"),
    wrong(GENERATIONS, "--save_path a.mp4 --num_videos 2", "a.mp4 with --num_videos 2", "such as a"),
    wrong(GENERATIONS, "--save_path a.mp4 --output_type latent", "their own names", "such as a"),
    wrong(GENERATIONS, "--prompt prompts.txt", "prompts.txt is a file", "pass --from_file prompts.txt"),
    wrong(CONVERT, "a b c", "a b c: 3 words without an option", without=["--input", "--output"]),
    wrong(GENERATIONS, "a dog", "a dog belongs to no option", "in quotes"),
    wrong(GENERATIONS, "--prompt \u201ca dog\u201d", "typographic", 'Write "..." around a text'),
    wrong(
        (*GENERATIONS, *TRAININGS, MERGE),
        "--dit model/dit.safetensors model/vae.safetensors lora.safetensors",
        "takes one path but got 3",
        "replaced a pattern (*)",
    ),
    wrong(GENERATIONS, "", "--save_path", "is missing", without=["--save_path"]),
    wrong(TRAININGS, "--log_with tensorboard", "--log_with tensorboard needs --logging_dir"),
    wrong(TRAININGS, "--lr_scheduler piecewise_constant", "step_rules"),
    wrong(TRAININGS, "", "--output_name is missing", without=["--output_name"]),
    wrong(TRAININGS, "", "--output_dir is missing", without=["--output_dir"]),
    wrong(TRAININGS, "", "--dit is missing", without=["--dit"]),
    wrong(TRAININGS, "--validate_every_n_steps 5", "pass --validation_split"),
    wrong(FULL_TRAININGS, "--fp8_base", "--fp8_base", "omit it"),
    wrong(FULL_TRAININGS, "--full_bf16", "--full_bf16", "use bf16 for both"),
    wrong(FULL_TRAININGS, "--blocks_to_swap 1", "--fused_backward_pass"),
    wrong(HV_FULL, "--dit_dtype bfloat16", "--dit_dtype", "omit it"),
    wrong(FP, "--one_frame", "expected one argument: default|target_index=N,control_index=N+N"),
    wrong(FP, "--one_frame_inference 0+1", "'0+1' is unknown", "control_index=N+N"),
    wrong(FP, "--f1 --one_frame_inference default", "--one_frame_inference needs the FramePack model"),
    wrong(HV, "--scheduler dpm++ --sample_solver unipc", "--scheduler dpm++ is --sample_solver dpm++"),
    wrong(HV, "--dit_in_channels 32", "--dit_in_channels 32", "Omit the option"),
    wrong((WAN, WAN_TRAIN), "--task i2v-14B", "t2v"),
    wrong(WAN, "--riflex_index 3", "--riflex_index 3 with --rope_func default", "Add --rope_func comfy"),
    wrong(WAN, "--riflex_index 23 --rope_func comfy", "--riflex_index 23", "from 1 to 22"),
    wrong(HV, "--riflex_index 9", "--riflex_index 9", "from 1 to 8"),
)
# a message names an option by the flag that was typed
SPELLED = (
    wrong(GENERATIONS, "--nf4 --fp8", "--nf4 and --fp8 exclude each other"),
    wrong(GENERATIONS, "--nf4_base --fp8", "--nf4_base and --fp8 exclude each other"),
    wrong(WAN, "--src_video none.mp4", "--src_video: --task t2v-1.3B does not use it"),
    wrong(WAN, "--control_pa none.mp4", "--control_path: --task t2v-1.3B does not use it"),
    wrong(WAN, "--noise_mode sideways", "--noise_mode"),
)
MISTAKES = {"number": NUMBERS, "name": NAMES, "file": FILES, "kind": OF_ANOTHER_KIND, "path": MISTYPED}
MISTAKES |= {"together": TOGETHER, "nearly": NEARLY, "spelled": SPELLED}


def _cases() -> list[object]:
    """Each mistake in the first of its scripts; in the others, which read the same options, at night."""
    return [
        pytest.param(
            *(script, mistake),
            id=f"{kind} {script} {mistake.line or mistake.words[0]}",
            marks=() if script == mistake.scripts[0] else pytest.mark.slow,
        )
        for kind, mistakes in MISTAKES.items()
        for mistake in mistakes
        for script in mistake.scripts
    ]


@pytest.mark.parametrize("script", [script for script in COMMANDS if script != AVERAGE])
def test_without_a_mistake_a_command_begins_to_load(script: str, made_projects: dict[str, Path]) -> None:
    code, said = try_mistake(script, folder=made_projects[COMMANDS[script].family])

    assert code == (0 if script == CONVERT else LOADED), said


@pytest.mark.parametrize("marks", ['""', "''", "\u201c\u201d", "\u201e\u201c"])
def test_quotation_marks_around_a_path_are_taken_off(marks: str, made_projects: dict[str, Path]) -> None:
    folder = made_projects[COMMANDS[WAN].family]

    code, said = try_mistake(WAN, "--dit", f"{marks[0]}model/dit.safetensors{marks[1]}", folder=folder)

    assert code == LOADED, said


@pytest.mark.parametrize(("script", "mistake"), _cases())
def test_a_mistake_is_one_short_message_before_a_model_is_loaded(
    script: str, mistake: Mistake, made_projects: dict[str, Path], bad: Path
) -> None:
    folder = made_projects[COMMANDS[script].family]
    line = [word.replace("BAD", str(bad)) for word in mistake.line.split()]

    code, said = try_mistake(script, *line, folder=folder, without=mistake.without)

    assert code != LOADED, f"{LOADED} before it was found out"
    assert isinstance(code, int)
    message = assert_one_message(code, said, *mistake.words, remedy=False)
    assert 1 <= len(message.splitlines()) <= 3, message


@pytest.mark.parametrize(("more", "may_omit"), [((), False), (("--interactive",), True)])
def test_an_empty_prompt_is_left_out_only_if_something_else_is_to_be_done(
    more: tuple[str, ...], may_omit: bool, tmp_path: Path
) -> None:
    words = ["--model_version", "layered", "--prompt=", "--save_path", "o", *more]

    told = run_here("qwen_image_generate_image.py", *words, folder=tmp_path)

    message = assert_one_message(*told, "--prompt is empty: say what the image should show", remedy=False)
    assert ("omit the option" in message) is may_omit
