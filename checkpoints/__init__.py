"""Open, recognize, load and write weight files.

changing: plan a changed copy of a model file
containers: read safetensors and torch files without running code
dialects: translate tensor names to ours, join parts
dits: load transformers of every family
embedding_files: read embedding files, the vectors of a word
encoders: find encoders in Hugging Face's layout
file_hashes: hashes of a model file, and their cache
filling: fill a network from an open file
finite: find NaN or infinite weights while reading
first_bytes: recognize files that are not models by their start
gguf_files: read GGUF files, with bounded memory
kinds: recognize model files by their tensor names
marks: recognize packed weights by ComfyUI's and bitsandbytes' marks
metadata_text: print the metadata of a safetensors file
model_files: check model files and folders set by options
model_folders: compare a folder's settings with its weights
opening: open model files in any container
quantizing: quantize layers to 8 bits, or dequantize them
shard_options: file names and sizes of sharded models
shards: split a model into files with an index
stored/: linear layers with weights in 8 or 4 bits
tokenizers: find and read the tokenizer of a text encoder
unused: tensors of a file that its network does not have
weighted_sum: merge full checkpoints of one model
writing: write a safetensors file tensor by tensor
"""
