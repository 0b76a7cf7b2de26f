"""What the ablations are to decide, and by which rule; fixed before the first run.

A claim names two rows of a suite, a figure and the direction in which it should differ. Over the
seeds of both rows Welch's t-test decides, two-sided, at 5 %:

    held here         the difference is significant, in the claimed direction
    did not           it is significant, in the other direction
    cannot tell       it is not significant, or a row has fewer than two seeds

With three seeds and equal spreads a difference is significant from 2.3 standard deviations on.
A figure that a row lacks (rFID without Inception's weights) decides nothing.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

_LEVEL = 0.05


@dataclasses.dataclass(frozen=True)
class Claim:
    """`better` has a larger figure than `worse`, or with `sign` -1 a smaller one."""

    text: str
    source: str  # who says so
    better: str
    worse: str
    figure: str
    sign: int = 1


CLAIMS: Mapping[str, tuple[Claim, ...]] = {
    "paper": (
        Claim("The shared mapping reconstructs better than one codebook of joined features",
              "TokenFlow, table 5", "shared", "joined", "rfid", -1),
        Claim("Several scales reconstruct better than one",
              "TokenFlow, table 5", "multi_scale", "shared", "rfid", -1),
        Claim("Several scales reconstruct better than one, at equal bits (8 % more)",
              "a control of ours", "three_scales", "shared", "rfid", -1),
        Claim("An encoder that starts as the teacher carries more meaning",
              "TokenFlow, table 5 (MME)", "semantic_start", "multi_scale", "knn_semantic"),
        Claim("An encoder that starts as the teacher reconstructs better",
              "TokenFlow, table 5", "semantic_start", "multi_scale", "rfid", -1),
        Claim("The shared mapping carries more meaning than two indices of half the bits",
              "TokenFlow, sec. 3.1", "shared", "separate", "knn_semantic"),
    ),
    "quantizers": (
        Claim("The rotation trick reconstructs better than straight-through",
              "arXiv 2410.06424", "rotation", "vq", "rfid", -1),
        Claim("SimVQ uses more of the codebook than codes that are not revived",
              "arXiv 2411.02038", "simvq", "vq_unrevived", "codes_used"),
        Claim("SimVQ reconstructs better than codes that are not revived",
              "arXiv 2411.02038", "simvq", "vq_unrevived", "rfid", -1),
        Claim("SimVQ reconstructs better than codes that are revived",
              "arXiv 2411.02038", "simvq", "vq", "rfid", -1),
        Claim("IBQ uses more of the codebook", "arXiv 2412.02692", "ibq", "vq", "codes_used"),
        Claim("IBQ reconstructs better", "arXiv 2412.02692", "ibq", "vq", "rfid", -1),
        Claim("FSQ, for the pixel half, reconstructs better",
              "arXiv 2309.15505", "fsq", "vq", "rfid", -1),
        Claim("BSQ, for the pixel half, reconstructs better",
              "arXiv 2406.07548", "bsq", "vq", "rfid", -1),
        Claim("LFQ, for the pixel half, reconstructs better",
              "arXiv 2310.05737", "lfq", "vq", "rfid", -1),
        Claim("Two heads reconstruct better than one index of as many bits",
              "arXiv 2502.20321", "two_heads", "vq", "rfid", -1),
    ),
    "understanding": (
        Claim("The last scale's map is read better than all scales' maps",
              "TokenFlow, table 8", "last_scale", "full_scale", "exact_match"),
        Claim("The last scale's map is read better than the vectors of all codes",
              "TokenFlow, table 8", "last_scale", "residual", "exact_match"),
        Claim("The pixel half adds to the semantic half",
              "TokenFlow, table 8", "last_scale", "last_scale_semantic", "exact_match"),
        Claim("The semantic half is read better than the pixel half",
              "TokenFlow, sec. 3.4", "last_scale_semantic", "last_scale_pixel", "exact_match"),
    ),
    "sampling": (
        Claim("Two passes draw better than one",
              "TokenFlow, table 6", "two_passes", "one_pass", "top10"),
        Claim("Three passes draw better than two",
              "TokenFlow, table 6", "three_passes", "two_passes", "top10"),
        Claim("Two passes draw better than one, by the second judge",
              "TokenFlow, table 6", "two_passes", "one_pass", "top10_inception"),
        Claim("Guidance draws better than none",
              "classifier-free guidance", "one_pass", "unguided", "top10"),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the runs say of a claim; the difference is positive in the claimed direction."""

    words: str
    difference: float = math.nan
    half_width: float = math.nan  # of the difference's 95 % interval


def decide(claim: Claim, rows: Mapping[str, Sequence[Mapping[str, float]]]) -> Verdict:
    """Judge a claim by the figures of each row's seeds."""
    better, worse = (
        np.array([run[claim.figure] for run in rows.get(name, ()) if claim.figure in run])
        for name in (claim.better, claim.worse)
    )
    if min(len(better), len(worse)) < 2:
        return Verdict("cannot tell: too few runs")
    difference = claim.sign * float(better.mean() - worse.mean())
    if not better.std() and not worse.std():  # equal runs: nothing to estimate a spread from
        return Verdict("cannot tell: no spread", difference)
    test = stats.ttest_ind(better, worse, equal_var=False)
    low, high = test.confidence_interval(1 - _LEVEL)
    half = float(high - low) / 2
    if test.pvalue >= _LEVEL:
        return Verdict("cannot tell at this size", difference, half)
    return Verdict("held here" if difference > 0 else "did not hold here", difference, half)
