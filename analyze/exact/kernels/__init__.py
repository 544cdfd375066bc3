"""The exact pass on a GPU, as Triton kernels."""
