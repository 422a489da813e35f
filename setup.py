"""Installs the packages `medground` and `medground_kernels`; tools are configured in pyproject.toml.

The folder `kernels/` is installed as `medground_kernels` and has no `__init__.py`: a package called
`kernels` on the path would be taken for Hugging Face's package of that name, which transformers imports.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "medground/__init__.py").read_text(), re.MULTILINE)[1]

setup(
    name="medground",
    version=VERSION,
    description="Reinforcement learning that teaches vision-language models to ground medical phrases",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_namespace_packages(include=["medground", "medground.*"], exclude=["*.__pycache__"]),
        "medground_kernels",
    ],
    package_dir={"medground_kernels": "kernels"},
    entry_points={"console_scripts": ["medground = medground.cli:main"]},
    install_requires=[
        "numpy",
        "pillow",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "torch>=2.11",
        "tqdm",
        "transformers>=5.17,<5.18",
        "triton>=3.6; platform_system == 'Linux'",  # there are wheels for no other; ops run in plain torch there
        "tyro",
    ],
    extras_require={
        "gpu": ["nvidia-ml-py"],
        "lora": ["peft"],
        "8bit": ["torchao"],
        "flash": ["flash-attn"],  # a source distribution: needs nvcc
        "semantic": ["open_clip_torch"],  # pulls torchvision: an environment of its own on a CPU build of torch
        "peers": ["trl==1.16.0", "liger-kernel==0.8.5", "cut-cross-entropy", "deepspeed", "greenlet"],
        "medical": ["nibabel", "pydicom"],  # both MIT
        "dev": [
            "hypothesis",
            "matplotlib",
            "mypy",
            "nibabel",
            "peft",
            "pre-commit",
            "pydicom",
            "pytest",
            "pytest-benchmark",
            "pytest-cov",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
        ],
    },
)
