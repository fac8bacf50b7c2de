"""bigmed: large-scale self-supervised pretraining on medical images, in JAX/Flax."""

__version__ = "0.1.0"
