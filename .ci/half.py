# SPDX-License-Identifier: MIT
"""How soon methods reach half of grpo's final accuracy on held-out levels, in grpo's episodes.

    python .ci/half.py --preset scarce --seeds 5 [--method skill_sd,borrowed] [settings]
"""
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd


def reached(curve, goal):
    """The share of the run at which a curve [(iteration, accuracy)] first reaches the goal, on
    straight lines between its points; 1 if it never does."""
    x, y = np.transpose(curve)
    above = np.flatnonzero(y >= goal)
    if not len(above):
        return 1.0
    end = above[0]
    if end == 0:
        return 0.0
    step = (goal - y[end - 1]) / (y[end] - y[end - 1])
    return (x[end - 1] + step * (x[end] - x[end - 1])) / x[-1]


def runs(method, typed):
    """The result of each seed. As in skill_sd.py, a method's row stands over what was typed."""
    row, first = skill_sd.METHODS.get(method, {}), typed.get("seed", 0)
    settings = {name: value for name, value in typed.items() if name not in row}
    plans = [skill_sd.configure(method, **settings | dict(seed=seed))
             for seed in range(first, first + typed.get("seeds", 1))]
    return [skill_sd.train(cfg) for cfg in plans]


def main():
    typed = skill_sd.Config.parse_args()
    names = typed.pop("method", "skill_sd").split(",")
    found = {name: [result["curve"] for result in runs(name, typed)] for name in ["grpo", *names]}
    halves = [curve[-1][1] / 2 for curve in found["grpo"]]
    print(f"\nepisodes until half of grpo's final accuracy ({', '.join(f'{h:.3f}' for h in halves)}"
          "): as a share of the run, then of grpo's")
    theirs = [reached(curve, half) for curve, half in zip(found["grpo"], halves)]
    for name, curves in found.items():
        shares = [reached(curve, half) for curve, half in zip(curves, halves)]
        ratios = [a / b if b else math.nan for a, b in zip(shares, theirs)]  # half from the start
        print(f"{name:<28}" + "  ".join(f"{share:.2f}" for share in shares) + "     "
              + "  ".join(f"{ratio:.2f}" for ratio in ratios) + f"   mean {np.mean(ratios):.2f}")


if __name__ == "__main__":
    main()
