"""Run by test_sharding.py in a process with eight fake devices; prints one JSON object.

python sharding_program.py quantize 1,1,8,1 ...       codes, losses, gradients; collectives
python sharding_program.py forms 1,2,2,2 ...          the other quantizers: codes, loss, gradients
python sharding_program.py step 1,2,2,2 ...           five training steps with a discriminator
python sharding_program.py language 1,2,2,2 ...       the generation model: losses, gradients, codes
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from tokenflow_jax.generation import sample as generate
from tokenflow_jax.generation.model import Generation, GenerationConfig, next_scale_features
from tokenflow_jax.nets.discriminator import PatchGAN
from tokenflow_jax.nets.lm import LMConfig
from tokenflow_jax.nets.vit import ViT
from tokenflow_jax.parallel import mesh
from tokenflow_jax.tokenizer import pyramid as multiscale
from tokenflow_jax.tokenizer import quantizer
from tokenflow_jax.tokenizer.kinds import QuantizerConfig
from tokenflow_jax.tokenizer.model import TokenFlow
from tokenflow_jax.tokenizer.pyramid import Scales
from tokenflow_jax.tokenizer.quantizer import Codebooks
from tokenflow_jax.tokenizer.teacher import Teacher
from tokenflow_jax.tokenizer.train import CodebookConfig, LossConfig, Trainer
from tokenflow_jax.train import optim

mesh.LEAST_SPLIT = 64  # so that the tiny model is split at all


def make_mesh(sizes):
    if sizes is None:
        return mesh.make_mesh({"data": 1}, jax.devices()[:1])
    return mesh.make_mesh(dict(zip(mesh.AXES, sizes, strict=True)))


def place(tree, device_mesh):
    return jax.tree.map(jax.device_put, tree, mesh.shardings(tree, device_mesh))


def quantize(sizes, codes=131_072, batch=8, grid=4):
    """Return losses and gradients of the whole pyramid, and figures of the compiled program."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((batch, grid, grid, 40)).astype(np.float32)
    tables = {
        "semantic_codebook": rng.standard_normal((codes, 32)).astype(np.float32),
        "pixel_codebook": rng.standard_normal((codes, 8)).astype(np.float32),
    }
    scales = Scales((1, 2, grid))
    device_mesh = make_mesh(sizes)

    def loss(tables, features):
        codebooks = Codebooks(tables["semantic_codebook"], tables["pixel_codebook"])
        pyramid = multiscale.residual_quantize(features, codebooks, scales, 2.0)
        chosen = codebooks.look_up(pyramid.codes_BL)
        weights = multiscale.token_weights(scales, jnp.ones(3))
        codebook, commitment = quantizer.codebook_losses(pyramid.z_BLC, chosen, weights)
        z_NC = pyramid.z_BLC.reshape(-1, 40)
        even_N = jnp.full(z_NC.shape[0], 1 / z_NC.shape[0])
        table = codebooks.normalized()
        entropy = quantizer.entropy_loss(z_NC, table, even_N, 32, 2.0)
        distances = quantizer.distance_statistics(z_NC, table, even_N, 32)
        total = codebook + 0.25 * commitment + 1e-3 * jnp.sum(pyramid.quantized_BHWC**2)
        return total, (pyramid.codes_BL, jnp.stack([codebook, commitment, entropy, *distances]))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    arguments = (
        place(tables, device_mesh),
        jax.device_put(features, mesh.batch_sharding(device_mesh)),
    )
    with mesh.use(device_mesh):
        compiled = step.lower(*arguments).compile()
        (total, (codes_BL, losses)), gradients = compiled(*arguments)
    text = compiled.as_text()
    gathered = re.findall(r" = (\w+\[[\d,]*\])\S* all-gather", text)
    shapes = re.findall(r"f32\[([\d,]+)\]", text)
    largest = max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)
    return {
        "codes": np.asarray(codes_BL).tolist(),
        "losses": [float(total), *np.asarray(losses).tolist()],
        "gradients": [np.asarray(g).ravel()[::97].tolist() for g in jax.tree.leaves(gradients)],
        "gathered": gathered,
        "largest": largest,
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    }


