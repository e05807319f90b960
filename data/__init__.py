"""Text, tokens, prompts and preferences become batches. No torch.distributed: ranks arrive as plain numbers."""
