"""Linear layers whose weights are stored in 8 or 4 bits.

forms: the protocol of all quantization formats
fp8: 8-bit floats, plain or divided by scales
fp8_products: matrix products with frozen fp8 weights, with gradients
int8: int8 with one scale per row, rotated (ConvRot)
nf4: 4 bits with bitsandbytes' levels
ggml: dequantize the formats of GGUF files
packed: mxfp8, nvfp4, int4, which are only read
"""
