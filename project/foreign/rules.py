"""What keys mean that several trainers have: a rule each. No torch."""

from project.foreign.contract import (
    DATA,
    EPOCHS,
    FOLDER,
    KIND,
    MODEL,
    NEW,
    TRAINING,
    KeyRule,
    left,
    number,
    read_folder,
    read_name,
    read_optimizer,
    read_scheduler,
    read_side,
    whole,
)

MODEL_NAME = KeyRule(MODEL)
NETWORK_KIND = KeyRule(KIND)
RANK = KeyRule(TRAINING, "network_dim", whole(1, 4096))
ALPHA = KeyRule(TRAINING, "network_alpha", number(0, 4096))

LEARNING_RATE = KeyRule(TRAINING, "learning_rate", number(0, 10))
SCHEDULER = KeyRule(TRAINING, "lr_scheduler", read_scheduler)
WARMUP_STEPS = KeyRule(TRAINING, "lr_warmup_steps", whole(0))
OPTIMIZER = KeyRule(TRAINING, "optimizer_type", read_optimizer)
GRADIENT_LIMIT = KeyRule(TRAINING, "max_grad_norm", number(0, 1e6))
ACCUMULATED = KeyRule(TRAINING, "gradient_accumulation_steps", whole(1, 4096))
STEPS = KeyRule(NEW, "max_train_steps", whole(1))
NUM_EPOCHS = KeyRule(EPOCHS, "", whole(1))
SEED = KeyRule(TRAINING, "seed", whole(0, 2**32 - 1))
SAVE_STEPS = KeyRule(TRAINING, "save_every_n_steps", whole(1))
SAVE_EPOCHS = left("saves are counted in steps: save_every_n_steps in run.toml")
OUTPUT_NAME = KeyRule(NEW, "output_name", read_name)
OUTPUT_FOLDER = left("output_dir in run.toml says where files go")

MEDIA_FOLDER = KeyRule(FOLDER, "", read_folder)
BATCH_SIZE = KeyRule(DATA, "batch_size", whole(1, 1024))
NUM_REPEATS = KeyRule(DATA, "num_repeats", whole(1, 100_000))
RESOLUTION = KeyRule(DATA, "resolution", read_side)
BUCKETS = left("files always keep their shape")
CAPTIONS = left("`new` finds the captions itself")

OF_CARD = left("`new` chooses it for the card and the model")
SAMPLES = left("prompts.txt has the prompts of samples")
CACHES = left("what is encoded is always cached")
