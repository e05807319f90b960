"""Sharded optimizers: DeepSpeed's ZeRO, Muon over sharded matrices, gradient norms, snapshots to step back."""
