"""Config keys that have another name now; checkpoints of before are read under the new ones."""

from collections.abc import Mapping
from typing import Any

RENAMED = {
    "text.tokenizer": "text_tokenizer",
    "text.budget": "data.max_length",
    "data.text_tokenizer": "text_tokenizer",
    "data.features": "data.encode",
    "data.fingerprint": "tokenizer.fingerprint",
    "losses.tokens": "loss_tokens",
    "eval.images": "eval.examples",
    "eval.conversations": "eval.examples",
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
