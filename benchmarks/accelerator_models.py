"""What benchmarks.accelerator times: training steps, sampling, answering, the tokenizer, the cache.

Stages come from configs/, of which the published models keep their width and lose layers and most
of the vocabulary, so that a step's time is that of its layers.
"""

import functools
import importlib.util
import pathlib
import tempfile
import time
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.accelerator import Row, Setting, seconds
from tokenflow_jax import Tokenizer, stages
from tokenflow_jax.parallel import compiling, costs, mesh
from tokenflow_jax.parallel.chips import chip_of
from tokenflow_jax.tokenizer.model import TokenizerConfig
from tokenflow_jax.tokenizer.names import PART as TOKENIZER
from tokenflow_jax.train.stage import Stage
from tokenflow_jax.understanding import answer
from tokenflow_jax.weights import quantized

PyTree = Any
_CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
_VOCABULARY = 32_000  # of the 14B model
_NEW = 64  # tokens of an answer
# Of the quickstart's models where sizes are tiny.
_TINY = {"image_size": 32, "scales": (1, 2, 4), "codebook_size": 256, "multipliers": (1, 1, 1, 1)}
_TINY_VIT = {"image_size": 32, "width": 48, "depth": 1, "heads": 2}


@functools.cache
def _configs(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"{name}_config", _CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_stage(
    name: str, setting: Setting, devices: list[Any] | None = None, variant: str | None = None
) -> Stage:
    """Return a stage, not open, whose step needs less than 40 GB on a device.

    Args:
      devices: that need not exist; None takes this machine's.
      variant: of the config; None takes the large one, or the quickstart's where sizes are tiny.
    """
    large = {"tokenizer": "b", "generation": "7b", "understanding": "qwen2_5_14b"}
    if variant is None:
        variant = "" if setting.tiny else large[name]
    config = _configs(name).get_config(variant)
    count = len(devices or jax.devices())
    if variant:
        rows = {"tokenizer": 32, "generation": 16, "understanding": 8}[name]
        config.batch_size = (rows // 4 if setting.small_memory else rows) * count
        if name != "tokenizer":
            config.model.lm.layers = 1 if setting.small_memory else 4
            config.model.lm.vocabulary_size = _VOCABULARY * (name == "understanding")
    else:
        config.batch_size = 2 * count
        tokenizer = (
            config.model if name == "tokenizer" else _configs("tokenizer").get_config().model
        )
        if setting.tiny:
            tokenizer.update(_TINY)
            tokenizer.vit.update(_TINY_VIT)
            tokenizer.semantic_decoder_heads = 2
            if name == "tokenizer":
                config.losses.perceptual_weight = 0.0  # its network is large
            else:
                config.model.lm.layers = 1
    config.total_steps = 1000
    if name == "generation":
        config.text_tokenizer, config.data.name = "bytes", "codes"
        config.model.image_start = 0
    if name == "understanding":
        config.pack = 1
        if not variant:
            config.model.lm.vocabulary_size = 512
            config.text_tokenizer = ""
    device_mesh = mesh.make_mesh(config.mesh, devices)
    stage = stages.make_stage(config, device_mesh, setting.platform)
    if name != "tokenizer":
        if not variant:  # the quickstart's own tokenizer, which has no file here
            stage.tokenizer_config = TokenizerConfig(**tokenizer.to_dict())
        stage.images = 16 if name == "understanding" else 0
    return stage


def fill(shapes: PyTree, limit: int = 256) -> PyTree:
    """Return arrays of these shapes where their shardings say: even floats, integers to limit."""
    leaves, tree = jax.tree.flatten(shapes)
    places = [getattr(leaf, "sharding", None) for leaf in leaves]
    values = jax.jit(lambda: [_values(leaf, limit) for leaf in leaves], out_shardings=places)
    return jax.tree.unflatten(tree, values())


def _values(leaf: jax.ShapeDtypeStruct, limit: int) -> jax.Array:
    """Hash each element's indices: far quicker to compile than hundreds of random draws."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), leaf.shape)
    bits = jnp.full(leaf.shape, 0x9E3779B9, jnp.uint32)
    for axis in range(len(leaf.shape)):
        index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        bits = (bits ^ index) * jnp.uint32(0x85EBCA6B)
        bits ^= bits >> 15
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        return (bits % jnp.uint32(min(limit, jnp.iinfo(leaf.dtype).max))).astype(leaf.dtype)
    even = bits.astype(jnp.float32) / 2.0**32 - 0.5  # of deviation 0.29
    return (even * (0.07 if len(leaf.shape) > 1 else 3.4)).astype(leaf.dtype)


def batch_of(stage: Stage) -> PyTree:
    """Return a random batch of the stage's longest rows."""
    shapes = stage.batch_shapes
    batch = fill(shapes)
    if stage.name != "understanding":
        return batch
    # A text with one picture after its first tokens.
    index_L = np.arange(shapes["ids"].shape[1]) - 8
    places_L = np.where((index_L >= 0) & (index_L < stage.vectors), index_L, -1)
    rows = {
        "places": np.broadcast_to(places_L, shapes["places"].shape),
        "segments": np.ones(shapes["segments"].shape),
        "image_index": np.zeros(shapes["image_index"].shape),
    }
    place = lambda x: jax.device_put(x.astype(np.int32), stage.batch_sharding)  # noqa: E731
    return batch | {name: place(x) for name, x in rows.items()}


def compiled_step(stage: Stage) -> tuple[Any, float, float]:
    """Return the compiled step, the operations it needs, and the seconds it took to compile."""
    began, program = time.perf_counter(), stage.program
    with mesh.use(stage.mesh):
        traced = program.compiled.trace(*program.arguments)
        needed = costs.operations(traced.jaxpr.jaxpr).needed
        compiled = traced.lower().compile()
    return compiled, needed, time.perf_counter() - began


def steps(setting: Setting) -> Generator[Row]:
    """Time the training steps of all stages."""
    for name in ("generation", "understanding", "tokenizer"):
        yield _step(name, setting)


def _step(name: str, setting: Setting) -> Row:
    stage = make_stage(name, setting)
    setting.say(f"  compiling the step of {_describe(stage)}")
    compiled, needed, took = compiled_step(stage)
    said, before = compiled.memory_analysis(), _peak()
    held, frozen, batch = stage.init(), fill(stage.program.arguments[1]), batch_of(stage)
    metrics = {}

    def step() -> Any:
        nonlocal held, metrics
        held, metrics = compiled(held, frozen, batch)
        return metrics

    each, count = seconds(step), jax.device_count()
    figures = {
        "steps/s": 1 / each,
        "samples/s": stage.config.batch_size / each,
        "ms": 1e3 * each,
        "TFLOP/s per device": needed / each / count / 1e12,
    }
    if chip := chip_of(jax.devices()[0].device_kind):
        figures["MFU %"] = 100 * needed / each / count / (chip.tflops / chip.devices * 1e12)
    planned = said.argument_size_in_bytes + compiling.program_sizes(said)[0]
    figures["planned GiB"] = planned / 2**30
    if _peak() > before:  # of the whole process: known only where it rose
        figures["peak GiB"] = _peak() / 2**30
    figures |= {"loss": float(metrics["loss/total"]), "compile s": took}
    return Row(_describe(stage), figures)


def _describe(stage: Stage) -> str:
    if stage.name == "tokenizer":
        size = f"tokenizer of {stage.model_config.image_size} px"
    else:
        lm = stage.model_config.lm
        size = f"{stage.name}, {lm.layers} layers of {lm.width}"
    return f"{size}, batch {stage.config.batch_size}"


def _peak() -> int:
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def sampling(setting: Setting) -> Generator[Row]:
    """Time drawing pictures with guidance, one pass per scale."""
    for variant in ("", *(() if setting.tiny else ("7b",))):
        for images in (2,) if setting.tiny else (1, 8):
            images *= jax.device_count()
            stage = make_stage("generation", setting, variant=variant)
            program = stage.sampling(images)
            model = stage.model_config.lm
            name = f"{model.layers} layers of {model.width}, {images} images"
            setting.say(f"  compiling sampling, {name}")
            arguments = (*fill(program.arguments)[:-1], 7.5)
            function = mesh.bind(stage.mesh, program.compiled)
            took = seconds(functools.partial(function, *arguments), rounds=3)
            yield Row(name, {"images/s": images / took, "ms": 1e3 * took})


def answering(setting: Setting) -> Generator[Row]:
    """Time answers of one device: reading a prompt with a picture, then token by token."""
    key = jax.random.key(0)
    with mesh.use(mesh.make_mesh(None, jax.devices()[:1])):
        for rows in (2,) if setting.tiny else (1, 4, 16):
            stage = make_stage("understanding", setting, jax.devices()[:1])
            model, vectors = stage.model, stage.vectors
            params = fill(quantized.shapes_of(quantized.model_of(model, ""), stage.dtype))
            new = 8 if setting.tiny else _NEW
            length, decoding = vectors + 64, answer.Decoding(new)
            index_L = np.arange(length, dtype=np.int32) - 8
            places_L = np.where((index_L >= 0) & (index_L < vectors), index_L, -1)
            prompt = {
                "ids": jnp.ones((rows, length), jnp.int32),
                "places": jnp.tile(jnp.asarray(places_L), (rows, 1)),
                "segments": jnp.ones((rows, length), jnp.int32),
                "features": jnp.ones((rows, 1, vectors, model.config.vision_channels)),
            }
            lm = model.config.lm
            name = f"{lm.layers} layers of {lm.width}, {rows} rows, {length} tokens"
            setting.say(f"  compiling answering, {name}")
            read, whole = (
                seconds(functools.partial(jax.jit(run), params, prompt), rounds=3)
                for run in (
                    lambda p, q, m=model, d=decoding: answer.start(m, p, q, key, d),
                    lambda p, q, m=model, d=decoding: answer.answer(m, p, q, key, d),
                )
            )
            figures = {"prompts ms": 1e3 * read, "answers ms": 1e3 * whole}
            if whole > read:
                figures["tokens/s"] = rows * new / (whole - read)
            yield Row(name, figures)


def tokenizer(setting: Setting) -> Generator[Row]:
    """Time encoding and decoding on one device."""
    one = mesh.make_mesh(None, jax.devices()[:1])
    config = make_stage("tokenizer", setting, jax.devices()[:1]).model_config
    params = fill(TOKENIZER.template(config))
    rows = 2 if setting.tiny else 32
    size, tokens = config.image_size, config.pyramid.tokens
    images_BHWC = fill(jax.ShapeDtypeStruct((rows, size, size, 3), jnp.uint8))
    codes_BL = fill(jax.ShapeDtypeStruct((rows, tokens), jnp.int32), config.codebook_size)
    for dtype in ("bfloat16", "float32"):
        used = Tokenizer(config, params, dtype)
        calls = {"encode": (used.encode_fn, images_BHWC), "decode": (used.decode_fn, codes_BL)}
        for name, (function, array) in calls.items():
            setting.say(f"  compiling {name} in {dtype}")
            run = mesh.bind(one, jax.jit(function))
            took = seconds(functools.partial(run, params, array))
            what = f"{name}, {size} px, {rows} images, {dtype}"
            yield Row(what, {"images/s": rows / took, "ms": 1e3 * took})


def cache(setting: Setting) -> Generator[Row]:
    """Time compiling a step for the first time and again, with the persistent cache."""
    setting.say("  compiling a step twice")
    directory, least = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    kept = {name: getattr(jax.config, name) for name in (directory, least)}
    try:
        with tempfile.TemporaryDirectory() as folder:
            _configure({directory: folder, least: 0.0})
            times = []
            for _ in range(2):
                stage = make_stage("generation", setting)
                times.append(compiled_step(stage)[2])
                jax.clear_caches()
            files = sum(path.is_file() for path in pathlib.Path(folder).rglob("*"))
    finally:
        _configure(kept)
    yield Row(_describe(stage), {"first s": times[0], "second s": times[1], "files": files})


def _configure(options: dict[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
