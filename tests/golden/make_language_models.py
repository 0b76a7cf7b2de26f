"""Writes language_models.npz: what transformers' PyTorch models compute on stand-in weights.

python tests/golden/make_language_models.py    (torch and transformers; nothing else needs them)

Weights are drawn by weights.py from the names and shapes in language_models.json, so that neither
file is large.
"""

import json
import pathlib
import runpy

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
WEIGHTS = runpy.run_path(str(FOLDER / "weights.py"))
BASE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 80,
}
CASES = {
    "llama": ("llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-5}),
    "llama_grouped": (
        "llama",
        {"num_key_value_heads": 3, "head_dim": 16, "tie_word_embeddings": True},
    ),
    "qwen2": ("qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": False}),
    "qwen2_tied": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}
CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}


def main() -> None:
    arrays, cases = {}, {}
    for case, (kind, fields) in CASES.items():
        config_class, model_class = CLASSES[kind]
        theta = {"rope_theta": 1e6 if kind == "qwen2" else 1e4, "rope_type": "default"}
        config = config_class(**BASE, **fields, rope_parameters=theta, attn_implementation="eager")
        model = model_class(config).eval()
        shapes = {n: list(t.shape) for n, t in model.state_dict().items()}
        if config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        state = WEIGHTS["state_dict"](shapes, seed=0)
        model.load_state_dict({n: torch.from_numpy(x) for n, x in state.items()}, strict=False)
        model.tie_weights()
        rng = np.random.default_rng(1)
        ids = rng.integers(0, BASE["vocab_size"], (3, 21))
        padding = np.array([0, 4, 9])[:, None]  # on the left
        real = np.arange(21) >= padding
        positions = np.maximum(np.arange(21) - padding, 0)
        with torch.no_grad():
            out = model(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(real.astype(np.int64)),
                position_ids=torch.from_numpy(positions),
                output_hidden_states=True,
            )
        cases[case] = {"config": config.to_dict(), "shapes": shapes}
        arrays |= {
            f"{case}:ids": ids,
            f"{case}:real": real,
            f"{case}:positions": positions,
            f"{case}:logits": out.logits.numpy(),
            f"{case}:hidden": out.hidden_states[-1].numpy(),
        }
    np.savez_compressed(FOLDER / "language_models.npz", **arrays)
    text = json.dumps(cases, default=str)
    (FOLDER / "language_models.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
