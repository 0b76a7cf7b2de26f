"""Our model in the real lmms-eval, where that is installed: a small local task."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

pytest.importorskip("lmms_eval", reason="pip install -e '.[lmms]'")

from lmms_eval.api.instance import Instance

from tokenflow_jax.evals import lmms_plugin
from tokenflow_jax.evals.lmms_model import TokenFlow


@pytest.fixture
def folder(tmp_path):
    """A model of random weights, its tokenizer, and the model arguments for lmms-eval."""
    from tokenflow_jax.nets.lm import LMConfig
    from tokenflow_jax.understanding.folder import save_understanding_model
    from tokenflow_jax.understanding.model import UnderstandingConfig
    from tokenflow_jax.understanding.names import understanding_template

    lm = LMConfig(vocabulary_size=259, width=16, layers=1, heads=2, kv_heads=2, mlp_width=24)
    config, rng = UnderstandingConfig(lm, 9), np.random.default_rng(0)
    import jax

    shapes = understanding_template(config)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    save_understanding_model(tmp_path / "model", config, params)
    tiny.write_tokenizer(tmp_path / "tokenizer")
    return tmp_path


def test_requests(folder):
    model = TokenFlow(
        str(folder / "model"), batch_size=2, tokenizer=str(folder / "tokenizer"),
        text_tokenizer="bytes", template="vicuna_v1", system="", device="cpu",
    )  # fmt: skip
    documents = [
        {"image": Image.fromarray(np.full((9, 12, 3), 40 * i, np.uint8)), "answer": "yes"}
        for i in range(3)
    ]
    model.task_dict = {"t": {"test": documents}}

    def request(kind, i, *args):
        meta = {"task": "t", "doc_id": i, "repeats": 1}
        return Instance(kind, (*args, lambda d: [d["image"]], i, "t", "test"), i, meta)

    options = {"max_new_tokens": 5, "do_sample": False, "until": ["\n\n"]}
    said = model.generate_until([request("generate_until", i, "What?", options) for i in range(3)])
    assert said == [model.assistant.answer("What?", d["image"], max_new=5) for d in documents]
    likely = model.loglikelihood([request("loglikelihood", i, "What?", "yes") for i in range(3)])
    assert len(likely) == 3 and all(value < 0 for value, _ in likely)
    with pytest.raises(NotImplementedError):
        model.generate_until_multi_round([])


def test_the_registry_knows_it():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(lmms_plugin.manifest())
    assert registry.get_model_class("tokenflow_jax") is TokenFlow
    assert json.dumps(registry.list_model_names()) == '["tokenflow_jax"]'


TASK = """
task: local_kinds
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function local_kinds.pictures
doc_to_text: !function local_kinds.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, do_sample: false}}
process_results: !function local_kinds.results
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
metadata: {{version: 0.0}}
"""
FUNCTIONS = """
from PIL import Image


def pictures(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc, kwargs=None):
    return doc["question"]


def results(doc, said):
    return {"right": float(said[0].strip() == doc["answer"])}
"""


def test_a_local_task_through_the_program(folder):
    """Its figure is the share of answers that are those of the Python API."""
    model = TokenFlow(
        str(folder / "model"), tokenizer=str(folder / "tokenizer"), text_tokenizer="bytes",
        template="vicuna_v1",
    ).assistant  # fmt: skip
    rows = []
    for i in range(4):
        picture = folder / f"{i}.png"
        Image.fromarray(np.full((9, 12, 3), 60 * i, np.uint8)).save(picture)
        right = model.answer("What?", picture, max_new=6)
        answer = right.strip() if i < 3 else f"not {right}"
        rows.append(json.dumps({"question": "What?", "image": str(picture), "answer": answer}))
    (folder / "questions.jsonl").write_text("\n".join(rows))
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "local_kinds.yaml").write_text(TASK.format(folder=folder))
    (tasks / "local_kinds.py").write_text(FUNCTIONS)
    arguments = {
        "pretrained": folder / "model", "tokenizer": folder / "tokenizer",
        "text_tokenizer": "bytes", "template": "vicuna_v1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "lmms_eval", "eval", "--model=tokenflow_jax", "--tasks=local_kinds",
        f"--include_path={tasks}", "--batch_size=2", f"--output_path={folder / 'out'}",
        "--model_args=" + ",".join(f"{name}={value}" for name, value in arguments.items()),
    ]  # fmt: skip
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (found,) = (folder / "out").rglob("*results.json")
    figures = json.loads(found.read_text())["results"]["local_kinds"]
    assert figures["right,none"] == 0.75
