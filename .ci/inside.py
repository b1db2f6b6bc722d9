# SPDX-License-Identifier: MIT
"""What the teacher of the demo knows that its student does not, over a run that is trained anew.

    python .ci/inside.py --evals 4 [--preset scarce] [settings of skill_sd.py]      five points

For three kinds of skill, at the states that the student visits under the plain prompt: how often
the student solves a level when it reads the skill itself; KL(student || teacher) a turn; the share
of the sampled tokens in groups with spread where SDL pushes as the reward does, sign(-l) = sign(A);
the contrast, mean -l of the best moves less that of the others; mean |l| at turns 1, 2, ...; and
SDL's gradient: its norm times lambda over that of GRPO's, and the cosine of the two."""
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


def best_moves(t):
    """The best moves at every turn of a trajectory."""
    rooms = [sokoban_env.room_in(m["content"]) for m in t.messages[::2]][:t.turns]
    table = sokoban_env.distances(rooms[0])
    return [sokoban_env.best_moves(rooms[0], room.player, room.boxes, table) for room in rooms]


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

    def words(with_skill):
        with torch.no_grad():
            return vocabulary(model, first, cfg, with_skill)                         # (turns, V)

    first = play()
    solved = [t.reward == 1 for t in first]
    best = [max(first[i:i + group], key=lambda t: (t.reward, -t.turns))
            for i in range(0, len(first), group)]
    print(f"after {k} iterations: solves {100 * np.mean(solved):.1f} % without a skill; skills "
          f"from a success: {100 * np.mean([t.reward == 1 for t in best]):.0f} %")
    own = [Skill(**sokoban_env.analyse(t.messages)) for t in best]
    kinds = {"own": own, "another's": own[1:] + own[:1], "empty": [Skill("", "", "")] * len(own)}
    good = []                                  # whether each token sampled is a best move
    for t in first:
        for best_here, y in zip(best_moves(t), np.array(t.ids)[t.mask]):
            good.append(y in moves and moves.index(y) in best_here)
    good = np.array(good)
    turn = np.concatenate([np.arange(t.turns) for t in first])
    adv = skill_sd.group_advantages([t.reward for t in first], group).to(model.device)
    logp, mask = response_logps(model, first, cfg)
    a = adv[:, None].expand_as(mask)[mask].cpu().numpy()
    old, p = logp.detach(), words(with_skill=False)
    pg = gradient(skill_sd.grpo_loss(logp, old, adv, mask, cfg.clip_low, cfg.clip_high))
    for kind, skills in kinds.items():
        played = play([skill for skill in skills for _ in range(group)])
        for t, shown in zip(first, played):
            t.skill_prompt = shown.skill_prompt
        q = words(with_skill=True)
        taught = skill_sd.score(model, first, cfg)
        l = (old - taught)[mask].cpu().numpy()
        told = (a != 0) & (abs(l) > 0.01)
        agrees = np.mean(np.sign(-l) == np.sign(a), where=told)
        contrast = np.mean(-l[good]) - np.mean(-l[~good])
        turns = " ".join(f"{np.mean(abs(l[turn == i])):.2f}" for i in range(0, 12, 2))
        sdl = gradient(skill_sd.sdl_loss(logp, taught, old, mask))
        print(f"  {kind:<10} solves {100 * np.mean([t.reward == 1 for t in played]):5.1f} %   KL "
              f"{(p.exp() * (p - q)).sum(1).mean():.4f}   agrees {100 * agrees:3.0f} %   contrast "
              f"{contrast:5.2f}   |l| at turns 1, 3, ..: {turns}   gradient "
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
