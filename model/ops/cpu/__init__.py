"""CPU kernels in C: how they are compiled and loaded, and the functions on tensors that call them."""
