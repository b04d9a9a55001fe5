"""Rules of keys that several trainers share. No torch."""

from project.foreign.contract import (
    ADAPTER as ADAPTER_FILE,
)
from project.foreign.contract import (
    ARGUMENT,
    ARGUMENTS,
    DATA,
    EPOCHS,
    FILE,
    FOLDER,
    FRAMES,
    FULL_RANK,
    KEPT,
    LAST,
    MODEL,
    NETWORK,
    NETWORK_ARGUMENT,
    NEW,
    OWN_FILE,
    PER_EPOCH,
    SAMPLE,
    SIZES,
    TRAINING,
    KeyRule,
    integer,
    number,
    omitted,
    read_arguments,
    read_folder,
    read_frames,
    read_loss,
    read_name,
    read_network,
    read_one_size,
    read_optimizer,
    read_path,
    read_repeats,
    read_scheduler,
    read_shift,
    read_sizes,
    read_switch,
    read_timestep_sampling,
    read_trigger,
    read_warmup,
)

MODEL_NAME = KeyRule(MODEL)
MODEL_FILE = KeyRule(FILE)
NETWORK_KIND = KeyRule(NETWORK, "", read_network)
RANK = KeyRule(TRAINING, "network_dim", integer(1, 2 * FULL_RANK))
ALPHA = KeyRule(TRAINING, "network_alpha", number(0, 2_000_000))
DROPOUT = KeyRule(TRAINING, "network_dropout", number(0, 0.999))
LOKR_FACTOR = KeyRule(NETWORK_ARGUMENT, "factor", integer(-1, 100_000))
CONVOLUTION_RANK = KeyRule(NETWORK_ARGUMENT, "conv_dim", integer(0, 100_000))
CONVOLUTION_ALPHA = KeyRule(NETWORK_ARGUMENT, "conv_alpha", number(0, 100_000))
DORA = KeyRule(NETWORK_ARGUMENT, "dora_wd", read_switch)
WORD = KeyRule(NEW, "trigger_word", read_trigger)
VECTORS = KeyRule(TRAINING, "num_vectors_per_token", integer(1, 1000))
INIT_WORD = KeyRule(TRAINING, "init_word", str)

LEARNING_RATE = KeyRule(TRAINING, "learning_rate", number(0, 1000))
LOSS = KeyRule(TRAINING, "loss_type", read_loss)
SCHEDULER = KeyRule(TRAINING, "lr_scheduler", read_scheduler)
POWER = KeyRule(TRAINING, "lr_scheduler_power", number(0, 100))
CYCLES = KeyRule(TRAINING, "lr_scheduler_num_cycles", integer(1, 10_000))
WARMUP_STEPS = KeyRule(TRAINING, "lr_warmup_steps", read_warmup)
OPTIMIZER = KeyRule(TRAINING, "optimizer_type", read_optimizer)
OPTIMIZER_ARGUMENTS = KeyRule(ARGUMENTS, "", read_arguments)
GRADIENT_LIMIT = KeyRule(TRAINING, "max_grad_norm", number(0, 1e6))
ACCUMULATED = KeyRule(TRAINING, "gradient_accumulation_steps", integer(1, 4096))
STEPS = KeyRule(NEW, "max_train_steps", integer(0))
NUM_EPOCHS = KeyRule(EPOCHS, LAST, integer(0))
SEED = KeyRule(TRAINING, "seed", integer(0, 2**32 - 1))
EMA_DECAY = KeyRule(TRAINING, "ema_decay", number(0, 0.999999))
MIN_SNR = KeyRule(TRAINING, "min_snr_gamma", number(0, 1000))
NOISE_OFFSET = KeyRule(TRAINING, "noise_offset", number(-10, 10))
SAVE_STEPS = KeyRule(TRAINING, "save_every_n_steps", integer(0))
SAVE_EPOCHS = KeyRule(PER_EPOCH, "save_every_n_steps", integer(0))
SAMPLE_STEPS = KeyRule(TRAINING, "sample_every_n_steps", integer(0))
SAMPLE_EPOCHS = KeyRule(PER_EPOCH, "sample_every_n_steps", integer(0))
OUTPUT_NAME = KeyRule(NEW, "output_name", read_name)
OUTPUT_FOLDER = omitted("output_dir in run.toml says where files go")

MEDIA_FOLDER = KeyRule(FOLDER, "", read_folder)
BATCH_SIZE = KeyRule(DATA, "batch_size", integer(1, 1024))
NUM_REPEATS = KeyRule(DATA, "num_repeats", read_repeats)
RESOLUTION = KeyRule(SIZES, "resolution", read_one_size)
RESOLUTIONS = KeyRule(SIZES, "resolution", read_sizes)
CLIP_FRAMES = KeyRule(FRAMES, "target_frames", read_frames)
CAPTION_DROPOUT = KeyRule(DATA, "caption_dropout_rate", number(0, 1))
SHUFFLED = KeyRule(DATA, "shuffle_caption", read_switch)
KEPT_PARTS = KeyRule(DATA, "keep_tokens", integer(0, 1000))
MIRRORED = KeyRule(DATA, "flip_aug", read_switch)
MASKS = omitted("`new` names the masks that it sees, for mask_directory in dataset.toml")
TAG_DROPOUT = KeyRule(DATA, "caption_tag_dropout_rate", number(0, 1))
LAYERS = omitted("network_args below [training] choose layers: docs/networks.md")
DISTRIBUTION = KeyRule(TRAINING, "timestep_sampling", read_timestep_sampling)
SIGMOID_SCALE = KeyRule(TRAINING, "sigmoid_scale", number(0, 100))
TIMESTEPS = omitted("timestep_sampling below [training] is that of the model's page")
SHIFT = KeyRule(TRAINING, "discrete_flow_shift", read_shift)
ADAPTER = KeyRule(ADAPTER_FILE, "", str)
START = KeyRule(OWN_FILE, "network_weights", read_path)
SAME_FILE = omitted("the model's own file is used, which is the same for all checkpoints of the model")
BUCKETS = omitted("files always keep their shape")
BUCKETED = KeyRule(DATA, "enable_bucket", read_switch)
CAPTIONS = omitted("`new` finds the captions itself")
REGULARISING = omitted(
    "a folder of regularization images is recognized by its name: call it reg, inside the described folder"
)
CONTROLS = omitted("control images are looked for in a folder control or conditioning of the one described")

CHOSEN_BY_NEW = omitted("`new` chooses it for the card and the model")
SAMPLES = KeyRule(SAMPLE)
SAMPLERS = omitted("samples are made as the model's page says")
CACHES = omitted("encoded data are always cached")
KEPT_FILES = KeyRule(KEPT, "", integer(0, 100_000))
UPLOADS = omitted("nothing is sent anywhere unless you type it with `run`")
LOGS = omitted("output/NAME.html has the curves; other logs are options of the training")
NAMES = omitted("it names something and changes nothing")
VALIDATION = omitted(
    "it needs a folder of its own there; validation_split below [training] holds files of this one back"
)


def own_file(*options: str) -> KeyRule:
    """Return the rule for a key that names a file; `options` are the names of --model_file that it may be."""
    return KeyRule(OWN_FILE, " ".join(options), read_path)


def argument(name: str) -> KeyRule:
    """Return the rule for a key that sets an argument of the optimizer."""
    return KeyRule(ARGUMENT, name)
