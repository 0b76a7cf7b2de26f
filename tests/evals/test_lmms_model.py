"""Our model in the real lmms-eval, where that is installed: a small local task."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

pytest.importorskip("lmms_eval", reason="pip install lmms_eval")

from lmms_eval.api.instance import Instance

from tokenflow_jax.evals import lmms_plugin
from tokenflow_jax.evals.lmms_model import TokenFlow


@pytest.fixture
def folder(tmp_path):
    """A model of random weights, its tokenizer, and what lmms-eval is to be told."""
    from tokenflow_jax.convert.understanding import understanding_template
    from tokenflow_jax.convert.understanding_folder import save_understanding_model
    from tokenflow_jax.models.lm import LMConfig
    from tokenflow_jax.models.understanding import UnderstandingConfig

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
