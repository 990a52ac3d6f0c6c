"""What needs a GPU; :mod:`benchmarks.gpu.gpu_engine` runs with PyTorch, NumPy and nnU-Net's architectures alone."""
