"""Open, recognize, load and write files of weights.

changing: plan another file, or several with an index
containers: read safetensors and torch files without running code
dialects: translate names of files to ours, join parts
dits: load transformers of every family
embedding_files: files of embeddings, the vectors of a word
encoders: find encoders in Hugging Face's layout
file_hashes: hashes of a model's file, and where they are kept
filling: fill a network from an open file
finite: find NaN or infinite weights while reading
first_bytes: recognize files that are not models by how they begin
gguf_files: read GGUF files, with bounded memory
kinds: recognize model files by the names of tensors
marks: recognize packed weights by what a file says
metadata_text: print the metadata of a safetensors file
model_files: check model files and folders given by options
model_folders: what a folder of transformers says, held against its weights
opening: open model files in any container
quantizing: write layers in 8 bits, or 16 again
shard_options: names and sizes of a model's parts
shards: cut a model into files with an index
stored/: linear layers with weights in 8 or 4 bits
tokenizers: find and read the tokenizer of a text encoder
unused: tensors of a file that its network does not have
weighted_sum: merge whole checkpoints of one model
writing: write a safetensors file tensor by tensor
"""
