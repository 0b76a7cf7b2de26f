"""What benchmarks.accelerator checks against stored results and plain forms: goldens, kernels."""

import functools
import json
import pathlib
import sys
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.accelerator import Row, Setting, seconds
from tokenflow_jax import Tokenizer
from tokenflow_jax.generation.model import VARIANTS as GENERATION
from tokenflow_jax.generation.model import Generation
from tokenflow_jax.generation.train import LossConfig, Trainer
from tokenflow_jax.nets import attention as attention_lib
from tokenflow_jax.nets.lm import Decoder
from tokenflow_jax.nets.masks import Mask
from tokenflow_jax.parallel import nearest_kernel
from tokenflow_jax.tokenizer import quantizer
from tokenflow_jax.tokenizer.model import VARIANTS as TOKENIZERS
from tokenflow_jax.tokenizer.names import PART, tokenizer_table
from tokenflow_jax.understanding.model import VARIANTS as UNDERSTANDING
from tokenflow_jax.weights import language_model, rules

_TESTS = pathlib.Path(__file__).parents[1] / "tests"
# Largest errors: of pixels in [-1, 1], of logits as a part of the largest, of losses as a part.
# Residual codes follow from coarser ones and random weights leave many ties, so that bfloat16
# encoders change about half of them.
_TOLERANCES = {
    "float32": {"codes": 0.999, "pixels": 2e-3, "logits": 1e-3, "loss": 1e-4},
    "bfloat16": {"codes": 0.2, "pixels": 0.3, "logits": 0.1, "loss": 0.05},
}


def goldens(setting: Setting) -> Generator[Row]:
    """Compare with the reference's stored results, on weights drawn from their names."""
    if not (_TESTS / "golden" / "weights.py").is_file():
        raise FileNotFoundError(
            f"{_TESTS / 'golden'} is missing: goldens need a checkout of the repository"
        )
    if str(_TESTS) not in sys.path:
        sys.path.insert(0, str(_TESTS))
    for make in (_language_models, _generation, _tokenizer):
        for dtype in _TOLERANCES:
            if setting.platform == "cpu" and (make, dtype) == (_tokenizer, "bfloat16"):
                setting.say("  the tokenizer in bfloat16 is left out on CPU")
                continue
            setting.say(f"  compiling {make.__name__[1:].replace('_', ' ')} in {dtype}")
            with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
                yield from make(dtype)


def _tokenizer(dtype: str) -> Iterator[Row]:
    from golden import weights
    from golden.loading import GOLDEN, images_uint8, manifest

    config, bounds = TOKENIZERS["b"], _TOLERANCES[dtype]
    state = weights.state_dict(manifest("tokenizer_clipb_224"), 0)
    params = rules.to_flax(state, tokenizer_table(config), PART.template(config))
    tokenizer = Tokenizer(config, jax.tree.map(jnp.asarray, params), dtype)
    with np.load(GOLDEN / "tokenizer_clipb_224.npz") as file:
        want_BL, want_CHW = file["indices"], file["recon"]
    codes_BL = np.asarray(tokenizer.encode(images_uint8("astronaut_224", "coffee_224")))
    pixels_HWC = np.asarray(tokenizer.decode(want_BL[:1]))[0]
    equal = float((codes_BL == want_BL).mean())
    error = float(abs(pixels_HWC.transpose(2, 0, 1)[:, ::4, ::4] - want_CHW).max())
    passed = equal >= bounds["codes"] and error <= bounds["pixels"]
    figures = {"codes equal %": 100 * equal, "largest error of pixels": error}
    yield Row(f"tokenizer b, {dtype}", {**figures, "within tolerance": passed})


def _language_models(dtype: str) -> Iterator[Row]:
    from golden import weights
    from golden.loading import GOLDEN

    cases = json.loads((GOLDEN / "language_models.json").read_text())
    for case, about in sorted(cases.items()):
        with np.load(GOLDEN / "language_models.npz") as file:
            want = {n.split(":")[1]: file[n] for n in file.files if n.startswith(f"{case}:")}
        config = language_model.config_from_json(about["config"])
        state = weights.state_dict(about["shapes"], seed=0)
        table = language_model.language_model_table(config)
        template = language_model.language_model_template(config)
        params = {"params": rules.to_flax(state, table, template)}
        decoder = Decoder(config, jnp.dtype(dtype))

        def logits(params, ids_BL, positions_BL, real_BL, decoder=decoder):
            inputs_BLC = decoder.apply(params, ids_BL, method="embed")
            hidden_BLC, _ = decoder.apply(params, inputs_BLC, positions_BL, Mask(real_BL))
            return decoder.apply(params, hidden_BLC, method="logits")

        real_BL = jnp.asarray(want["real"])
        got_BLV = np.asarray(jax.jit(logits)(params, want["ids"], want["positions"], real_BL))
        wanted_BLV = want["logits"]
        error = _relative(got_BLV[want["real"]], wanted_BLV[want["real"]])
        passed = error <= _TOLERANCES[dtype]["logits"]
        figures = {"largest error of logits, relative": error, "within tolerance": passed}
        yield Row(f"language model {case}, {dtype}", figures)


