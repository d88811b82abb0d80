"""Attend within the documents of a packed row, on the CPU and on CUDA."""
