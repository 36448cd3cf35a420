"""What the generator knows about GPUs: architectures, and how the kernels of templates/cuda are cut for them."""
