"""Files of tensors, read by byte ranges: safetensors and PyTorch pickles, none of which runs code."""
