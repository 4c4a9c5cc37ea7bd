"""CUDA kernels over codes: sources, the compiled variants, loading and launching them.

Each op is a folder with its CUDA C++ source, its torch op and its naive reference. Needs torch and,
on a GPU, cuda-core; NVRTC only where no compiled kernel was shipped.
"""
