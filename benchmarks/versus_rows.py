"""The programs that `benchmarks.versus` compares: each row returns ours and the original's."""

import dataclasses
import functools
from collections.abc import Callable

SIZE, SEED = 224, 0
Run = Callable[[], object]


def _arrays(module):
    return {name: tensor.detach().numpy() for name, tensor in module.state_dict().items()}


def _normal(*shape):
    import numpy as np

    return np.random.default_rng(SEED).normal(size=shape).astype(np.float32)


def _pictures(batch):
    import numpy as np
    import torch

    images = np.random.default_rng(SEED).integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)
    floats = images.astype(np.float32) / 127.5 - 1
    return images, floats, torch.from_numpy(floats).permute(0, 3, 1, 2).contiguous()


def _tokenizer():
    import jax.numpy as jnp
    from jax import tree

    from benchmarks import original
    from tokenflow_jax.tokenizer.model import TokenFlow, TokenizerConfig
    from tokenflow_jax.tokenizer.names import tokenizer_table, tokenizer_template
    from tokenflow_jax.weights import rules

    theirs, config = original.tokenizer().eval(), TokenizerConfig()
    params = rules.to_flax(_arrays(theirs), tokenizer_table(config), tokenizer_template(config))
    return TokenFlow(config), {"params": tree.map(jnp.asarray, params)}, theirs


def encode() -> tuple[Run, Run]:
    """Images to codes, 2 images."""
    import jax
    import torch

    model, params, theirs = _tokenizer()
    _, images, tensors = _pictures(2)
    run = jax.jit(
        lambda p, x: model.apply(p, x, method=lambda m, x: m.quantize(m.encode(x)).codes_BL)
    )
    return lambda: run(params, images), torch.no_grad()(lambda: theirs.encode(tensors))


def decode() -> tuple[Run, Run]:
    """Codes to images, 2 images; the original always decodes the semantic half, too."""
    import jax
    import jax.numpy as jnp
    import torch

    model, params, theirs = _tokenizer()
    codes = jnp.arange(2 * model.config.pyramid.tokens).reshape(2, -1)
    run = jax.jit(
        lambda p, x: model.apply(p, x, method=lambda m, x: m.decode_pixels(m.features(x))[0])
    )
    tensors = torch.tensor(codes.tolist())
    return lambda: run(params, codes), torch.no_grad()(lambda: theirs.decode_code(tensors))


