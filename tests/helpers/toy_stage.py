"""A small but real stage for the tests of the loop: a linear autoencoder learns random pictures.

Also a program, `python toy_stage.py WORKDIR [key=value ...]`, so that tests can kill it.
"""

import functools
import sys
import time

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from read_weights import load_for_inference

from tokenflow_jax import log as runlog
from tokenflow_jax.data.dealing import DealtBatches
from tokenflow_jax.parallel import mesh
from tokenflow_jax.train import checkpoint, loop, metrics
from tokenflow_jax.train.stage import Stage

SIDE = 8


def get_config() -> ml_collections.ConfigDict:
    """Config of the toy run."""
    config = ml_collections.ConfigDict()
    config.stage = "toy"
    config.seed = 3
    config.total_steps = 40
    config.log_every = 5
    config.eval_every = 20
    config.image_every = 20
    config.checkpoint_every = 10
    config.keep_checkpoints = 2
    config.batch_size = 8
    config.learning_rate = 0.02
    config.dtype = "float32"
    config.trainable = ()
    config.nan_at = -1  # the loss becomes NaN in this step
    config.step_delay = 0.0  # seconds, as if the model were larger
    config.data_delay = 0.0  # seconds per picture, as if it were hard to decode
    config.data = ml_collections.ConfigDict({"images": 50, "end": False})
    config.model = ml_collections.ConfigDict({"width": 12})
    return config


class Autoencoder(nn.Module):
    """Linear, with noise on the code so that a lost random state would show."""

    width: int

    @nn.compact
    def __call__(self, images_BHWC, key):
        x_BD = images_BHWC.reshape(images_BHWC.shape[0], -1)
        code_BK = nn.Dense(self.width, name="encode")(x_BD)
        code_BK = code_BK + 0.1 * jax.random.normal(key, code_BK.shape)
        return nn.Dense(x_BD.shape[-1], name="decode")(code_BK).reshape(images_BHWC.shape)


@flax.struct.dataclass
class ToyState:
    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState


class _Ending(DealtBatches):
    """Data that somebody forgot to repeat."""

    def __next__(self):
        if self.get_state()["done"] >= self._counts[0]:
            raise StopIteration
        return super().__next__()


def _data(config, device_mesh):
    def picture(index, rng):
        time.sleep(config.data_delay)
        base = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3))
        return {"image": (base + rng.integers(0, 5, base.shape)).clip(0, 255).astype(np.uint8)}

    share, shares = mesh.batch_share(device_mesh, config.batch_size)
    kind = _Ending if config.data.end else DealtBatches
    # One thread and a short buffer, so that the delay shows.
    return kind(
        picture,
        config.data.images,
        batch_size=config.batch_size // shares,
        seed=config.seed,
        shard_index=share,
        shard_count=shares,
        threads=1,
        buffer=8,
    )


class ToyTrainer:
    """The training step's modules and options."""

    def __init__(self, config):
        self.config, self.model = config, Autoencoder(config.model.width)
        self.optimizer = optax.adam(config.learning_rate)
        self.key = jax.random.key(config.seed)

    def init(self, key):
        params = self.model.init(key, jnp.zeros((1, SIDE, SIDE, 3)), key)["params"]
        ema = jax.tree.map(jnp.copy, params)
        return ToyState(jnp.int32(0), params, ema, self.optimizer.init(params))

    def step(self, state, frozen, batch):
        images_BHWC = as_floats(batch["image"]) * frozen["gain"]

        def loss_of(params):
            noise = jax.random.fold_in(self.key, state.step)
            output = self.model.apply({"params": params}, images_BHWC, noise)
            loss = jnp.mean((output - images_BHWC) ** 2)
            return jnp.where(state.step + 1 == self.config.nan_at, jnp.nan, loss)

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, state.ema, params)
        scalars = {"loss/total": loss, "grad_norm": optax.tree.norm(gradients)}
        return ToyState(state.step + 1, params, ema, opt_state), scalars


def as_floats(batch):
    return batch.astype(jnp.float32) / 127.5 - 1.0


class ToyStage(Stage):
    """Built as the real ones are."""

    name = "toy"
    held_out_BHWC = np.random.default_rng(99).integers(0, 256, (4, SIDE, SIDE, 3)).astype(np.uint8)

    @functools.cached_property
    def trainer(self):
        return ToyTrainer(self.config)

    @property
    def parameters(self):
        return jax.eval_shape(self.trainer.init, jax.random.key(0)).params

    @property
    def frozen_shapes(self):
        return {"gain": jax.ShapeDtypeStruct((), jnp.float32)}

    @property
    def batch_shapes(self):
        return {"image": self.batch_array(jnp.uint8, SIDE, SIDE, 3)}

    def open(self):
        self.frozen = self.place({"gain": np.float32(1.0)}, self.frozen_shapes)
        self.notes.append("a toy: it learns nothing of use")
        return self

    def step(self, state, batch):
        time.sleep(self.config.step_delay)
        return super().step(state, batch)

    @property
    def data_set(self):
        return range(self.config.data.images)

    def data(self):
        return _data(self.config, self.mesh)

    def load_parameters(self, params):
        path = self.config.init_from
        _, loaded = load_for_inference(path)
        return jax.tree.map(jnp.asarray, loaded["params"]), f"params of {path}"

    @functools.cached_property
    def _reconstruct(self):
        def reconstruct(ema):
            images_BHWC = as_floats(self.held_out_BHWC)
            output_BHWC = self.trainer.model.apply({"params": ema}, images_BHWC, self.trainer.key)
            return jnp.mean((output_BHWC - images_BHWC) ** 2), (output_BHWC + 1) * 127.5

        return jax.jit(reconstruct)

    def evaluate(self, state):
        return {"l2": float(self._reconstruct(state.ema)[0])}

    def visualize(self, state):
        tiles = np.asarray(self._reconstruct(state.ema)[1]).clip(0, 255).astype(np.uint8)
        columns = [np.concatenate(pair) for pair in zip(self.held_out_BHWC, tiles, strict=True)]
        return {"reconstructions": np.concatenate(columns, axis=1)}


def run(workdir, profile_steps=None, **changes) -> loop.Result:
    """Trains with a changed config."""
    config = get_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    stage = ToyStage(config, mesh.make_mesh()).open()
    return loop.train_and_evaluate(config, workdir, stage, profile_steps)


if __name__ == "__main__":
    runlog.set_up()
    pairs = [argument.split("=") for argument in sys.argv[2:]]
    numbers = {name: float(text) if "." in text else int(text) for name, text in pairs}
    try:
        run(sys.argv[1], **numbers)
    except (metrics.NonFiniteError, checkpoint.CheckpointError) as error:
        sys.exit(str(error))
