# SPDX-License-Identifier: MIT
"""What the teacher of the demo knows that its student does not, over a run that is trained anew.

    python .ci/inside.py [--preset scarce] [settings of skill_sd.py]

For four kinds of skill, at the states that the student visits under the plain prompt: how often the
student solves a level when it reads the skill itself; the share of states with a signal,
KL(student || teacher) above 0.05; the lead, the teacher's chance of a best move less the student's,
in percentage points, where the notes fit the state and where they do not; and SDL's gradient: its
norm times lambda over that of GRPO's, and the cosine of the two."""
import re
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd
import sokoban_env
from skill_sd import Skill, SkillBank, response_logps


def looked_at(t):
    """[(best moves, level, boxes)] at every turn of a trajectory."""
    rooms = [sokoban_env.room_in(m["content"]) for m in t.messages[::2]][:t.turns]
    table = sokoban_env.distances(rooms[0])
    return [(sokoban_env.best_moves(rooms[0], room.player, room.boxes, table), rooms[0], room.boxes)
            for room in rooms]


def skills_of(best, bank, model, prompt, cfg, k):
    """{kind: [Skill of each task]}: its own, the nearest task's, any other's, an empty one."""
    nearest, cfg = [], replace(cfg, borrow="nearest")
    for t in best:
        others = SkillBank(1.0)
        others.entries = {task: held for task, held in bank.entries.items() if task != t.task_id}
        shown = skill_sd.shown_skills(others, {t.task_id: None}, prompt, model, cfg, k)
        nearest.append(shown[t.task_id])
    own = [bank.entries[t.task_id][0]["skill"] for t in best]
    return {"own": own, "nearest": nearest, "another's": own[1:] + own[:1],
            "empty": [Skill("", "", "")] * len(own)}


def look(model, tokenizer, world, cfg, k, n=64, group=8):
    """Stands in for `evaluate`: prints a line for each kind of skill after k iterations."""
    tasks = [task for task in world.train[::max(1, len(world.train) // n)] for _ in range(group)]
    reader, moves = replace(cfg, skill_reader="student", actor="student", lam=0.0), [
        *tokenizer.convert_tokens_to_ids([*sokoban_env.MOVES])]

    @cache
    def prompt(task):
        return skill_sd.Chat(tokenizer).prompt("", world.make_env(task).reset())

    def play(skills=None):
        generator = torch.Generator(model.device).manual_seed(k)
        return skill_sd.rollout(model, tokenizer, [world.make_env(task) for task in tasks], reader,
                                skills, generator)
    first, bank = play(), SkillBank(1.0)
    groups = [first[i:i + group] for i in range(0, len(first), group)]
    best = [max(each, key=lambda t: (t.reward, -t.turns)) for each in groups]
    for t in best:
        bank.add(t.task_id, Skill(**sokoban_env.analyse(t.messages)), t.reward)
    states = [state for t in first for state in looked_at(t)]
    adv = skill_sd.group_advantages([t.reward for t in first], group).to(model.device)
    weights, solved = list(model.parameters()), [t.reward == 1 for t in first]

    def gradient(loss):
        grads = torch.autograd.grad(loss, weights, retain_graph=True)
        return torch.cat([g.flatten() for g in grads])
    print(f"after {k} iterations: solves {100 * np.mean(solved):.1f} % without a skill; skills "
          f"from a success: {100 * np.mean([t.reward == 1 for t in best]):.0f} %")
    with torch.enable_grad():
        logp, mask, logps = response_logps(model, first, cfg)
        old, p = logp.detach(), logps[:, moves].detach().exp()
        pg = gradient(skill_sd.grpo_loss(logp, old, adv, mask, cfg.clip_low, cfg.clip_high))
        for kind, skills in skills_of(best, bank, model, prompt, cfg, k).items():
            played = play([skill for skill in skills for _ in range(group)])
            for t, shown in zip(first, played):
                t.skill_prompt = shown.skill_prompt
            with torch.no_grad():
                teacher, _, shown = response_logps(model, first, cfg, with_skill=True)
            sdl, q = gradient(skill_sd.sdl_loss(logp, teacher, old, mask)), shown[:, moves].exp()
            kl = (p * (p / q).log()).sum(1)
            told = [set(re.findall(r"push (\w+)", skill.golden_workflow)) for skill in skills]
            told = np.repeat(np.repeat(told, group), [t.turns for t in first])
            lead = {True: [], False: []}
            for (good, level, boxes), words, here, there in zip(states, told, p, q):
                if good:                       # else the room is lost
                    lead[bool(words) and sokoban_env.fits(level, boxes, words)].append(
                        (there[good].sum() - here[good].sum()).item())
            fit, other = (f"{100 * np.mean(x):6.1f}" if x else "     -" for x in lead.values())
            print(f"  {kind:<10} solves {100 * np.mean([t.reward == 1 for t in played]):5.1f} %   "
                  f"signal {100 * (kl > 0.05).float().mean():3.0f} %   lead {fit} at the "
                  f"{100 * len(lead[True]) / len(states):3.0f} % that fit, {other} else   gradient "
                  f"{cfg.lam * sdl.norm() / max(pg.norm(), 1e-9):7.3f}, "
                  f"cosine {torch.cosine_similarity(pg, sdl, dim=0):6.3f}", flush=True)
    return dict(sampled=solved, greedy=solved)


def main():
    typed = skill_sd.parse_args()
    cfg = skill_sd.configure(typed, typed.get("method", "skill_sd"), typed.get("seed", 0))
    with tempfile.TemporaryDirectory() as folder:
        warm = sokoban_env.player_folder(cfg, skill_sd.SKILL_TEXT)
        if warm.exists():
            (Path(folder) / warm.name).symlink_to(warm.resolve())
        skill_sd.evaluate = look
        skill_sd.train(replace(cfg, out=folder))


if __name__ == "__main__":
    main()
