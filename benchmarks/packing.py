"""Compare training on one and on several conversations per row.

    python -m benchmarks.packing                        batches of 32, 729 vectors per picture
    python -m benchmarks.packing --pack=1,2,4 --batch=64

The same batches of conversations go through the real data pipeline and training step, with a small
random language model (float32; the cost of XLA's attention grows with the square of a row's
length). Lengths are random, by assumption: 6 % have no image, the others 729 vectors, and answers
have a median of 200 tokens. Rows are padded to multiples of 256. The time excludes compilation.
"""

import argparse
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.data.chat import batches as conversation_batches
from tokenflow_jax.data.chat.opened import ConversationConfig, Conversations
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.tokenizer.model import TokenFlow, TokenizerConfig
from tokenflow_jax.train import optim
from tokenflow_jax.understanding.model import Understanding, UnderstandingConfig
from tokenflow_jax.understanding.train import Trainer

VECTORS, LONGEST, STEP = 729, 2048, 256
_MODEL = UnderstandingConfig(
    LMConfig(259, width=128, layers=2, heads=2, kv_heads=2, mlp_width=384, remat="block")
)


def write_conversations(file: pathlib.Path, count: int) -> None:
    """Write a file of conversations with random lengths."""
    rng = np.random.default_rng(0)
    with file.open("w", encoding="utf-8") as out:
        for i in range(count):
            letters = int(min(rng.lognormal(np.log(200), 0.85), LONGEST))
            picture = {} if rng.random() < 0.06 else {"image": f"{i % 8}.png"}
            question = ("<image>\n" if picture else "") + "What is shown here?"
            turns = [("human", question), ("gpt", "x" * letters)]
            row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
            out.write(json.dumps(row | picture) + "\n")


def batches_of(file: pathlib.Path, pack: int, size: int, count: int) -> list[dict[str, np.ndarray]]:
    """Return the first batches of the pipeline."""
    data = Conversations(
        ConversationConfig(
            "jsonl", str(file), split="all", template="vicuna_v1", system="", vectors=VECTORS,
            max_length=LONGEST, pack=pack, buckets=tuple(range(STEP, pack * LONGEST, STEP)),
        )
    )  # fmt: skip
    source = conversation_batches.train_batches(data, batch_size=size, seed=0, pixels=False)
    return [next(source) for _ in range(count)]


def main() -> None:
    """Print one line per number of conversations in a row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pack", default="1,2", help="conversations per row, comma-separated")
    parser.add_argument("--batch", type=int, default=32, help="conversations per step")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    optimizer = optim.make_optimizer(optim.OptimizerConfig(learning_rate=1e-3), 100)
    trainer = Trainer(Understanding(_MODEL), TokenFlow(TokenizerConfig()), optimizer)
    state, step = jax.jit(trainer.init)(jax.random.key(0)), jax.jit(trainer.step)
    frozen = {"features": jax.random.normal(jax.random.key(1), (8, VECTORS, 40), jnp.float32)}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "chats.jsonl"
        write_conversations(file, options.batch * options.steps)
        first = None
        for pack in map(int, options.pack.split(",")):
            batches = batches_of(file, pack, options.batch, options.steps)
            losses = [float(step(state, frozen, batch)[1]["loss/total"]) for batch in batches]
            start = time.perf_counter()
            for batch in batches:
                jax.block_until_ready(step(state, frozen, batch))
            seconds = (time.perf_counter() - start) / len(batches)
            first = first or (seconds, losses)
            positions = sum(b["segments"].size for b in batches)
            real = sum(int((b["segments"] > 0).sum()) for b in batches)
            apart = max(abs(a - b) for a, b in zip(losses, first[1], strict=True))
            print(
                f"pack {pack}: {positions / len(batches):9,.0f} positions per step, "
                f"{real / positions:5.1%} filled, {seconds:6.2f} s per step "
                f"({first[0] / seconds:.2f} times as fast), losses differ by {apart:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
