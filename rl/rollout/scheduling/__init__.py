"""Decides what the next forward pass computes, on trial too, and in which blocks of the KV cache it lies."""
