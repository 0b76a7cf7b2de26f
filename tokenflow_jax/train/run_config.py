"""The config of a run: as plain values, under today's keys, compared, and the loop's part of it."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from tokenflow_jax.messages import shown

# Keys of before; checkpoints that have them are read under the new ones.
RENAMED = {
    "codebook.update": "codebook.learning",  # no flag can have the name of a ConfigDict's method
    "text.tokenizer": "text_tokenizer",
    "text.budget": "data.max_length",
    "data.text_tokenizer": "text_tokenizer",
    "data.features": "data.encode",
    "data.fingerprint": "tokenizer.fingerprint",
    "losses.tokens": "loss_tokens",
    "eval.images": "eval.examples",
    "eval.conversations": "eval.examples",
}

# What keys stood for before they existed.
BEFORE = {
    "data.min_side": 8,
    "data.max_aspect": 50,
    "data.min_caption": 0,
    "data.max_caption": 0,
    "data.shuffle_block": 0,
    "data.shuffle_window": 16_384,
    "data.image_column": "",
    "data.mixture": [],
    "data.threads": 0,
    "tokenizer.precision": "auto",
    "model.quantizer.kind": "vq",
    "model.quantizer.mapping": "shared",
    "model.quantizer.heads": 1,
    "model.quantizer.levels": [],
    "model.quantizer.temperature": 0.1,
    "lora.rank": 0,
    "lora.alpha": 16.0,
    "lora.modules": [],
    "lora.weights": "auto",
    "model.rope": "1d",
    "model.scale_inputs": "accumulated",
    "wandb.project": "",
    "data.drawn_scales": 0,
    "data.captions": ["{caption}"],
}


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved config with today's keys; one that has them already is unchanged."""
    new = {key: dict(v) if isinstance(v, Mapping) else v for key, v in config.items()}
    for old, key in RENAMED.items():
        section, name = old.split(".")
        if not isinstance(new.get(section), dict) or name not in new[section]:
            continue
        value = new[section].pop(name)
        *sections, last = key.split(".")
        target = new.setdefault(sections[0], {}) if sections else new
        target.setdefault(last, value)
    if new.get("text") == {}:
        del new["text"]
    if isinstance(new.get("remat"), bool):  # the tokenizer's, before it was named as the others'
        new["remat"] = "block" if new["remat"] else "none"
    return new


# Of what programs read in the config of a checkpoint, which anybody may have written.
_TYPES = {
    **dict.fromkeys(("model", "data", "tokenizer", "sampling", "lora"), (dict,)),
    **dict.fromkeys(("text_tokenizer", "data.template", "data.system"), (str, type(None))),
    **dict.fromkeys(("tokenizer.path", "tokenizer.variant"), (str, type(None))),
    **dict.fromkeys(("tokenizer.fingerprint", "tokenizer.absolute_path"), (str, type(None))),
    "data.image_mode": (str, type(None)),
    "data.max_length": (int,),
}


def wrong_types(config: Mapping[str, Any]) -> list[str]:
    """Return a line for every value of a saved config that has another type than it must have."""
    wrong = []
    for key, types in _TYPES.items():
        section, _, name = key.rpartition(".")
        values = config.get(section, {}) if section else config
        if isinstance(values, dict) and name in values and not isinstance(values[name], types):
            wrong.append(f"config.{key} is {shown(values[name])}")
    return wrong


def refuse_old_keys(config: Mapping[str, Any]) -> None:
    """Raise ValueError that names the new key of every old one in a run's config."""
    old = [
        f"config.{key} is now config.{new}"
        for key, new in RENAMED.items()
        if key.split(".")[1] in (config.get(key.split(".")[0]) or {})
    ]
    if isinstance(config.get("remat"), bool):
        old.append("config.remat is now 'none' or 'block'")
    if old:
        raise ValueError("; ".join(old))


def config_to_dict(config: Any) -> dict[str, Any]:
    """Turn a ConfigDict into plain JSON values; tuples become lists."""
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.loads(json.dumps(plain, default=str, sort_keys=True))


def config_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple]:
    """Return dotted key -> (old value, new value) of all differences; None where absent."""
    from flax.traverse_util import flatten_dict  # here, so that --help is quick

    old_flat, new_flat = (
        {**BEFORE, **flatten_dict(config, is_leaf=lambda _, value: not value, sep=".")}
        for config in (old, new)
    )
    return {
        key: (old_flat.get(key), new_flat.get(key))
        for key in sorted(old_flat.keys() | new_flat.keys())
        if old_flat.get(key) != new_flat.get(key)
    }


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """The part of the config that the loop reads; an interval of 0 steps means at the end only."""

    total_steps: int  # of the whole run, restored ones included
    log_every: int = 20  # progress lines and points of the curves
    eval_every: int = 0
    image_every: int = 0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2  # how many of the latest stay on disk

    def __post_init__(self) -> None:
        lowest = {"total_steps": 1, "log_every": 1, "keep_checkpoints": 1}
        problems = [
            f"{name}={value!r} must be an integer of at least {lowest.get(name, 0)}"
            for name, value in dataclasses.asdict(self).items()
            if type(value) is not int or value < lowest.get(name, 0)
        ]
        if problems:
            raise ValueError("; ".join(problems))

    @classmethod
    def from_config(cls, config: Any) -> "LoopOptions":
        """Take the fields from a ConfigDict; ValueError lists every wrong one."""
        values = config_to_dict(config)
        if "total_steps" not in values:
            raise ValueError("the config has no total_steps; set the number of optimizer steps")
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in names if name in values})

    def due(self, every: int, step: int) -> bool:
        """Tell whether something done each `every` steps, and at the end, is due after `step`."""
        return step == self.total_steps or (every > 0 and step % every == 0)
