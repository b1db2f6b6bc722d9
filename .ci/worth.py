# SPDX-License-Identifier: MIT
"""Are the skills in a finished run's bank worth more or less, and does UCB's statistic tell which?

    python .ci/worth.py [settings of skill_sd.py]      of `.ci/variants.py NAME`: --out as it says

Worth: the share of 32 games that the untrained player solves when it reads the skill itself. Of the
tasks with several tried skills, all less the mean of their task: the correlation of worth with the
mean credited reward, and with worth measured again, which tells how much of it is no chance."""
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd
import sokoban_env

GAMES = 32


def main():
    typed = dict(preset="scarce", train_levels=64) | skill_sd.Config.parse_args()
    typed.pop("method", None)
    rows = []                                  # credit, worth, worth again, of each skill
    for cfg in skill_sd.plan(**typed)["skill_sd"]:
        (bank,) = skill_sd.load(skill_sd.run_folder(cfg) / "bank.json")
        reader = replace(cfg, skill_reader="student", lam=0.0)
        with sokoban_env.threads_for(cfg.model):
            world, state = skill_sd.begin(cfg)
            for x, entries in bank.items():
                tried = [e for e in entries if e["picks"]]
                if len(tried) < 2:
                    continue
                found = [[e["reward_sum"] / e["picks"] for e in tried]]
                skills = [skill_sd.Skill(**e["skill"]) for e in tried for _ in range(GAMES)]
                for seed in 1, 2:
                    played = skill_sd.rollout(
                        state.student, state.tokenizer, [world.make_env(x) for _ in skills], reader,
                        skills, state.generator.manual_seed(seed))
                    solved = np.reshape([t.reward == 1 for t in played], (-1, GAMES))
                    found.append(solved.mean(1))
                rows.append(np.array(found))                   # (3, skills)
    skill_sd.require(rows, "no task has several tried skills: more iterations, or fewer levels")
    less_means = np.hstack([found - found.mean(1, keepdims=True) for found in rows])
    r = np.corrcoef(less_means)
    print(f"{len(rows)} tasks with {less_means.shape[1]} skills; best less worst of a task: credit "
          f"{np.mean([np.ptp(found[0]) for found in rows]):.2f}, worth "
          f"{np.mean([np.ptp(found[1:].mean(0)) for found in rows]):.2f}; correlation of worth "
          f"with credit {(r[0, 1] + r[0, 2]) / 2:.2f}, with worth again {r[1, 2]:.2f}")


if __name__ == "__main__":
    main()
