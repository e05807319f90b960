"""The compiled CPU kernels: C loops, how they are built and loaded, and tensor functions over them."""
