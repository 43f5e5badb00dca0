"""The operators as CUDA kernels: their source, its compilation at first use, and their launch."""
