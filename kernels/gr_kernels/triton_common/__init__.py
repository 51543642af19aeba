"""What the Triton kernels of all operators share: one idea a file, imported from there."""
