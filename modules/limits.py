"""All limits on what comes from outside: files, texts and answers that others made. Standard library only.

The readers that apply them to whole files are in `text_files`; a reader of a format applies those of its
format. Limits of options and of keys stand in their declarations.
"""

# numbers of a generation: what is larger is a slip of the finger; the models know 1000 timesteps
MAX_SIDE = 16384  # pixels
MAX_MADE_FRAMES = 100_000
MAX_STEPS = 10_000
MAX_SCALE = 1000  # of guidance

# files of text
MAX_TEXT_BYTES = 1 << 24  # 16 MiB: a dataset configuration of 50,000 tables
MAX_CAPTION_BYTES = 1 << 20  # 1 MiB; encoders read at most some hundred words
MAX_METADATA_BYTES = 1 << 30  # of a JSON list of pictures: some million
MAX_LINE_CHARACTERS = 1 << 23  # of a JSONL list: a caption of 1 MiB with every character written as \uXXXX
MAX_DEPTH = 64  # tables in tables; no file that is meant goes beyond 10

# checkpoints and the files next to them
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file; the library's own limit
MAX_TENSOR_NAME = 1_000  # characters; of numbers in it Python reads some 4,000 digits, and no more
MAX_SHARDS = 10_000  # files of a model; the largest in use have some hundred
MAX_TENSORS = 50_000  # of a file; the largest models and LoRAs in use have some ten thousand
MAX_ELEMENTS = 1 << 48  # far above any tensor, far below where torch's own arithmetic overflows
MAX_BLOCKS = 1_000  # of one kind in a network; the largest models in use have some hundred
MAX_WRAPPERS = 64  # dictionaries around the tensors of one file; far more than any has
MAX_TOKENIZER_BYTES = 1 << 26  # 64 MiB; the largest tokenizer.json in use has 34
MAX_TOKENIZER_GROWTH = 256  # characters for one; those in use: 2 (CLIP), 18 (umT5, by Unicode's own tables)
MAX_EMBEDDING_BYTES = 1 << 26  # 64 MiB; 75 vectors of SDXL in float32 take 0.6 MiB
MAX_EXPRESSIONS = 1_000  # characters of all regular expressions in a LoRA's settings together
MAX_SEARCH_SECONDS = 0.5  # for one path with them: a hostile one keeps Python's `re` busy for years
MAX_RAFT_ITERATIONS = 200  # of an optical flow
MAX_PICKLE_STEPS = 600_000  # of a file of torch.save: 10,000 tensors; seconds of Python
SHORT_PICKLE_BYTES = 1 << 18  # of what takes no more steps, unless it is made to
MAX_PICKLE_BYTES = 1 << 22  # of a pickled program's names that are looked through
MAX_NOTE_CHARACTERS = 1 << 20  # of a detector; one of a thousand classes has some 20 thousand
MAX_ONNX_SIDE = 1 << 12  # pixels of the images that a file takes
MAX_ONNX_MEMORY = 2 << 30  # bytes of a run, besides three times the weights
MAX_ONNX_SECONDS = 120  # of a run, for each image: slow processors need some ten

# images and videos
MAX_PIXELS = 1 << 27  # above 100-megapixel cameras
MAX_DECODED_BYTES = 3 << 29  # 1.5 GiB, of an image while it is decoded: 12 for each of so many pixels
MAX_IMAGE_BYTES = 9 << 27  # of a file: pixels of 64 bits as they are, and what is said of them
MAX_FRAME_BYTES = 100_000_000  # of a decoded frame of a clip: 8K of 10 bits. Decoders hold up to 17 of them,
MAX_LONE_FRAME_BYTES = (
    1 << 28
)  # but few where each frame stands alone, as in ProRes: 8K of 12 bits with alpha
MAX_SHOWN_SECONDS = 60.0  # of one image; more is a damaged time, or a slide show
MAX_TAG_CHARACTERS = 1 << 18  # of a text in a file's metadata that is looked through

# data sets
MAX_CAPTIONS = 100  # of an item; each has a cache file
MAX_PATTERN_NAMES = 100_000  # that one pattern stands for
MAX_EXAMPLE_CHARACTERS = 4000  # of a caption in a command that is shown
MAX_COLUMNS = 10_000  # of a table
MAX_CELL_CHARACTERS = 131_072  # of CSV; the standard library's own limit
MIN_UNPACKED_BYTES = 1 << 26  # that any Parquet file may unpack to,
MAX_UNPACKED_TIMES = 1000  # its size, that a larger one may; texts that are all alike shrink that far
MAX_GROUP_BYTES = 1 << 31  # of a column in a row group of Parquet, which is read as a whole
MAX_TAR_HEADER_BYTES = 1 << 20  # of a long name or a pax header
MAX_TAR_NAME_BYTES = 1 << 12
MAX_ARRAY_BYTES = 1 << 30  # of all in an npz file; latents of 8192 x 8192 pixels take 64 MiB
MAX_ARRAYS = 10_000
MAX_INDEX_BYTES = 1 << 26  # of the index of a cache folder: 50,000 lines of a kilobyte
MAX_CACHE_NAME_BYTES = 1 << 10  # in a shard; systems allow 255
MAX_GENERATION = 1 << 32  # how often an entry of a shard was replaced
MAX_ENTRY_BYTES = 1 << 40
MAX_FRAMES = 10_000_000  # of a clip, as a cache says it: days

# addresses and servers
MAX_DOWNLOAD_BYTES = 1 << 38  # 256 GiB, of a file in a table
MAX_WAIT_SECONDS = 60.0  # that a site may ask for
MAX_ANSWER_BYTES = 1 << 24  # of a server that captions
MAX_ANSWER_CHARACTERS = 4000  # of a prompt that a language model writes

# prompts
MAX_LINE_OPTIONS = 300  # of a prompt line; all that there are, several times
MAX_LINE_SHOWN = 400  # characters of a line in a warning about it
MAX_WILDCARD_ROUNDS = 50  # of lines that draw from a file themselves
MAX_WILDCARD_DRAWS = 100_000  # of a text: lines that draw several lines each have no end otherwise
MAX_WILDCARD_CHARACTERS = 1 << 22  # of a text with its wildcards drawn
MAX_TEMPLATE_SECONDS = 15.0  # of a chat template, with the start of its process; usual ones take 0.01 s
MAX_TEMPLATE_CHARACTERS = 1 << 20  # that it makes
MAX_TEMPLATE_MEMORY = 1 << 30  # bytes of its process
MAX_NESTED = 50  # alternatives in alternatives
MAX_VARIANTS = 10_000  # of one prompt that enumerates
