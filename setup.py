"""The package's metadata; tools are configured in pyproject.toml, tested versions pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent

setup(
    name="mtl_dist",
    version="0.1.0",
    description="Multi-task training of one BERT encoder, on one GPU or on a cluster",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mtl_dist", "mtl_dist.*"]),
    package_data={"mtl_dist": ["py.typed"]},
    install_requires=[
        "torch>=2.10",
        "accelerate>=1.10",
        "datasets>=4.0",
        "huggingface-hub>=0.30",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10.1",
        "pyarrow>=16",
        "pydantic>=2.10",
        "PyYAML>=6.0",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "tensorboard>=2.16",
        "tokenizers>=0.20",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.18", "transformers>=4.50"],
        "sweep": ["optuna>=4.0"],
        "dev": [
            "deepspeed>=0.18",
            "hypothesis",
            "mypy",
            "optuna>=4.0",
            "pre-commit",
            "pytest",
            "pytest-timeout",
            "ruff",
            "scikit-learn",
            "scipy",
            "torchjd[cagrad,nash-mtl,quadprog-projector]>=0.18",
            "transformers>=4.50",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["mtl-dist = mtl_dist.cli:main"]},
)
