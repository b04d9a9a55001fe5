"""Linear layers whose weights are stored in 8 or 4 bits.

forms: what every format of a stored weight can tell
fp8: floats of 8 bits, plain or divided by scales
fp8_products: products of a frozen fp8 weight, with gradient
int8: int8 with a scale for each row, rotated (ConvRot)
nf4: 4 bits by the levels of bitsandbytes
ggml: values of the kinds of GGUF files
packed: mxfp8, nvfp4, int4, which are only read
"""
