"""What two runs that should be equal are compared by."""

import json

from moddistill.convert.resolve import load
from moddistill.training.loop import train


def losses_and_params(config, workdir):
    train(config, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    _, params = load(workdir / "model")
    names = ("loss", "kd", "ce", "preference", "reward_margin", "grad_norm")
    return [{name: row[name] for name in names if name in row} for row in rows], params
