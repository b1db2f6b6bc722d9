# SPDX-License-Identifier: MIT
"""When do skills help? skill_sd against grpo, from preset `scarce` one factor at a time.

    python .ci/map.py [--seeds 3] [--jobs 2] [--out runs] [--split test]
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd

# What differs from `scarce`: timid 0.9, 16 episodes an iteration, 160 iterations, 5 to 12 moves.
POINTS = {
    "scarce": {},
    "timid 0.72": dict(timid=0.72),
    "timid 0.58": dict(timid=0.58),
    "timid 0.45": dict(timid=0.45),
    "128 episodes, 60 iterations": dict(tasks_per_iteration=16, group_size=8, iterations=60),
    "8x8, 12-25 moves, timid 0.6": dict(size=8, min_moves=12, max_moves=25, max_turns=40,
                                        timid=0.6),
    "two boxes": dict(boxes=2, max_turns=24),
}
METHODS = "base", "grpo", "skill_sd"


def area(curve):
    """The mean of y over x of [(x, y)], by trapezoids; of the base, which has one point, y."""
    x, y = np.transpose(curve)
    return np.diff(x) @ (y[1:] + y[:-1]) / 2 / x[-1] if len(x) > 1 else y[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("seeds", 3), ("jobs", 2), ("out", "runs"), ("split", "test")):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = vars(parser.parse_args())
    seeds = range(args["seeds"])
    plans = {point: [skill_sd.configure(args | dict(preset="scarce") | settings, method, seed)
                     for method in METHODS for seed in seeds] for point, settings in POINTS.items()}
    found = {point: skill_sd.run(each) for point, each in plans.items()}
    quantile = {2: 12.71, 3: 4.30, 5: 2.78}.get(len(seeds), math.nan)
    print(f"\n{len(seeds)} seed(s), percent of the held-out levels\n{'':28}base     grpo     "
          "skill_sd   area: grpo   skill_sd   skill_sd - grpo")
    for point, results in found.items():
        ends = np.reshape([100 * np.equal(r["sampled"], 1).mean() for *_, r in results], (3, -1))
        areas = np.reshape([100 * area(r["curve"]) for *_, r in results], (3, -1))
        gain = areas[2] - areas[1]
        half = quantile * gain.std(ddof=1) / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan
        print(f"{point:<27}" + "".join(f"{end:5.1f}    " for end in ends.mean(1))
              + "".join(f"{x:11.1f}" for x in (*areas[1:].mean(1), gain.mean()))
              + f" ±{half:5.1f}")


if __name__ == "__main__":
    main()
