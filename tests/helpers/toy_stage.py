"""A small but real stage for the tests of the loop: a linear autoencoder learns random pictures.

Also a program, `python toy_stage.py WORKDIR [key=value ...]`, so that tests can kill it.
"""

import sys
import time

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from tokenflow_jax import log as runlog
from tokenflow_jax.data.dealing import DealtBatches
from tokenflow_jax.parallel import mesh
from tokenflow_jax.train import checkpoint, loop, metrics
from tokenflow_jax.weights.formats import orbax as orbax_files

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
        if self.get_state()["done"] >= self._count:
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


def make_stage(config, device_mesh) -> loop.Stage:
    """Builds the stage as the real ones do."""
    model = Autoencoder(config.model.width)
    optimizer = optax.adam(config.learning_rate)
    sharding = mesh.batch_sharding(device_mesh)
    key = jax.random.key(config.seed)

    def as_floats(batch):
        return batch.astype(jnp.float32) / 127.5 - 1.0

    def init():
        params = model.init(key, jnp.zeros((1, SIDE, SIDE, 3)), key)["params"]
        return ToyState(
            jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer.init(params)
        )

    sharded_init = jax.jit(init, out_shardings=mesh.replicated(device_mesh))

    def step(state, frozen, batch):
        images_BHWC = as_floats(batch["image"]) * frozen["gain"]

        def loss_of(params):
            noise = jax.random.fold_in(key, state.step)
            output = model.apply({"params": params}, images_BHWC, noise)
            loss = jnp.mean((output - images_BHWC) ** 2)
            return jnp.where(state.step + 1 == config.nan_at, jnp.nan, loss)

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, state.ema, params)
        scalars = {"loss/total": loss, "grad_norm": optax.tree.norm(gradients)}
        return ToyState(state.step + 1, params, ema, opt_state), scalars

    jitted = jax.jit(step, donate_argnums=0)

    def slowed(state, frozen, batch):
        time.sleep(config.step_delay)
        return jitted(state, frozen, batch)

    held_out_BHWC = np.random.default_rng(99).integers(0, 256, (4, SIDE, SIDE, 3)).astype(np.uint8)

    @jax.jit
    def reconstruct(ema):
        images_BHWC = as_floats(held_out_BHWC)
        output_BHWC = model.apply({"params": ema}, images_BHWC, key)
        return jnp.mean((output_BHWC - images_BHWC) ** 2), (output_BHWC + 1) * 127.5

    def evaluate(state):
        return {"l2": float(reconstruct(state.ema)[0])}

    def visualize(state):
        tiles = np.asarray(reconstruct(state.ema)[1]).clip(0, 255).astype(np.uint8)
        columns = [np.concatenate(pair) for pair in zip(held_out_BHWC, tiles, strict=True)]
        return {"reconstructions": np.concatenate(columns, axis=1)}

    def warm_start(state):
        source, loaded = orbax_files.load_for_inference(config.init_from)
        del source
        params = jax.tree.map(jnp.asarray, loaded["params"])
        return state.replace(params=params), f"params of {config.init_from}"

    return loop.Stage(
        name="toy",
        init=sharded_init,
        step=slowed if config.step_delay else jitted,
        train_data=lambda: _data(config, device_mesh),
        batch_sharding=sharding,
        evaluate=evaluate,
        visualize=visualize,
        images_per_step=config.batch_size,
        warm_start=warm_start if config.get("init_from") else None,
        frozen={"gain": jnp.float32(1.0)},
        notes=["a toy: nothing is learned for good"],
    )


def run(workdir, **changes) -> loop.Result:
    """Trains with a changed config."""
    config = get_config()
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return loop.train_and_evaluate(config, workdir, make_stage(config, mesh.make_mesh()))


if __name__ == "__main__":
    runlog.set_up()
    pairs = [argument.split("=") for argument in sys.argv[2:]]
    numbers = {name: float(text) if "." in text else int(text) for name, text in pairs}
    try:
        run(sys.argv[1], **numbers)
    except (metrics.NonFiniteError, checkpoint.CheckpointError) as error:
        sys.exit(str(error))
