"""Limits on input from other people: files, text and server responses. Standard library only.

The readers that apply them to whole files are in `text_files`; a reader of a format applies those of its
format. Limits of options and of keys are in their declarations.
"""

# numbers of a generation; larger ones are typing mistakes (models have 1000 timesteps)
MAX_SIDE = 16384  # pixels
MAX_MADE_FRAMES = 100_000
MAX_STEPS = 10_000
MAX_SCALE = 1000  # maximum guidance scale

# files of text
MAX_TEXT_BYTES = 1 << 24  # 16 MiB: a dataset configuration of 50,000 tables
MAX_CAPTION_BYTES = 1 << 20  # 1 MiB; encoders read at most some hundred words
MAX_METADATA_BYTES = 1 << 30  # of a JSON list of images: about a million entries
MAX_LINE_CHARACTERS = 1 << 23  # of a line in a JSONL list: a 1 MiB caption with all characters as \uXXXX
MAX_DEPTH = 64  # nested tables; real files have at most 10 levels

# checkpoints and the files next to them
MAX_HEADER_BYTES = 100_000_000  # of a safetensors file; the library's own limit
MAX_TENSOR_NAME = 1_000  # characters; Python rejects numbers with over 4,300 digits
MAX_SHARDS = 10_000  # files of a model; the largest in use have some hundred
MAX_TENSORS = 50_000  # of a file; the largest models and LoRAs in use have some ten thousand
MAX_ELEMENTS = 1 << 48  # far larger than any tensor, and far below torch's overflows
MAX_BLOCKS = 1_000  # of one kind in a network; the largest models in use have some hundred
MAX_WRAPPERS = 64  # nested dictionaries around a file's tensors; far more than real files have
MAX_TOKENIZER_BYTES = 1 << 26  # 64 MiB; the largest tokenizer.json in use has 34
MAX_TOKENIZER_GROWTH = 256  # output characters for one; in use: 2 (CLIP), 18 (umT5, by Unicode normalization)
MAX_EMBEDDING_BYTES = 1 << 26  # 64 MiB; 75 vectors of SDXL in float32 take 0.6 MiB
MAX_EXPRESSIONS = 1_000  # characters of all regular expressions in a LoRA's settings together
MAX_SEARCH_SECONDS = 0.5  # to match one path: malicious patterns can take years
MAX_RAFT_ITERATIONS = 200  # refinement iterations of optical flow
MAX_PICKLE_STEPS = 600_000  # of a file of torch.save: 10,000 tensors, some seconds
SHORT_PICKLE_BYTES = 1 << 18  # shorter pickles have few steps, unless they are malicious
MAX_PICKLE_BYTES = 1 << 22  # of a pickle that is searched for names
MAX_NOTE_CHARACTERS = 1 << 20  # of an ONNX file's metadata; a thousand classes take about 20,000
MAX_ONNX_SIDE = 1 << 12  # side in pixels of an ONNX file's input
MAX_ONNX_MEMORY = 2 << 30  # bytes of a run, in addition to three times the weights
MAX_ONNX_SECONDS = 120  # of a run for each image; slow CPUs need about ten

# images and videos
MAX_PIXELS = 1 << 27  # above 100-megapixel cameras
MAX_DECODED_BYTES = 3 << 29  # 1.5 GiB for decoding an image: 12 bytes per pixel
MAX_IMAGE_BYTES = 9 << 27  # of a file: uncompressed 64-bit pixels, and metadata
MAX_FRAME_BYTES = (
    100_000_000  # of a decoded frame of a clip: 8K with 10 bits. Decoders hold up to 17 of them,
)
# but few where each frame stands alone, as in ProRes: 8K of 12 bits with alpha
MAX_LONE_FRAME_BYTES = 1 << 28
MAX_SHOWN_SECONDS = 60.0  # of one frame; longer ones are damaged times or slide shows
MAX_TAG_CHARACTERS = 1 << 18  # of a metadata string that is parsed

# datasets
MAX_CAPTIONS = 100  # captions of an item; each has a cache file
MAX_PATTERN_NAMES = 100_000  # file names that one pattern expands to
MAX_EXAMPLE_CHARACTERS = 4000  # of a caption in a displayed command
MAX_COLUMNS = 10_000  # columns of a table
MAX_CELL_CHARACTERS = 131_072  # of CSV; the standard library's own limit
MIN_UNPACKED_BYTES = 1 << 26  # any Parquet file may unpack to this size;
MAX_UNPACKED_TIMES = 1000  # a larger file to this multiple of its size, as with identical texts
MAX_GROUP_BYTES = 1 << 31  # of a column in a Parquet row group, which is read as a whole
MAX_TAR_HEADER_BYTES = 1 << 20  # of a long name or a pax header in a tar file
MAX_TAR_NAME_BYTES = 1 << 12
MAX_ARRAY_BYTES = 1 << 30  # of all arrays in an npz file; latents of 8192 x 8192 pixels take 64 MiB
MAX_ARRAYS = 10_000
MAX_INDEX_BYTES = 1 << 26  # of the index of a cache folder: 50,000 lines of a kilobyte
MAX_CACHE_NAME_BYTES = 1 << 10  # of a name in a shard; file systems allow 255
MAX_GENERATION = 1 << 32  # how often an entry of a shard was replaced
MAX_ENTRY_BYTES = 1 << 40
MAX_FRAMES = 10_000_000  # frames of a clip in a cache: several days

# addresses and servers
MAX_DOWNLOAD_BYTES = 1 << 38  # 256 GiB, of a file in a table
MAX_WAIT_SECONDS = 60.0  # maximum wait that a site may request
MAX_ANSWER_BYTES = 1 << 24  # of a captioning server's answer
MAX_ANSWER_CHARACTERS = 4000  # of a prompt written by a language model

# prompts
MAX_LINE_OPTIONS = 300  # options of a prompt line; several times all existing ones
MAX_LINE_SHOWN = 400  # characters of a line in a warning about it
MAX_WILDCARD_ROUNDS = 50  # rounds of wildcards whose lines contain wildcards
MAX_WILDCARD_DRAWS = 100_000  # draws for a text, because nested wildcards may never end
MAX_WILDCARD_CHARACTERS = 1 << 22  # of a text with all wildcards replaced
MAX_TEMPLATE_SECONDS = 15.0  # for a chat template, including process start; typical ones take 0.01 s
MAX_TEMPLATE_CHARACTERS = 1 << 20  # of a rendered chat template
MAX_TEMPLATE_MEMORY = 1 << 30  # bytes of the process that renders a chat template
MAX_NESTED = 50  # nesting depth of alternatives
MAX_VARIANTS = 10_000  # of one prompt that enumerates all alternatives
