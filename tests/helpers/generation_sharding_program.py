"""Run by test_sharding.py with eight fake devices; prints shapes of the compiled step as JSON.

These are the arrays of three axes that a device holds for the whole batch.
"""

import json
import re
import sys

from config_files import generation

from tokenflow_jax import stages
from tokenflow_jax.parallel import mesh

BATCH = 48  # no other size of the model


def main():
    config = generation.get_config("7b")
    config.model.lm.update(
        width=256, layers=1, heads=4, kv_heads=4, mlp_width=512, vocabulary_size=0
    )
    config.model.update(image_start=0)
    config.text_tokenizer, config.data.name, config.batch_size = "bytes", "codes", BATCH
    device_mesh = mesh.make_mesh({"fsdp": 8})
    program = stages.make_stage(config, device_mesh, "cpu").program
    with mesh.use(device_mesh):
        text = program.compiled.lower(*program.arguments).compile().as_text()
    found = set(re.findall(rf"\bf32\[{BATCH},(\d+),(\d+)\]", text))
    print(json.dumps(sorted([int(n) for n in shape] for shape in found)))


if __name__ == "__main__":
    sys.exit(main())
