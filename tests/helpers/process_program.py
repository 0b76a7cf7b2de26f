"""One process of a small run; started by test_processes.py.

python process_program.py STAGE WORKDIR DELAY MESH [--coordinator= --num_processes= --process_id=]
  STAGE  tokenizer, the real one; unified; or toy
  DELAY  seconds to wait before each step
  MESH   slice,data,fsdp,tensor
"""

import sys
import time
import traceback

from absl import app, flags

from tokenflow_jax import cli
from tokenflow_jax import log as runlog
from tokenflow_jax.parallel import distributed, mesh
from tokenflow_jax.train import checkpoint

distributed.define_flags(cli.Define(flags.FLAGS))


def toy():
    import toy_stage

    config = toy_stage.get_config()
    config.mesh = {}
    return config, toy_stage.ToyStage


def tokenizer():
    from tiny_runs import tokenizer_config as tiny_config

    from tokenflow_jax.tokenizer.stage import TokenizerStage

    mesh.LEAST_SPLIT = 64  # so that the tiny model is split at all
    config = tiny_config(**{"losses.perceptual_weight": 0.0, "eval.examples": 8})
    config.eval_every = config.image_every = 0
    return config, TokenizerStage


def unified():
    """The unified quickstart, tiny, two conversations in a row."""
    import os

    from config_files import unified

    from tokenflow_jax.unified.stage import UnifiedStage

    mesh.LEAST_SPLIT = 64
    config = unified.get_config()
    config.model.lm.update(width=16, layers=1, heads=2, kv_heads=2, mlp_width=24)
    config.tokenizer.path = os.environ["TOKENIZER"]
    config.data.max_length, config.data.buckets = 160, (200,)
    config.optimizer.name, config.optimizer.warmup_steps = "adamw", 0
    config.eval.update(max_new=0, examples=8, retrieval=0, prompts=())
    config.sampling.passes = ((0, 0.0),)
    return config, UnifiedStage


def main(argv):
    distributed.start(flags.FLAGS)
    import jax

    _, name, workdir, delay, sizes = argv
    sizes = dict(zip(mesh.AXES, map(int, sizes.split(",")), strict=True))
    kinds = (toy, tokenizer, unified)
    config, make_stage = {kind.__name__: kind for kind in kinds}[name]()
    config.update(total_steps=12, batch_size=8, checkpoint_every=4, log_every=1)
    config.mesh = sizes
    runlog.set_up(verbose=jax.process_index() == 0)
    stage = make_stage(config, mesh.make_mesh(sizes)).open()
    step = stage.step

    def slow_step(*arguments):
        time.sleep(float(delay))
        return step(*arguments)

    from tokenflow_jax.train import loop

    evaluate = stage.evaluate

    def told_evaluate(state):
        print("evaluates")
        return evaluate(state)

    stage.step, stage.evaluate = slow_step, told_evaluate
    slices, slice_in_dim = [], jax.lax.slice_in_dim
    jax.lax.slice_in_dim = lambda *a, **k: slices.append(a) or slice_in_dim(*a, **k)
    try:
        loop.train_and_evaluate(config, workdir, stage)
        print(f"slices: {len(slices)};")
    except checkpoint.CheckpointError as error:
        sys.exit(str(error))
    except Exception:
        traceback.print_exc()
        distributed.leave("it failed as above; if a collective failed, another process was lost")
        raise


if __name__ == "__main__":
    app.run(main)