def forms(sizes, batch=8, grid=4):
    """Return codes, losses and gradients of every way to make and map codes but the paper's."""
    rng = np.random.default_rng(0)
    device_mesh, scales, width = make_mesh(sizes), Scales((1, 2, grid)), 16
    kinds = {
        "ibq": QuantizerConfig("ibq"),
        "rotation": QuantizerConfig("rotation"),
        "simvq": QuantizerConfig("simvq"),
        "bsq": QuantizerConfig("bsq"),
        "fsq": QuantizerConfig("fsq", levels=(8, 8, 8)),
        "heads": QuantizerConfig(heads=2),
        "separate": QuantizerConfig("vq", "separate"),
        "joined": QuantizerConfig("vq", "joined"),
        "separate_fsq": QuantizerConfig("fsq", "separate", (8, 4, 4)),
    }
    params, features = {}, {}
    for name, kind in kinds.items():
        pixel = len(kind.levels) or (9 if kind.kind == "bsq" else 8)
        shapes = kind.parameters(512, {"semantic": width, "pixel": pixel})
        params[name] = {
            n: rng.standard_normal(s).astype(np.float32) for n, (_, s) in shapes.items()
        }
        shape = (batch, grid, grid, width + pixel)
        features[name] = rng.standard_normal(shape).astype(np.float32)

    def loss(params, features):
        total, codes, entropies = 0.0, {}, []
        for name, kind in kinds.items():
            books = kind.codebooks(params[name], features[name].shape[-1] - width)
            made = multiscale.residual_quantize(features[name], books, scales, 2.0, None, kind)
            codes[name] = made.codes_BL
            weights = multiscale.token_weights(scales, jnp.ones(3))
            chosen = books.look_up(made.codes_BL)
            total += sum(quantizer.codebook_losses(made.z_BLC, chosen, weights))
            z_NC = made.z_BLC.reshape(-1, made.z_BLC.shape[-1])
            even_N = jnp.full(z_NC.shape[0], 1 / z_NC.shape[0])
            for z, table, *halves in books.searches(z_NC, books.tables(), 2.0):
                entropies.append(quantizer.entropy_loss(z, table, even_N, *halves))
            total += 1e-3 * jnp.sum(made.quantized_BHWC**3)
        return total, (codes, jnp.stack(entropies))

    arguments = (
        place(params, device_mesh),
        jax.device_put(features, mesh.batch_sharding(device_mesh)),
    )
    with mesh.use(device_mesh):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (total, (codes, entropies)), gradients = run(*arguments)
    return {
        "losses": [float(total), *np.asarray(entropies).tolist()],
        "codes": jax.tree.map(lambda x: np.asarray(x).tolist(), codes),
        "gradients": {
            jax.tree_util.keystr(path): np.asarray(g).ravel()[::7].tolist()
            for path, g in jax.tree_util.tree_leaves_with_path(gradients)
        },
    }


