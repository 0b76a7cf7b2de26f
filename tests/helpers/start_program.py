"""One process that starts a language stage from a folder; started by test_start.py.

python start_program.py STAGE FOLDER [--coordinator= --num_processes= --process_id=]
  STAGE   understanding, generation or unified, with the tokenizer that the environment names
  FOLDER  a language model in Hugging Face's format

Prints "process NUMBER took MiB of SHARE, largest LARGEST": how much more memory than before it had
at most while the weights came, what its devices hold of them, and the largest array's part of that.
"""

import gc
import os
import pathlib

import numpy as np
from absl import app, flags

from tokenflow_jax import cli
from tokenflow_jax.parallel import distributed, mesh
from tokenflow_jax.weights import lazy

distributed.define_flags(cli.Define(flags.FLAGS))
MIB = 2**20


def understanding():
    from config_files import understanding

    from tokenflow_jax.understanding.stage import UnderstandingStage

    config = understanding.get_config()
    config.data.max_length, config.data.buckets = 80, ()
    config.eval.max_new, config.eval.examples = 0, 8
    return config, UnderstandingStage


def generation():
    from config_files import generation

    from tokenflow_jax.generation.stage import GenerationStage

    config = generation.get_config()
    config.data.max_length = 8
    config.eval.prompts, config.eval.examples, config.eval.retrieval = ("a cat",), 8, 0
    config.text_tokenizer = "bytes"
    config.model.lm.qk_norm, config.model.lm.norms = False, "before"
    config.sampling.passes = ((0, 0.0),)
    return config, GenerationStage


def unified():
    from config_files import unified

    from tokenflow_jax.unified.stage import UnifiedStage

    config = unified.get_config()
    config.data.max_length, config.data.buckets, config.pack = 160, (), 1
    config.eval.update(max_new=0, examples=8, prompts=(), retrieval=0)
    config.model.lm.qk_norm = False
    config.sampling.passes = ((0, 0.0),)
    return config, UnifiedStage


def memory(name):
    """Return VmRSS or VmHWM of this process in bytes."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def copies_are_read_once():
    """Check that a process reads each part once, whatever number of its devices hold it."""
    import jax

    array, read = np.arange(64.0, dtype=np.float32).reshape(8, 8), []

    class Counted:
        shape, dtype = array.shape, array.dtype

        def __getitem__(self, index):
            read.append(index)
            return array[index]

    where = jax.sharding.NamedSharding(
        mesh.make_mesh({"data": 4, "fsdp": 2}), jax.sharding.PartitionSpec("fsdp")
    )
    placed = mesh.place(Counted(), where)
    held = {str(shard.index) for shard in placed.addressable_shards}
    assert len(read) == len(held), (read, held)
    for shard in placed.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), array[shard.index])

    def read_whole():
        read.append("whole")
        return array

    read.clear()  # one that cannot be read in parts is read once
    mesh.place(lazy.LazyTensor("x", array.shape, array.dtype, read_whole), where)
    assert read == ["whole"]


def main(argv):
    distributed.start(flags.FLAGS)
    import jax

    copies_are_read_once()
    from tokenflow_jax.nets.lm import LMConfig
    from tokenflow_jax.weights import language_model

    _, name, folder = argv
    kinds = (understanding, generation, unified)
    config, make_stage = {kind.__name__: kind for kind in kinds}[name]()
    lm = language_model.read_config(folder)
    sizes = ("width", "layers", "heads", "kv_heads", "mlp_width", "qkv_bias", "norm_eps")
    assert isinstance(lm, LMConfig)
    config.model.lm.update({size: getattr(lm, size) for size in sizes})
    if name == "understanding":
        config.model.lm.vocabulary_size = lm.vocabulary_size
    config.update(init_from=folder, batch_size=8, trainable=("(write_)?projector",))
    config.tokenizer.path = os.environ["TOKENIZER"]
    config.mesh = {"fsdp": 8}
    stage = make_stage(config, mesh.make_mesh({"fsdp": 8})).open()
    state = stage.init()
    jax.block_until_ready(state)
    gc.collect()
    before = memory("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    state, _ = stage.warm_start(state)
    jax.block_until_ready(state)
    peak = memory("VmHWM") - before

    parts = []
    for leaf in jax.tree.leaves(state.params):
        held = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        parts.append(sum(held.values()))
    number = jax.process_index()
    print(
        f"process {number} took {peak / MIB:.0f} of {sum(parts) / MIB:.0f}, "
        f"largest {max(parts) / MIB:.0f}"
    )
    _, arrays = language_model.open_language_model(folder)
    ours = state.params["lm"]
    for path, array, rows in (
        ("blocks/mlp/gate/kernel", ours["blocks"]["mlp"]["gate"]["kernel"], lm.layers),
        ("blocks/attention/out/kernel", ours["blocks"]["attention"]["out"]["kernel"], lm.layers),
        ("embed/embedding", ours["embed"]["embedding"], 256),  # the rows of text that all have
    ):
        whole = arrays[path].read()[:rows]
        for shard in array.addressable_shards:
            expected = whole[(slice(None), *shard.index[1:])]
            np.testing.assert_array_equal(np.asarray(shard.data)[:rows], expected, err_msg=path)


if __name__ == "__main__":
    app.run(main)
