# SPDX-License-Identifier: MIT
"""When do skills help? skill_sd against grpo, from preset `scarce` one factor at a time.

    python .ci/map.py --seeds 3 [settings of skill_sd.py, which hold at every point]

A finished run is read: shells side by side may do a seed each before, with --seed and no --seeds.
"""
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd

# What differs from `scarce`: timid 0.86, 16 episodes an iteration, 160 iterations, 5 to 12 moves.
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


def main():
    typed = skill_sd.Config.parse_args()
    typed.pop("method", None)
    found = {}
    for point, settings in POINTS.items():
        plans = skill_sd.plan(",".join(METHODS), **dict(preset="scarce") | settings | typed)
        found[point] = [[skill_sd.train(cfg) for cfg in plans[method]] for method in METHODS]
    n = typed.get("seeds", 1)
    print(f"\n{n} seed(s), percent of the held-out levels\n{'':28}base     grpo     "
          "skill_sd   area: grpo   skill_sd   skill_sd - grpo")
    for point, results in found.items():
        ends = 100 * np.array([[np.equal(run["sampled"], 1).mean() for run in of_method]
                               for of_method in results])                # (methods, seeds)
        areas = 100 * np.array([[np.mean([y for _, y in run["curve"]]) for run in of_method]
                                for of_method in results])
        gain = areas[2] - areas[1]
        half = skill_sd.QUANTILES[n - 1] * gain.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
        print(f"{point:<27}" + "".join(f"{end:5.1f}    " for end in ends.mean(1))
              + "".join(f"{x:11.1f}" for x in (*areas[1:].mean(1), gain.mean()))
              + f" ±{half:5.1f}")


if __name__ == "__main__":
    main()