def tokenizer_step() -> tuple[Run, Run]:
    """One training step of TokenFlow-B and its discriminator with all losses, 2 images."""
    import jax
    import jax.numpy as jnp

    from benchmarks import original
    from tokenflow_jax.nets.discriminator import PatchGAN
    from tokenflow_jax.nets.lpips import LPIPS, lpips_template
    from tokenflow_jax.nets.vit import ViT, ViTConfig
    from tokenflow_jax.tokenizer.model import TokenFlow, TokenizerConfig
    from tokenflow_jax.tokenizer.state import LossConfig
    from tokenflow_jax.tokenizer.teacher import Teacher
    from tokenflow_jax.tokenizer.train import CodebookConfig, Trainer
    from tokenflow_jax.train import optim

    teacher = ViT(ViTConfig(projection=512))
    make = functools.partial(optim.make_optimizer, optim.OptimizerConfig(), 10)
    trainer = Trainer(
        TokenFlow(TokenizerConfig()),
        LossConfig(discriminator_start=0, entropy_weight=0.05),
        CodebookConfig(),
        make(),
        make(),
        Teacher(teacher, (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)),
        PatchGAN(),
        LPIPS(),
        ema_decay=0.9999,
    )
    key, image = jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3))
    lpips = jax.tree.map(
        lambda x: jax.random.normal(key, x.shape) / max(x.size // x.shape[-1], 1) ** 0.5,
        lpips_template(),
    )
    frozen = {"teacher": jax.jit(teacher.init)(key, image)["params"], "lpips": lpips}
    images, _, tensors = _pictures(2)
    state = [jax.jit(trainer.init)(key)]
    step = jax.jit(trainer.step, donate_argnums=0)

    def ours():
        state[0], metrics = step(state[0], frozen, {"image": images})
        return metrics

    return ours, _lazily(lambda: original.tokenizer_step(tensors))


def quantizer() -> tuple[Run, Run]:
    """Codes, codebook losses with entropy and gradients: 2,048 tokens x 32,768 codes."""
    import jax
    import torch

    from benchmarks import original
    from benchmarks import quantizer as ours
    from tokenflow_jax.tokenizer.quantizer import Codebooks

    keys = jax.random.split(jax.random.key(0), 2)
    halves = [
        jax.random.normal(key, (32768, size)) for key, size in zip(keys, (32, 8), strict=True)
    ]
    books = Codebooks(*halves)
    features, step = _normal(2048, 40), ours._step(dense=False, entropy=True)
    tensors = torch.from_numpy(features.T.reshape(1, 40, 32, 64).copy())
    return lambda: step(features, books), _lazily(lambda: original.quantizer_step(32768, tensors))


def _llama(**fields):
    from tokenflow_jax.nets.lm import LMConfig

    small = {"vocabulary_size": 32000, "width": 576, "layers": 10, "heads": 9, "kv_heads": 9}
    return LMConfig(**{**small, "mlp_width": 1536, "norm_eps": 1e-5, **fields})


def _understanding():
    import jax
    import jax.numpy as jnp

    from benchmarks import original
    from tokenflow_jax.understanding.model import Understanding, UnderstandingConfig
    from tokenflow_jax.understanding.names import understanding_table, understanding_template
    from tokenflow_jax.weights import rules

    config = UnderstandingConfig(_llama(remat="dots"))  # as configs/understanding.py:smollm2
    theirs = original.understanding(config.lm).eval()
    table, template = understanding_table(config), understanding_template(config)
    params = jax.tree.map(jnp.asarray, rules.to_flax(_arrays(theirs), table, template))
    return Understanding(config), params, theirs


def _rows(batch, text, vectors, side):
    import numpy as np

    from tokenflow_jax.data.chat import insertion

    ids = np.random.default_rng(SEED).integers(1, 32000, (batch, text))
    ids[:, 3] = insertion.IMAGE_ID
    rows = [insertion.merge_row(row, row * (row > 0) - 100 * (row < 0), vectors) for row in ids]
    rows = insertion.pad_rows(rows, text + vectors - 1, side)
    features = _normal(batch, vectors, 40)
    return ids, {**rows, "features": features[:, None]}, features


def answering() -> tuple[Run, Run]:
    """64 tokens after a picture of 256 vectors and 64 ids, one row, with a cache."""
    import jax
    import torch

    from tokenflow_jax.understanding.answer import Decoding, answer

    model, params, theirs = _understanding()
    ids, prompt, features = _rows(1, 64, 256, "left")
    del prompt["labels"]
    run = jax.jit(functools.partial(answer, model, decoding=Decoding(64)))
    ids, features = torch.from_numpy(ids), torch.from_numpy(features)
    generate = functools.partial(
        theirs.generate, ids, images=features, do_sample=False, max_new_tokens=64, use_cache=True
    )
    return lambda: run(params, prompt, jax.random.key(0)), generate


def understanding_step() -> tuple[Run, Run]:
    """One training step on 2 rows of 1,024 positions, 729 of them a picture's."""
    import jax
    import torch

    from benchmarks import original
    from tokenflow_jax.train import optim
    from tokenflow_jax.understanding.train import Trainer

    model, params, theirs = _understanding()
    ids, batch, features = _rows(2, 296, 729, "right")
    options = optim.OptimizerConfig(name="adamw", b2=0.999, weight_decay=0.01)
    trainer = Trainer(model, None, optim.make_optimizer(options, 10))
    frozen = {"features": batch.pop("features")[:, 0]}
    batch["image_index"] = jax.numpy.arange(2)[:, None]
    state = [trainer.init(jax.random.key(0), params)]
    step = jax.jit(trainer.step, donate_argnums=0)

    def ours():
        state[0], metrics = step(state[0], frozen, batch)
        return metrics

    tensors = (torch.from_numpy(x) for x in (ids, ids * (ids > 0) - 100 * (ids < 0), features))
    return ours, _lazily(lambda: original.understanding_step(theirs, *tensors))


def sampling() -> tuple[Run, Run]:
    """The codes of one guided image, 131 ids and nine scales, 6 layers of 512 channels."""
    import jax
    import jax.numpy as jnp
    import torch

    from benchmarks import original
    from tokenflow_jax.generation.model import VARIANTS, Generation
    from tokenflow_jax.generation.names import generation_table, generation_template
    from tokenflow_jax.generation.sample import Sampler
    from tokenflow_jax.tokenizer.quantizer import Codebooks
    from tokenflow_jax.weights import rules

    lm = _llama(
        vocabulary_size=64769, width=512, layers=6, heads=8, kv_heads=8, norms="after", qk_norm=True
    )
    config = dataclasses.replace(VARIANTS["7b"], lm=lm)
    theirs = original.generation(lm, config.image_start, 131 + config.pyramid.tokens)
    table, template = generation_table(config), generation_template(config)
    params = jax.tree.map(jnp.asarray, rules.to_flax(_arrays(theirs.model), table, template))
    halves = (theirs.codebooks.embedding_vqkd, theirs.codebooks.embedding_vqgan)
    books = Codebooks(*(jnp.asarray(half.weight.detach().numpy()) for half in halves))
    ids = jax.random.randint(jax.random.key(0), (2, 131), 1, config.image_start - 1)
    keys = jax.random.split(jax.random.key(0), 1)
    run = jax.jit(Sampler(Generation(config), config.image_start - 1))

    def draw():
        prefixes = list(torch.tensor(ids.tolist()))  # which the original extends
        theirs.model.autoregressive_infer_cfg(1, prefixes, cfg=7.5)

    return lambda: run(params, books, ids[:1], ids[1:], keys, 7.5), draw


def _lazily(build: Callable[[], Run]) -> Run:
    # A child that measures our memory must not build the original's state.
    built: list[Run] = []

    def run():
        if not built:
            built.append(build())
        return built[0]()

    return run
