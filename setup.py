"""Packaging. The tools' settings are in pyproject.toml, the exact versions that are tested in constraints.txt."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent

DEMO = ["scikit-image", "scikit-learn"]  # they bring the photographs
ONNX = ["onnx", "onnxscript"]
EVAL = ["h5py", "scipy", "huggingface-hub"]  # for NYUd's original files, and for weights by hf:ORG/NAME


class BuildWithRecipes(build_py):
    """Put the recipes into the built package; an editable install reads them from the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree(HERE / "configs", Path(self.build_lib) / "dinoreg" / "configs", dirs_exist_ok=True)


setup(
    name="dinoreg",
    version="0.1.0",
    description="Pretrain vision transformers with registers, and find out how good they are",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["dinoreg*", "launch*", "eval*"]),
    cmdclass={"build_py": BuildWithRecipes},
    entry_points={
        "console_scripts": [
            "dinoreg = dinoreg.cli:main",
            "dinoreg-eval = eval.cli:main",
            "dinoreg-launch = launch.cli:main",
        ]
    },
    install_requires=[
        "torch>=2.10",
        "numpy",
        "pillow",
        "simplejpeg",  # decodes ordinary JPEGs in half of Pillow's time
        "omegaconf>=2.4",  # Literal and tuple fields
        "pyyaml",
        "fvcore",
        "webdataset",
        "braceexpand",
        "safetensors",
        "rich",
        "matplotlib",
        "wandb",
        "submitit",
    ],
    extras_require={
        "cuda": ["xformers>=0.0.35"],
        "demo": DEMO,
        "eval": EVAL,
        "onnx": ONNX,
        "test": [
            *(*DEMO, *EVAL, *ONNX, "onnxruntime"),
            *("pytest", "pytest-xdist", "ruff", "mypy"),
            *("transformers", "timm", "open-clip-torch"),
        ],
    },
)