def step(sizes):
    """Return the losses of five steps, and the codes of all of them."""
    vit = dataclasses.replace(tiny.TINY.vit, width=16, depth=2)
    config = dataclasses.replace(
        tiny.TINY, teacher_width=16, codebook_size=512, vit=vit, channels=8, decoder_channels=8
    )
    adam = optim.OptimizerConfig(learning_rate=1e-3)
    trainer = Trainer(
        model=TokenFlow(config),
        losses=LossConfig(perceptual_weight=0.0, adaptive=True, scale_drop=0.5),
        codebook=CodebookConfig(usage_window=500),
        optimizer=optim.make_optimizer(adam, 100),
        discriminator_optimizer=optim.make_optimizer(adam, 100),
        teacher=Teacher(ViT(vit)),
        discriminator=PatchGAN(filters=4, layers=1),
        ema_decay=0.9,
    )
    image = jnp.zeros((1, 16, 16, 3))
    frozen = {"teacher": jax.jit(ViT(vit).init)(jax.random.key(9), image)["params"]}
    corners = np.random.default_rng(0).uniform(0, 255, (8, 2, 2, 3))
    images = np.asarray(jax.image.resize(corners, (8, 16, 16, 3), "linear"), np.uint8)
    state = jax.device_get(jax.jit(trainer.init)(jax.random.key(0)))
    device_mesh = make_mesh(sizes)
    shardings = mesh.shardings(state, device_mesh)
    state, frozen = place(state, device_mesh), place(frozen, device_mesh)
    batch = jax.device_put({"image": images}, mesh.batch_sharding(device_mesh))
    run = mesh.bind(
        device_mesh,
        jax.jit(
            trainer.step,
            donate_argnums=0,
            out_shardings=(shardings, mesh.replicated(device_mesh)),
        ),
    )
    losses = []
    for _ in range(5):
        state, metrics = run(state, frozen, batch)
        losses.append({k: float(v) for k, v in metrics.items() if k.startswith("loss/")})
    return {"losses": losses, "codes": np.asarray(state.usage.history_W).tolist()}


def language(sizes):
    """Return losses, gradients and drawn codes of a small model with grouped heads."""
    lm = LMConfig(
        vocabulary_size=101,  # divisible by no mesh: then the channels are split
        width=64,
        layers=2,
        heads=4,
        kv_heads=2,
        mlp_width=96,
        norms="after",
        qk_norm=True,
        remat="block",
    )
    config = GenerationConfig(lm, (1, 2, 4), codebook_size=64, image_start=37, code_channels=12)
    model = Generation(config)
    rng = np.random.default_rng(0)
    books = Codebooks(*(rng.standard_normal((64, n)).astype(np.float32) for n in (8, 4)))
    prefix = rng.integers(1, 37, (16, 9))
    real = np.arange(9) >= rng.integers(0, 5, (16, 1))
    codes = rng.integers(0, 64, (16, 21))
    suffix = np.broadcast_to(np.array([3, 4]), (16, 2))
    features = np.asarray(next_scale_features(jnp.asarray(codes), books, config))
    batch = (prefix, real, codes, features, suffix)
    params = model.init(jax.random.key(0), *batch, method="losses")
    params = jax.tree.map(lambda x: 3 * np.asarray(x) if x.ndim > 1 else np.asarray(x), params)

    def loss(params, *batch):
        losses = model.apply(params, *batch, text=True, tokens=64, method="losses")
        return losses.image.mean() + losses.text.sum() / batch[1][:, 1:].sum()

    device_mesh = make_mesh(sizes)
    placed = place(params, device_mesh)
    batch = jax.device_put(batch, mesh.batch_sharding(device_mesh))
    step = jax.jit(
        jax.value_and_grad(loss), out_shardings=(None, mesh.shardings(params, device_mesh))
    )
    draw = jax.jit(generate.Sampler(model, 0, ((8, 0.9), (1, 0.0))))
    prompt = jnp.where(batch[1], batch[0], 0)
    with mesh.use(device_mesh):
        compiled = step.lower(placed, *batch).compile()
        total, gradients = compiled(placed, *batch)
        keys = jax.random.split(jax.random.key(1), 16)
        drawn = draw(placed["params"], books, prompt, prompt[:1], keys, 3.0)
    return {
        "loss": float(total),
        "gradients": [np.asarray(g).ravel()[::7].tolist() for g in jax.tree.leaves(gradients)],
        "codes": np.asarray(drawn).tolist(),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "whole": [path for path, _ in mesh.stayed_whole(params, device_mesh)],
    }


if __name__ == "__main__":
    kind, *meshes = sys.argv[1:]
    programs = {"quantize": quantize, "forms": forms, "step": step, "language": language}
    function = programs[kind]
    results = [function(None)]
    results += [function([int(n) for n in text.split(",")]) for text in meshes]
    print(json.dumps(results))
