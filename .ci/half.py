# SPDX-License-Identifier: MIT
"""How soon methods reach half of grpo's final accuracy on held-out levels, in grpo's episodes.

    python .ci/half.py --preset scarce --seeds 5 [--method skill_sd,borrowed] [settings]
"""
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


def main():
    typed = skill_sd.parse_args()
    names, first = typed.get("method", "skill_sd").split(","), typed.get("seed", 0)
    seeds = range(first, first + typed.get("seeds", 1))
    found = {name: [result["curve"] for *_, result in skill_sd.run(
        [skill_sd.configure(typed, name, seed) for seed in seeds])] for name in ["grpo", *names]}
    halves = [curve[-1][1] / 2 for curve in found["grpo"]]
    print(f"\nepisodes until half of grpo's final accuracy ({', '.join(f'{h:.3f}' for h in halves)}"
          "): as a share of the run, then of grpo's")
    for name, curves in found.items():
        shares = [reached(curve, half) for curve, half in zip(curves, halves)]
        ratios = [a / reached(b, half) for a, b, half in zip(shares, found["grpo"], halves)]
        print(f"{name:<28}" + "  ".join(f"{share:.2f}" for share in shares) + "     "
              + "  ".join(f"{ratio:.2f}" for ratio in ratios) + f"   mean {np.mean(ratios):.2f}")


if __name__ == "__main__":
    main()
