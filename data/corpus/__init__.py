"""Pretraining text: documents are tokenized into Megatron's indexed datasets, blended and cut into samples."""
