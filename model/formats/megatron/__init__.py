"""Megatron-LM's torch_dist checkpoint folders of a GPTModel."""
