"""What the pictures and curves of a report show: units, and a sentence about each group."""

import re

GRIDS = {  # name of a grid -> what to look for
    "reconstruction": "Held-out pictures above what comes back from their codes. Colors and shapes "
    "should agree; blurred edges and lost details are what the codes do not hold.",
    "scales": "Each row adds the codes of one scale to those above. Colors and layout come with "
    "the first rows, edges and details with the last; a row that changes little adds little.",
    "samples": "Pictures drawn from the prompts below. Look whether each shows what its prompt "
    "says, and whether shapes are closed.",
    "answers": "Held-out pictures with the model's answers: green equals the data's answer, red "
    "does not. A red answer may still be sensible.",
}

SECTIONS = {  # title of a group of curves -> what to look for
    "Held-out figures": "Measured on data that never trains, except those named trained: compare "
    "runs by these. When they stop improving while the losses fall, the model memorizes.",
    "Losses": "They should fall fast, then slowly. A jump that stays means a learning rate that "
    "is too high; the parts of the total carry their weights.",
    "Gradient shares of the losses": "The part of the gradient's norm that each loss has: at the "
    "picture, and at the code vectors. A loss with a few percent does little; one near 100 % "
    "hides the others: change its weight.",
    "Codebook": "The share of the codes in use should be high and stay there; perplexity is the "
    "number of codes that, used equally often, would be as varied.",
    "Throughput": "Level curves are good. Waiting for data should be near 0 %; a p99 far above "
    "p50 means that single steps are held up.",
    "Other curves": "Gradient norms should settle; scale/loss_N is the loss of the N x N codes of "
    "a scale, and finer scales are harder.",
}

_SHARES = (
    "accuracy", "chance_", "codes_used", "cycle", "exact_match", "filled", "fraction", "knn_",
    "largest_answer", "mfu", "share", "top1_", "top10_", "usage",
)  # fmt: skip
_UNITS = (  # pattern of metric names, factor, unit
    (r"\b(\w+_)?psnr", 1, "dB"),
    (r"step_seconds", 1, "s"),
    (r"(\w+)_per_second", 1, r"\1/s"),
    (r"\bperplexity", 1, "codes"),
    (r"^labels$", 1, "tokens"),
    (r"^eval/loss|^loss/(text|codes|image)$|^(scale|kind)/|^source/.*/loss", 1, "nats"),
    (rf"\b({'|'.join(_SHARES)})|_({'|'.join(_SHARES)})", 100, "%"),
)


def unit(name: str) -> tuple[float, str]:
    """Return what values of a metric are multiplied by for people, and their unit; 1 and ""."""
    for pattern, factor, text in _UNITS:
        if found := re.search(pattern, name):
            return factor, found.expand(text)
    return 1, ""


def number(value: float) -> str:
    """Format four significant digits without trailing noise or -0: 0.1234, 12.3, 12,345."""
    return f"{value:z,.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:z.4g}"


def quantity(name: str, value: float) -> str:
    """Format a value of a metric with its unit: 23.46 dB, 56.33 %."""
    factor, text = unit(name)
    return f"{number(factor * value)} {text}".rstrip()
