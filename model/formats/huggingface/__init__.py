"""Hugging Face's checkpoint folders: config.json and safetensors."""
