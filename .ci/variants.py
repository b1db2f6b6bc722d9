# SPDX-License-Identifier: MIT
"""What was tried and is not the method: each variant replaces one function of skill_sd.py.

    python .ci/variants.py NAME[,NAME] [settings of skill_sd.py]

    nearest        a task without skills borrows from the nearest task (with --method borrowed)
    random_pick    the bank picks a random skill of the task, not the one of UCB
    newest         the bank picks the newest skill of the task
    ucb            none; it tells how often UCB decided, and between what
    failures       a task whose bank holds successes only gets a failure's skill beside them
    exact          SDL is the KL over the whole vocabulary, not its estimate by sampled tokens
    falling        lambda falls to 0 at half of the run

The table is that of skill_sd.py. The runs are in runs/variants/NAME; --out X: X/variants/NAME.
"""
import atexit
import sys
from contextlib import closing, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd
from skill_sd import SkillBank, begin, iteration, shown_skills, update

select = SkillBank.select


def nearest(world, state, cfg):
    """By the cosine of the student's mean hidden states over the plain prompts, less their mean
    over the bank: what all prompts share would drown the rest."""
    student, chat = state.student, skill_sd.Chat(state.tokenizer, cfg.prefill)

    @cache
    def prompt(task):
        with closing(world.make_env(task)) as env:
            ids = chat.prompt(env.system_prompt, env.reset())
        return torch.tensor([ids], device=student.device)                            # (1, L)

    @torch.no_grad()
    def mean_hidden(task):
        with skill_sd.autocast(student, cfg):
            hidden = student.base_model(input_ids=prompt(task), use_cache=False).last_hidden_state
        return hidden[0].float().mean(0)                                             # (H,)

    def shown(picks, bank, cfg, k):
        poor, lenders = [task for task in picks if not picks[task]], list(bank.entries)
        if cfg.borrow and poor and lenders:
            x = torch.stack([mean_hidden(task) for task in lenders + poor])          # (B, H)
            x = F.normalize(x - x[:len(lenders)].mean(0), dim=1)
            cosines = x[len(lenders):] @ x[:len(lenders)].T
            lent = [bank.select(lenders[i]) for i in cosines.argmax(1)]
            picks = picks | dict(zip(poor, lent))
        return shown_skills(picks, bank, cfg, k)
    skill_sd.shown_skills = shown


def random_pick(world, state, cfg):
    def pick(bank, task):
        entries = bank.entries.get(task, [None])
        picks = sum(e["picks"] for e in entries if e)          # an interrupted run draws the same
        return entries[skill_sd.derived_seed(cfg.seed, task, picks) % len(entries)]
    SkillBank.select = pick


def newest(world, state, cfg):
    def pick(bank, task):
        return bank.entries.get(task, [None])[-1]
    SkillBank.select = pick


def ucb(world, state, cfg):
    seen = []

    def counting(bank, task):
        tried = [e["picks"] > 0 for e in bank.entries.get(task, [])]
        if tried:
            seen.append(len(tried) > 1 and all(tried))
        return select(bank, task)
    SkillBank.select = counting

    def tell():
        if not seen:                           # as after a look inside
            return
        banks = list(state.bank.entries.values())
        tried = [[e["reward_sum"] / e["picks"] for e in bank if e["picks"]] for bank in banks]
        apart = [max(means) - min(means) for means in tried if len(means) > 1]
        print(f"{cfg.method}, seed {cfg.seed}: UCB decided {sum(seen)} of {len(seen)} picks; "
              f"{sum(len(bank) > 1 for bank in banks)} of {len(banks)} tasks have several skills, "
              f"whose mean rewards lie {sum(apart) / max(1, len(apart)):.2f} apart")
    atexit.register(tell)


def failures(world, state, cfg):
    micro_batches, summarize = skill_sd.micro_batches, skill_sd.summarize
    batch = []

    def remember(episodes, max_tokens):
        batch[:] = episodes
        return micro_batches(episodes, max_tokens)

    def with_failures(chosen, state, world, cfg):
        rewards = {t.task_id: [t.reward] for t in chosen}
        for x in {t.task_id: None for t in batch}:
            held = [e["source_reward"] for e in state.bank.entries.get(x, [])]
            held += rewards.get(x, [])
            failed = [t for t in batch if t.task_id == x and t.reward < 1]
            if failed and held and min(held) == 1:
                chosen.append(failed[0])       # in place: `iteration` counts them
        return summarize(chosen, state, world, cfg)
    skill_sd.micro_batches, skill_sd.summarize = remember, with_failures


def vocabulary(model, part, cfg, with_skill=False):
    """The log-probs (n, V) of all words where `response_logps` reads those of n action tokens."""
    seen = []
    with model.register_forward_hook(lambda model, args, out: seen.append(out.logits)):
        skill_sd.response_logps(model, part, cfg, with_skill)
    return (seen[0].float() / cfg.temperature).log_softmax(-1)


def exact(world, state, cfg):
    def exact_update(student, optimizer, parts, teacher_logps, cfg):
        coming = iter(parts * cfg.updates_per_iteration)       # `update` takes them in this order

        def kl(logp, logp_teacher, logp_old, mask, n):
            part = next(coming)
            p = vocabulary(student, part, cfg)
            with torch.no_grad():
                q = vocabulary(state.teacher, part, cfg, with_skill=True)
            return (p.exp() * (p - q)).sum() / n
        skill_sd.sdl_loss = kl
        return update(student, optimizer, parts, teacher_logps, cfg)
    skill_sd.update = exact_update


def falling(world, state, cfg):
    def with_less(k, state, tasks, world, cfg):
        left = max(0.0, 1 - 2 * k / cfg.iterations)
        return iteration(k, state, tasks, world,
                         replace(cfg, method="skill_sd", lam=cfg.lam * left))
    skill_sd.iteration = with_less


def main():
    variants = dict(nearest=nearest, random_pick=random_pick, newest=newest, exact=exact,
                    falling=falling, ucb=ucb, failures=failures)
    names = sys.argv[1].split(",") if len(sys.argv) > 1 else []
    if not names or not {*names} <= {*variants}:
        sys.exit(f"usage: variants.py {'|'.join(variants)} [settings of skill_sd.py]")
    name = sys.argv.pop(1)
    out = Path(skill_sd.Config.parse_args().get("out", "runs"))
    folder = out / "variants" / name
    folder.mkdir(parents=True, exist_ok=True)
    for warm in out.glob("warm-start-????????????"):           # those that are there are shared
        link = folder / warm.name
        with suppress(OSError):                # another process may do the same
            if not link.exists():              # or leads nowhere by now
                link.unlink(missing_ok=True)
                link.symlink_to(warm.resolve())
    sys.argv += ["--out", str(folder)]                         # the last --out counts

    def begin_variant(cfg):
        world, state = begin(cfg)
        for name in names:
            variants[name](world, state, cfg)
        return world, state
    skill_sd.begin = begin_variant
    skill_sd.main()


if __name__ == "__main__":
    main()
