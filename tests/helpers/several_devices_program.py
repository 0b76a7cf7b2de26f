"""Answers or draws with a loaded model over two fake devices; `run` starts this file.

    python several_devices_program.py assistant WORKDIR PICTURE
    python several_devices_program.py generator WORKDIR PROMPT

Prints one JSON object: "split" (parameters are sharded) and "found" (the results).
"""

import json
import os
import subprocess
import sys

import jax

import tokenflow_jax as tfx


def run(*arguments):
    """Run this file with two fake devices and return its result."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def spread(params):
    return any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(params))


def assistant(workdir, picture):
    model = tfx.Assistant.load(workdir)
    said = model.answer(["What?", "Who?"], [picture, None], max_new=8)
    pieces = "".join(model.chat().stream("What?", picture, max_new=8)).strip()
    return spread(model.params), [*said, pieces]


def generator(workdir, prompt):
    model = tfx.Generator.load(workdir)
    return spread(model.params), model.generate([prompt] * 3, passes=((1, 0.0),)).codes.tolist()


if __name__ == "__main__":
    split, found = {"assistant": assistant, "generator": generator}[sys.argv[1]](*sys.argv[2:])
    print(json.dumps({"split": split, "found": found}))
