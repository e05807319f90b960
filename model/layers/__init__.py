"""The nn.Modules that a transformer block is built of, on megatron-core's parallel linear layers."""
