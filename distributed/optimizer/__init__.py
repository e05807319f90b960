"""Which rank updates which part of a parameter: DeepSpeed's ZeRO, Muon over cut matrices, snapshots."""