def _generation(dtype: str) -> Iterator[Row]:
    from golden import generation as golden

    for name in ("s3", "s4"):
        case, data = golden.load(name), golden.stored(name, "train")
        ids_BL, codes_BN = data["input_ids"], data["codes"]
        suffix = tuple(ids_BL[0, -4:].tolist())
        model = Generation(case.config, jnp.dtype(dtype))
        losses = LossConfig(text_weight=1.0)
        trainer = Trainer(model, losses, optax.identity(), case.pad_id, suffix, 0)
        books = case.codebooks
        frozen = {"semantic_codebook": books.semantic_KC, "pixel_codebook": books.pixel_KC}
        prefix_BP = ids_BL[:, : ids_BL.shape[1] - codes_BN.shape[1] - len(suffix)]
        labels = (prefix_BP[:, 1:] != case.pad_id).sum()
        arguments = (case.params["params"], {"tokenizer": frozen}, prefix_BP, codes_BN, labels)
        _, metrics = jax.jit(trainer.loss)(*arguments)
        errors = {
            kind: _relative(metrics[f"loss/{kind}"], data[f"loss_{theirs}"])
            for kind, theirs in (("image", "vision"), ("text", "text"))
        }
        passed = max(errors.values()) <= _TOLERANCES[dtype]["loss"]
        figures = {f"error of the {kind} loss, relative": v for kind, v in errors.items()}
        yield Row(f"generation {name}, {dtype}", {**figures, "within tolerance": passed})


def _relative(got: Any, want: Any) -> float:
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    return float(abs(got - want).max() / abs(want).max())


def kernels(setting: Setting) -> Generator[Row]:
    """Compare kernels with their plain forms, in results and time."""
    if setting.platform == "cpu":
        splash = functools.partial(attention_lib._splash, interpret=True)
        off = attention_lib.difference_from_xla(splash, 64, "float32")
        yield Row("attention splash, interpreted", {"off by": off, "used": off < 0.03})
    else:
        yield from _attention(setting)
    yield from _nearest(setting)


def _attention(setting: Setting) -> Iterator[Row]:
    kernel = "splash" if setting.platform == "tpu" else "cudnn"
    setting.say(f"  compiling attention {kernel}")
    used = functools.partial(attention_lib.attention, kernel=kernel)
    off = attention_lib.difference_from_xla(used, 128, "bfloat16")
    proved = attention_lib.proves_itself(kernel, 128, "bfloat16")
    yield Row(f"attention {kernel}, small", {"off by": off, "used": proved})
    for name, function, shapes in attention_cases(kernel):
        arrays = [
            jax.random.normal(jax.random.key(i), x.shape, x.dtype) for i, x in enumerate(shapes)
        ]
        for passes, run in (("forward", function), ("forward and gradient", _gradient(function))):
            setting.say(f"  compiling attention {name}, {passes}")
            compiled = jax.jit(run)
            took = seconds(functools.partial(compiled, *arrays))
            yield Row(f"attention {name}, {passes}", {"ms": 1e3 * took})


def attention_cases(kernel: str) -> Iterator[tuple[str, Callable, list[jax.ShapeDtypeStruct]]]:
    """Yield name, function and arguments of a layer's attention in the 14B and the 7B model."""
    prefix, generation = 131, GENERATION["7b"]
    understanding = UNDERSTANDING["qwen2_5_14b"]
    blocks = generation.blocks(prefix)
    cases = {
        "14B, 2 x 2048": (understanding.lm, 2048, Mask()),
        "7B, 2 x 948": (generation.lm, 948, Mask(blocks=blocks)),
    }
    for name, (lm, length, mask) in cases.items():
        heads = (lm.heads, lm.kv_heads, lm.kv_heads)
        shapes = [jax.ShapeDtypeStruct((2, length, n, 128), jnp.bfloat16) for n in heads]
        for form in (kernel, "xla"):

            def function(*arrays, form=form, mask=mask, length=length):
                mask = mask.allowed(length, length) if form == "xla" else mask
                return attention_lib.attention(*arrays, mask, kernel=form)

            yield f"{name}, {form}", function, shapes


def _gradient(function: Callable) -> Callable:
    return jax.value_and_grad(lambda *a: function(*a).astype(jnp.float32).sum(), (0, 1, 2))


def _nearest(setting: Setting) -> Iterator[Row]:
    if setting.platform == "gpu":
        forms, tokens, codes = {"chunked": quantizer._best_by_chunks}, 21_760, 32_768
    else:
        interpret = setting.platform == "cpu"
        off = nearest_kernel._difference(interpret)
        proved = nearest_kernel.proves_itself(interpret)
        name = "nearest codes, kernel" + ", interpreted" * interpret
        yield Row(name, {"off by": off, "used": proved})
        tokens, codes = (300, 1024) if setting.tiny else (21_760, 32_768)
        kernel = functools.partial(nearest_kernel.best_of, interpret=interpret)
        forms = {"kernel": kernel, "chunked": quantizer._best_by_chunks}
    z_NC, codes_KC = (jax.random.normal(jax.random.key(n), (n, 40)) for n in (tokens, codes))
    for form, function in forms.items():
        setting.say(f"  compiling nearest codes, {form}")
        took = seconds(functools.partial(jax.jit(function), z_NC, codes_KC))
        yield Row(f"nearest of {codes:,} codes, {tokens:,} tokens, {form}", {"ms": 1e3 * took})
