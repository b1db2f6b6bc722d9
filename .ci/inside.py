# SPDX-License-Identifier: MIT
"""What the teacher of the demo knows that its student does not, over a run that is trained anew.

    python .ci/inside.py [--preset scarce] [settings of skill_sd.py]

For three kinds of skill, at the states that the student visits under the plain prompt: how often
the student solves a level when it reads the skill itself; the share of states with a signal,
KL(student || teacher) above 0.05; the lead, the teacher's chance of a best move less the student's,
in percentage points, where the notes fit the state and where they do not; and SDL's gradient: its
norm times lambda over that of GRPO's, and the cosine of the two."""
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd
import sokoban_env
from skill_sd import Skill, response_logps
from variants import vocabulary


def looked_at(t):
    """[(best moves, level, boxes)] at every turn of a trajectory."""
    rooms = [sokoban_env.room_in(m["content"]) for m in t.messages[::2]][:t.turns]
    table = sokoban_env.distances(rooms[0])
    return [(sokoban_env.best_moves(rooms[0], room.player, room.boxes, table), rooms[0], room.boxes)
            for room in rooms]


def mean_lead(gains):
    """A mean in percentage points, as text."""
    return f"{100 * np.mean(gains):6.1f}" if gains else "     -"


def look(state, world, cfg, k, line, n=64, group=8):
    """Stands in for `evaluate`: prints a line for each kind of skill after k iterations."""
    model = state.student
    chosen = world.train[::max(1, len(world.train) // n)]
    tasks = [task for task in chosen for _ in range(group)]
    moves = state.tokenizer.convert_tokens_to_ids([*sokoban_env.MOVES])
    reader = replace(cfg, skill_reader="student", actor="student", lam=0.0)

    def play(skills=None):
        return skill_sd.rollout(model, state.tokenizer, [world.make_env(task) for task in tasks],
                                reader, skills, state.generator.manual_seed(k))

    def gradient(loss):
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        return torch.cat([g.flatten() for g in grads])

    def chances(with_skill):
        with torch.no_grad():
            return vocabulary(model, first, cfg, with_skill)[:, moves].exp()         # (turns, 4)

    first = play()
    solved = [t.reward == 1 for t in first]
    best = [max(first[i:i + group], key=lambda t: (t.reward, -t.turns))
            for i in range(0, len(first), group)]
    print(f"after {k} iterations: solves {100 * np.mean(solved):.1f} % without a skill; skills "
          f"from a success: {100 * np.mean([t.reward == 1 for t in best]):.0f} %")
    own = [Skill(**sokoban_env.analyse(t.messages)) for t in best]
    kinds = {"own": own, "another's": own[1:] + own[:1], "empty": [Skill("", "", "")] * len(own)}
    states = [seen for t in first for seen in looked_at(t)]
    adv = skill_sd.group_advantages([t.reward for t in first], group).to(model.device)
    logp, mask = response_logps(model, first, cfg)
    old, p = logp.detach(), chances(with_skill=False)
    pg = gradient(skill_sd.grpo_loss(logp, old, adv, mask, cfg.clip_low, cfg.clip_high))
    for kind, skills in kinds.items():
        played = play([skill for skill in skills for _ in range(group)])
        for t, shown in zip(first, played):
            t.skill_prompt = shown.skill_prompt
        q = chances(with_skill=True)
        kl = (p * (p / q).log()).sum(1)
        sdl = gradient(skill_sd.sdl_loss(logp, skill_sd.score(model, first, cfg), old, mask))
        told = [set(re.findall(r"push (\w+)", skill.golden_workflow)) for skill in skills]
        told = np.repeat(np.repeat(told, group), [t.turns for t in first])
        fit, other = [], []
        for (good, level, boxes), words, here, there in zip(states, told, p, q):
            if good:                           # else the room is lost
                gains = fit if words and sokoban_env.fits(level, boxes, words) else other
                gains.append((there[good].sum() - here[good].sum()).item())
        print(f"  {kind:<10} solves {100 * np.mean([t.reward == 1 for t in played]):5.1f} %   "
              f"signal {100 * (kl > 0.05).float().mean():3.0f} %   lead {mean_lead(fit)} at the "
              f"{100 * len(fit) / len(states):3.0f} % that fit, {mean_lead(other)} else   gradient "
              f"{cfg.lam * sdl.norm() / pg.norm():7.3f}, "
              f"cosine {torch.cosine_similarity(pg, sdl, dim=0):6.3f}", flush=True)
    return dict(sampled=solved, greedy=solved)


def main():
    typed = skill_sd.Config.parse_args()
    cfg = skill_sd.configure(typed.pop("method", "skill_sd"), **typed)
    with tempfile.TemporaryDirectory() as folder:
        warm = sokoban_env.player_folder(cfg, skill_sd.SKILL_TEXT)
        if warm.exists():
            (Path(folder) / warm.name).symlink_to(warm.resolve())
        skill_sd.evaluate = look
        skill_sd.train(replace(cfg, out=folder))


if __name__ == "__main__":
    main()
