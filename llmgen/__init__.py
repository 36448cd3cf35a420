"""llmgen: from a model configuration to one standalone C or CUDA source file that trains it."""

__version__ = "0.1.0"
