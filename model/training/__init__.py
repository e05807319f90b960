"""One rank's trainer: batches on a device, the forward pass, the optimizer, pretraining steps."""
