# SPDX-License-Identifier: MIT
"""What the teacher of a run of the demo knows that its student does not, before and after training.

    python .ci/inside.py RUN_FOLDER
"""
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd
import sokoban_env
from skill_sd import Skill, response_logps, rollout


@torch.no_grad()
def move_probs(model, tokenizer, t, prompt):
    """The probabilities of the four moves at every turn of a trajectory, (turns, 4)."""
    before = torch.tensor([False] * (len(prompt) - 1) + t.mask)  # the logits before each answer
    logits = model(torch.tensor([prompt + t.ids], device=model.device)).logits[0, :-1].cpu()
    return logits[before].softmax(-1)[:, tokenizer.convert_tokens_to_ids([*sokoban_env.MOVES])]


def inside(model, tokenizer, world, cfg, n=128):
    """Print how a model plays with skills and, at the states that it visits under the plain prompt,
    what it would do with the skill from its own best attempt: split by where the state lies."""
    tasks = [task for task in world.train[::max(1, len(world.train) // n)] for _ in range(8)]

    def play(name, skills=None):
        generator = torch.Generator(model.device).manual_seed(
            sokoban_env.derived_seed("inside", skills is not None))
        played = rollout(model, tokenizer, [world.make_env(task) for task in tasks],
                         replace(cfg, skill_reader="student", lam=0.0), skills, generator)
        print(f"solved {name}: {100 * np.mean([t.reward == 1 for t in played]):.1f} %")
        return played

    first = play("under the plain prompt")
    groups = [first[i:i + 8] for i in range(0, len(first), 8)]
    best = [max(group, key=lambda t: (t.reward, -t.turns)) for group in groups]
    own = [Skill(**sokoban_env.analyse(t.messages)) for t in best for _ in range(8)]
    for t, shown in zip(first, play("with its own skill", own)):
        t.skill_prompt = shown.skill_prompt
    play("with another task's", own[8:] + own[:8])
    play("with an empty skill", [Skill("", "", "")] * len(own))

    part, weights = first[:256], list(model.parameters())
    adv = skill_sd.group_advantages([t.reward for t in part], 8).to(model.device)
    (logp, mask, _), (teacher, *_) = (response_logps(model, part, cfg, shown) for shown in (0, 1))
    old, teacher = logp.detach(), teacher.detach()
    pg, sdl = (torch.cat([g.flatten() for g in torch.autograd.grad(
        loss, weights, retain_graph=True)]) for loss in (
            skill_sd.grpo_loss(logp, old, adv, mask, cfg.clip_low, cfg.clip_high),
            skill_sd.sdl_loss(logp, teacher, old, mask)))
    print(f"gradients: norm of GRPO's {pg.norm():.3f}, of SDL's {sdl.norm():.3f}, "
          f"cosine {torch.cosine_similarity(pg, sdl, dim=0):.3f}")

    found = {}                                 # (skill from a success, where): probabilities
    for group, note in zip(groups, best):
        level = sokoban_env.room_in(note.messages[0]["content"])
        table = sokoban_env.distances(level)
        told = set(re.findall(r"push (\w+)", sokoban_env.analyse(note.messages)["golden_workflow"]))
        for t in group:
            rooms = [sokoban_env.room_in(m["content"]) for m in t.messages[::2]]
            for room, p, q in zip(rooms, move_probs(model, tokenizer, t, t.prompt),
                                  move_probs(model, tokenizer, t, t.skill_prompt)):
                good = sokoban_env.best_moves(level, room.player, room.boxes, table)
                where = "lost" if not good else (
                    "notes fit" if sokoban_env.fits(level, room.boxes, told) else "they do not")
                found.setdefault((note.reward == 1, where), []).append(
                    (p[good].sum(), q[good].sum(), (p * (p / q).log()).sum()))
    kl = torch.tensor([row[2] for rows in found.values() for row in rows])
    share = 100 * (kl > 0.05).float().mean()
    print(f"states with a signal, KL(student || teacher) above 0.05: {share:.0f} %")
    print("skill from   state          share   on best moves: student teacher   KL")
    for (solved, where), rows in sorted(found.items(), reverse=True):
        p, q, mean = torch.tensor(rows).mean(0)
        print(f"{'a success' if solved else 'a failure':<13}{where:<13}{len(rows) / len(kl):7.3f}"
              f"{p:24.3f}{q:8.3f}{mean:7.3f}")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    run = Path(sys.argv[1]).resolve()          # the warm start is kept beside it
    settings = json.loads((run / "student" / "skill_sd.json").read_text())
    cfg = skill_sd.Config(**settings | dict(out=str(run.parent), actor="student"))
    world = sokoban_env.make_world(cfg)
    for name, model in (("warm start", "tiny"), ("trained", str(run / "student"))):
        print(f"\n{name}")
        inside(*skill_sd.load_model(replace(cfg, model=model), world), world, cfg)


if __name__ == "__main__":
    main()
