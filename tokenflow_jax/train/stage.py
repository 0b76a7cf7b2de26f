"""A stage of training: what the loop runs, and what preflight compiles.

A config and a mesh are enough to build a stage, and to compile its step for hardware you don't
have. `open` then loads frozen weights and data, after which the loop can run it.
"""

import abc
import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenflow_jax.parallel import costs, placement
from tokenflow_jax.parallel import mesh as meshes
from tokenflow_jax.train import optim

PyTree = Any
State = Any  # a flax.struct dataclass with an int32 scalar `step`, `params` and perhaps `ema`
DTYPES = ("auto", "float32", "bfloat16")


class Program(NamedTuple):
    """A function and the shapes and shardings of its arguments."""

    function: Callable[..., Any]
    compiled: Any  # the same, jitted; to be called or lowered with the mesh in use
    arguments: tuple[PyTree, ...]
    parts: Mapping[str, PyTree]  # the arguments by what they are, for reports


class Step(NamedTuple):
    """A compiled step."""

    run: Callable[..., Any]
    operations: float  # over all devices, see `costs.Operations.needed`


class Stage(abc.ABC):
    """One stage: `init`, `step`, `data`, `evaluate`, `visualize`.

    Attributes:
      name: for logs and the report.
      headline: metrics of the progress line, in order; all losses when empty.
      frozen_name: what `frozen` is, for reports.
      config: ConfigDict; a stage may fill in what a checkpoint must know about itself.
      mesh: from `meshes.make_mesh`, or an abstract one.
      platform: "tpu", "gpu" or "cpu": where it will run.
      frozen: weights that the step reads and never changes; set by `open`, not checkpointed.
      notes: lines to log at the start and print in the report.
      between_batches: to be called between the batches of an evaluation, equally often in all
        processes; ends it by an exception when the run is to stop.
    """

    name: str
    headline: tuple[str, ...] = ()
    frozen_name: str = "frozen networks"

    def __init__(self, config: Any, mesh: meshes.Mesh, platform: str | None = None):
        """Check the config; no weights and no data are read."""
        self.config, self.mesh = config, mesh
        self.platform = platform or jax.default_backend()
        self.frozen: PyTree = {}
        self.notes: list[str] = []
        self.between_batches: Callable[[], None] = lambda: None
        self._steps: dict[tuple, Step] = {}  # by the shapes of a batch
        meshes.check_batch_size(config.batch_size, mesh, self.pack)

    @abc.abstractmethod
    def open(self) -> "Stage":
        """Load frozen weights and data; return the stage. ValueError, OSError: wrong files."""

    @property
    @abc.abstractmethod
    def trainer(self) -> Any:
        """The modules and `step` of the training step, and `init` of its state."""

    @property
    @abc.abstractmethod
    def parameters(self) -> PyTree:
        """Shapes of the trained model's parameters."""

    @property
    @abc.abstractmethod
    def frozen_shapes(self) -> PyTree:
        """Shapes of the frozen weights."""

    @property
    @abc.abstractmethod
    def batch_shapes(self) -> PyTree:
        """Shapes of a global batch, with its sharding."""

    @abc.abstractmethod
    def data(self) -> Any:
        """Return this process's share of the training batches, infinite and resumable.

        The iterator has `__next__` (pytrees of host-local NumPy arrays), `get_state` and
        `set_state(states of all shares)`, such as `data.dealing.DealtBatches`.
        """

    @property
    @abc.abstractmethod
    def data_set(self) -> Any:
        """The opened training data; has `len`."""

    @abc.abstractmethod
    def evaluate(self, state: State) -> Mapping[str, float]:
        """Return held-out figures; names get the prefix "eval/" when they lack it."""

    @abc.abstractmethod
    def visualize(self, state: State) -> Mapping[str, np.ndarray]:
        """Return grids, name -> uint8 (height, width, 3)."""

    def load_parameters(self, params: PyTree) -> tuple[PyTree, str]:
        """Return the weights of `config.init_from` in the shape of `params`, and what was taken."""
        raise ValueError(f"stage {self.name} cannot start from config.init_from")

    def final_notes(self) -> list[str]:
        """Return lines for the end of the run, such as the pictures that were skipped."""
        return []

    @property
    def pack(self) -> int:
        """Samples that share a row of the batch."""
        return self.config.get("pack", 1)

    @functools.cached_property
    def dtype(self) -> jnp.dtype:
        """Computation dtype of the networks."""
        name = self.config.dtype
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r} is not one of {list(DTYPES)}")
        if name == "auto":
            name = "float32" if self.platform == "cpu" else "bfloat16"
        return jnp.dtype(name)

    @functools.cached_property
    def trainable(self) -> PyTree | None:
        """Marks of the parameters that train; None when all do."""
        patterns = tuple(self.config.trainable)
        return optim.matching(self.parameters, patterns) if patterns else None

    @functools.cached_property
    def state_shapes(self) -> State:
        """Shapes and shardings of the training state."""
        return meshes.placed(jax.eval_shape(self.trainer.init, jax.random.key(0)), self.mesh)

    @property
    def parts(self) -> dict[str, PyTree]:
        """Shapes of the step's arguments by what they are, for reports."""
        state = self.state_shapes
        parts = {"parameters": state.params, "optimizer": state.opt_state}
        if getattr(state, "ema", None) is not None:
            parts["average of parameters"] = state.ema
        return parts

    @functools.cached_property
    def program(self) -> Program:
        """The training step; the state is donated."""
        frozen = meshes.placed(self.frozen_shapes, self.mesh)
        shardings = jax.tree.map(lambda x: x.sharding, (self.state_shapes, frozen))
        compiled = jax.jit(
            self.trainer.step,
            donate_argnums=0,
            # A batch may hold more than the step reads (labels), all of it split alike.
            in_shardings=(*shardings, self.batch_sharding),
            out_shardings=(shardings[0], meshes.replicated(self.mesh)),
        )
        arguments = (self.state_shapes, frozen, self.batch_shapes)
        parts = self.parts | {self.frozen_name: frozen, "batch": self.batch_shapes}
        return Program(self.trainer.step, compiled, arguments, parts)

    def all_shapes(self, batch: PyTree) -> list[PyTree]:
        """Return what batches may look like beside `batch`, one of them, as shapes."""
        return [_shapes(batch)]

    def tokens_of(self, batch: PyTree) -> int:
        """Return the tokens of a global batch, padding included; 0 without a language model."""
        return 0

    def compile(self, state: State, batch: PyTree) -> int:
        """Compile the step for batches of all shapes; return how many there are."""

        def compiled(shapes: PyTree) -> Step:
            with meshes.use(self.mesh):
                traced = self.program.compiled.trace(state, self.frozen, shapes)
                needed = costs.operations(traced.jaxpr.jaxpr).needed
                run = traced.lower().compile()
            # jax 0.10 mistakes the layout of int4 arrays that a compiled program is given; jit
            # finds the program in the cache.
            return Step(self.program.compiled if packed else run, needed)

        packed = any(leaf.dtype == jnp.int4 for leaf in jax.tree.leaves(state))
        variants = self.all_shapes(batch)
        with ThreadPoolExecutor(min(len(variants), os.cpu_count() or 1)) as pool:
            found = pool.map(compiled, variants)
            self._steps = dict(zip(map(_key, variants), found, strict=True))
        return len(variants)

    def step(self, state: State, batch: PyTree) -> tuple[State, dict[str, jax.Array]]:
        """Run one step, giving up the state; return the new one and scalars, finite "loss/*"."""
        with meshes.use(self.mesh):
            known = self._steps.get(_key(batch))
            run = known.run if known else self.program.compiled
            return run(state, self.frozen, batch)

    def operations_of(self, batch: PyTree) -> float:
        """Return what a step on a batch needs, see `costs.Operations`; 0 if it was not compiled."""
        known = self._steps.get(_key(batch))
        return known.operations if known else 0.0

    def init(self) -> State:
        """Return the state from scratch, sharded."""
        return self._first_state(self.trainer.init)

    def _first_state(self, init: Callable[[jax.Array], State]) -> State:
        compiled = jax.jit(
            init,
            out_shardings=jax.tree.map(lambda x: x.sharding, self.state_shapes),
            compiler_options=placement.fast_to_compile(),
        )
        return compiled(jax.random.key(self.config.seed))

    def warm_start(self, state: State) -> tuple[State, str]:
        """Return the state with the weights of `config.init_from`, and what was taken."""
        params, text = self.load_parameters(state.params)
        return self.with_params(state, params), text

    def with_params(self, state: State, params: PyTree) -> State:
        """Replace the weights, and the moving average by copies of them."""
        state = state.replace(params=params)
        if getattr(state, "ema", None) is not None:
            state = state.replace(ema=jax.tree.map(jnp.copy, self.averaged(params)))
        return state

    def averaged(self, params: PyTree) -> PyTree:
        """Return the parameters that a moving average follows: all of them."""
        return params

    def weights(self, state: State) -> PyTree:
        """Return the weights to evaluate: the moving average where there is one."""
        ema = getattr(state, "ema", None)
        return state.params if ema is None else ema

    def place(self, tree: PyTree, like: PyTree) -> PyTree:
        """Put arrays, lazy ones too, where the mesh wants them, in the dtypes of `like`."""
        return jax.tree.map(
            lambda array, where, like: meshes.place(array, where, like.dtype),
            *(tree, meshes.shardings(like, self.mesh), like),
        )

    @property
    def batch_sharding(self) -> jax.sharding.NamedSharding:
        """Sharding of a batch, along its rows."""
        return meshes.batch_sharding(self.mesh)

    def batch_array(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        """Return the shape of an array of a global batch; `shape` leaves out its rows."""
        rows = self.config.batch_size // self.pack
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=self.batch_sharding)


def _shapes(batch: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch
    )


def _key(batch: PyTree) -> tuple:
    return tuple((name, x.shape) for name, x in sorted(batch.items()))
