"""Writes the small files that the reader's tests use; the only script here that needs torch.

python tests/golden/make_torch_files.py
"""

import argparse
import collections
import pathlib

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent


def main() -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    bare = collections.OrderedDict(
        base=base,
        transposed=base.T,
        part=base[1:3, 2:5],
        expanded=base[0, :1].expand(3, 2),
        bfloat16=torch.tensor([1.5, -2.0, 3.140625], dtype=torch.bfloat16),
        float16=torch.tensor([[0.5], [-65504.0]], dtype=torch.float16),
        float64=torch.tensor(1 / 3, dtype=torch.float64),
        int64=torch.tensor(2**40),
        uint16=torch.tensor([65535, 7], dtype=torch.uint16),
        boolean=torch.tensor([True, False, True]),
        complex64=torch.tensor([1 + 2j]),
        empty=torch.zeros(0, 5),
        parameter=torch.nn.Parameter(torch.tensor([-1.0])),
    )
    torch.save(bare, FOLDER / "torch_bare.pt")

    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(2, 3))
        model.bias.copy_(torch.tensor([7.0, 8.0]))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    training = {
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "ema": {name: value + 0.5 for name, value in model.state_dict().items()},
        "steps": 3,
    }
    optimizer.step()
    training |= {
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=1e-4, out=pathlib.Path("out"), device=torch.device("cpu")),
        "best": np.float64(0.25),
        "history": np.arange(3.0),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "dtype": torch.float16,
        "seen": {1, 2},
    }
    torch.save(training, FOLDER / "torch_training.pt")
    torch.save(model.state_dict(), FOLDER / "torch_legacy.pt", _use_new_zipfile_serialization=False)

    script = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    with torch.no_grad():
        script[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    torch.jit.save(torch.jit.script(script), FOLDER / "torch_script.pt")


if __name__ == "__main__":
    main()
