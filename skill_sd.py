# SPDX-License-Identifier: MIT
"""Skill-SD in one file, to be read beside the paper: https://arxiv.org/abs/2604.10674

A student plays tasks over many turns with a plain prompt. Its finished trajectories become short
skills. Only a teacher - the same network, synchronised every iteration - reads one, and re-scores
the tokens that the student sampled. GRPO's reward loss plus an importance-weighted reverse KL to
that teacher trains the student, which never sees a skill. One iteration:

    in the paper                                           in this file      in test_skill_sd.py
    1. theta_old <- theta; theta-bar <- theta              iteration         test_sync_teacher
    2. S(x) <- UCB over B(x), the skills of x              SkillBank         test_ucb_by_hand
       tau_1 .. tau_G ~ pi_theta_old(. | x)                rollout           test_sampling_equals_*
    3. A_i = (R_i - mean(R)) / (std(R) + eps)              group_advantages  test_advantages_*
    4. log pi_theta-bar(y_t | x + S(x), y_<t)              score             test_rescoring_*
    5. Eq. 10: L_GRPO = -1/N sum min(r A, clip(r) A)       grpo_loss         test_grpo_*
       Eq. 11: l = log pi(y | x) - log pi-bar(y | x + S)   sdl_loss          test_sdl_*
       Eq. 12: rho = pi_theta(y) / pi_theta_old(y)
       Eq. 13: L_SDL = 1/N sum rho (exp(-l) - 1 + l)
       Eq. 14: minimise L = L_GRPO + lambda L_SDL          update            test_update_*
    6. Analyze(tau, x) enters B(x); picks are credited     summarize         test_parse_skill_*

Part I is the method, to `iteration`; Part II prompts, forward passes, rollout and summarizer; Part
III settings, runs and table. `python skill_sd.py` runs the demo, whose game and tiny player are in
sokoban_env.py. CHOICE: no public text says it. DEVIATION: we differ. Needs: names to copy along.
"""
import copy
import inspect
import json
import math
import os
import random
import re
import sys
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache,
                          GenerationConfig)
from transformers.modeling_layers import GradientCheckpointingLayer

import sokoban_env
from sokoban_env import UserError, ask, derived_seed, load, not_lost, require, save


# ==== Part I: the method ==========================================================================
@dataclass
class Method:
    """`cfg`, with what Config adds in Part III. Comments are help texts; values fit the demo."""
    iterations: int = 60             # the paper runs 180 on Sokoban                    DEVIATION
    tasks_per_iteration: int = 16    # the tasks of a batch                             CHOICE
    group_size: int = 8              # G, rollouts per task                             CHOICE
    temperature: float = 1.0         # of sampling and of scoring alike                 CHOICE
    lam: float = 0.1                 # lambda, weight of SDL; paper: 0.001 (AppWorld)   DEVIATION
    clip_low: float = 0.2            # eps_l; 0.2 and 0.28 are reported second-hand     CHOICE
    clip_high: float = 0.28          # eps_h                                            CHOICE
    updates_per_iteration: int = 1   # optimiser steps on each batch; 1 never clips     CHOICE
    lr: float = 1e-3                 # of Adam; 1e-6 is usual for billions of weights   CHOICE
    adam_eps: float = 1e-8           # larger: tiny gradients make smaller steps        CHOICE
    max_grad_norm: float = 1.0       # gradients are clipped to this norm               CHOICE
    ucb_c: float = 1.0               # c, weight of exploration in UCB                  CHOICE
    bank_size: int = 4               # skills kept per task                             CHOICE
    # What METHODS, in Part III, sets for ablations, controls and our own additions:
    reward_weight: float = 1.0       # weight of the GRPO loss; 0 leaves SDL alone (OPD)
    sync_every: int = 1              # iterations between teacher synchronisations; 0: never
    actor: Literal["student", "teacher"] = "student"  # who samples; a teacher reads its skill
    skill_reader: Literal["teacher", "student", "nobody"] = "teacher"  # the last two need lam = 0
    skill_shown: Literal["own", "other", "empty"] = "own"  # or another task's, or headings only
    borrow: Literal[0, 1] = 0        # 1: a task without skills is shown another's   DEVIATION


# ---- Skills, and the bank B(x) of each task x ----------------------------------------------------
@dataclass(frozen=True)
class Skill:
    """What one finished trajectory teaches, in the paper's three fields. Needs: dataclass."""
    success_analysis: str
    mistake_analysis: str
    golden_workflow: str


SKILL_TEXT = """Notes from an earlier attempt at this task
What worked: {success_analysis}
Mistakes: {mistake_analysis}
Workflow: {golden_workflow}"""                       # S(x) as the teacher reads it; CHOICE


class SkillBank:
    """entries: {x: B(x)}. An entry of B(x) has its skill, n(e) as `picks`, reward_sum, and the
    source_reward of the trajectory that it was written from. The credited reward was earned without
    the skill, which the student does not see: UCB's statistic is a lagging proxy. Needs: math."""
    def __init__(self, c, size=4):
        self.c, self.size, self.entries = c, size, {}

    def select(self, task_id):
        """The entry with the highest UCB score, the oldest of several; None without skills."""
        entries = self.entries.get(task_id, [])
        n_ucb = sum(e["picks"] for e in entries)               # DEVIATION: of skills still held
        def ucb(e):
            if e["picks"] == 0:
                return math.inf                                # untried skills go first
            mean_reward = e["reward_sum"] / e["picks"]
            return mean_reward + self.c * math.sqrt(math.log(n_ucb) / e["picks"])
        return max(entries, key=ucb, default=None)

    def credit(self, entry, reward):
        """Count a pick, and the mean reward (CHOICE) of the group that was played then."""
        assert math.isfinite(reward), f"reward={reward}: leave lost episodes out"
        entry["picks"] += 1
        entry["reward_sum"] += float(reward)

    def wants(self, task_id, source_reward):
        """CHOICE: a skill may enter if its trajectory beats those of all held ones, or if all were
        picked twice. If every visit added one, untried ones would go first; UCB never decided."""
        entries = self.entries.get(task_id, [])
        better = all(source_reward > e["source_reward"] for e in entries)
        return better or all(e["picks"] >= 2 for e in entries)

    def add(self, task_id, skill, source_reward=0.0):
        """Insert a skill, unless it is there. CHOICE: in a full bank the worst tried one leaves."""
        assert math.isfinite(source_reward), f"source_reward={source_reward}: leave it out"
        entries = self.entries.setdefault(task_id, [])
        if any(e["skill"] == skill for e in entries):
            return
        def mean_reward(e):
            return e["reward_sum"] / e["picks"] if e["picks"] else math.inf
        if len(entries) >= self.size:
            entries.remove(min(entries, key=mean_reward))
        entries.append(dict(skill=skill, picks=0, reward_sum=0.0,
                            source_reward=float(source_reward)))


@dataclass
class Trajectory:
    """One episode tau_i of a task x. Its ids are the same under both prompts. Two actions, a of two
    tokens and b of one, with an observation o of two tokens between them:
        prompt, what the student reads          x         a a o o b    ids
        skill_prompt, what the teacher reads    x + S(x)  a a o o b    ids
                                                          1 1 0 0 1    mask: sampled by the actor"""
    task_id: str
    skill: Skill | None              # S(x)
    prompt: list                     # token ids
    skill_prompt: list               # without a skill the same as `prompt`
    messages: list                   # the conversation as text
    ids: list = field(default_factory=list)
    mask: list = field(default_factory=list)      # of bool
    logps: list = field(default_factory=list)     # when sampled; for the log only, see `update`
    turns: int = 0
    counts: dict = field(default_factory=dict)    # of cut answers and the like, for the log
    reward: float = math.nan         # R_i, the completion rate in [0, 1]; nan: the episode was lost
    adv: float = 0.0                 # A_i


# ---- The losses: pure functions of tensors (B, T), to be lifted into any trainer -----------------
# Compute logp_student and logp_old with dropout off, else rho is not 1 at theta_old.
def token_mean(values, mask, n=None):
    """1/N sum of values (B, T) over the N tokens where mask is set. For a part of a batch, pass the
    whole batch's N as `n`: then values and gradients of the parts add up. Needs: torch."""
    if n is None:
        n = mask.sum().clamp(min=1)
    return torch.where(mask.bool(), values, 0.0).sum() / n


def group_advantages(rewards, group_size, eps=1e-6):
    """A_i = (R_i - mean(R)) / (std(R) + eps) over each group of consecutive rollouts of one task.
    rewards: (n,), nan where an episode was lost. CHOICE: population std, eps. Returns (n,) float32,
    exactly 0 for nan, for equal rewards and in a group of one. Needs: torch."""
    assert len(rewards) % group_size == 0, f"{len(rewards)} rewards: no multiple of {group_size=}"
    r = torch.as_tensor(rewards, dtype=torch.float64).view(-1, group_size)           # (tasks, G)
    r = r - r.nanmedian(1, keepdim=True).values                # equal rewards become exact zeros
    deviation = r - r.nanmean(1, keepdim=True)
    std = deviation.square().nanmean(1, keepdim=True).sqrt()
    return (deviation / (std + eps)).nan_to_num(0.0).flatten().float()


def grpo_loss(logp_student, logp_old, adv, mask, clip_low, clip_high, n=None):
    """-1/N sum min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), without a KL to a reference.
    adv: (B,), the others (B, T). Padding may hold anything. Needs: torch, token_mean."""
    if not logp_student.shape == logp_old.shape == mask.shape == (*adv.shape, mask.shape[-1]):
        raise ValueError(f"logp_student {logp_student.shape}, logp_old {logp_old.shape} and mask "
                         f"{mask.shape} must be (B, T), adv {adv.shape} (B,)")
    log_ratio = torch.where(mask.bool(), logp_student - logp_old, 0.0)
    ratio = log_ratio.clamp(max=20).exp()                      # r. CHOICE: at most e^20
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    adv = adv[:, None]                                         # (B, 1)
    return -token_mean(torch.minimum(ratio * adv, clipped * adv), mask, n)           # Eq. 10


def sdl_loss(logp_student, logp_teacher, logp_old, mask, n=None):
    """1/N sum rho * k3, k3 = exp(-l) - 1 + l: the importance-weighted reverse KL to the teacher.
    All (B, T), else ValueError; padding may hold anything. For tokens that pi_old sampled, the
    expected gradient at a fixed prefix is that of KL(student || teacher), for every theta, as rho
    is differentiated too (detached, it would be that of KL(teacher || student) at theta_old):
        d(rho * k3) / dlogp_student = rho * l
    Example, rho = 1 and l = -1, 0, 1: loss (0.718 + 0 + 0.368) / 3, gradient [-1/3, 0, 1/3].
    Returns float64, as exp(-l) soon overflows float32. Needs: torch, token_mean."""
    if len({x.shape for x in (logp_student, logp_teacher, logp_old, mask)}) > 1 or mask.dim() != 2:
        raise ValueError(f"logp_student {logp_student.shape}, logp_teacher {logp_teacher.shape}, "
                         f"logp_old {logp_old.shape} and mask {mask.shape} must all be (B, T)")
    logp = logp_student.detach().double()
    l = torch.where(mask.bool(), logp - logp_teacher.detach(), 0.0)                  # Eq. 11
    log_rho = torch.where(mask.bool(), logp - logp_old.detach(), 0.0)
    rho = log_rho.clamp(max=20).exp()                          # Eq. 12. CHOICE: at most e^20
    k3 = torch.expm1(-l) + l                                   # exp(-l) - 1 + l, accurate near 0
    # Autograd would take the gradient, rho * l, as a difference of numbers of size exp(-l). So the
    # value is detached, and the gradient is written out, times a term of value 0 and slope 1.
    zero = logp_student - logp_student.detach()
    return token_mean(rho * k3 + rho * l * zero, mask, n)                            # Eq. 13


# ---- Scoring and updating ------------------------------------------------------------------------
def response_logps(model, part, cfg, with_skill=False):
    """(logp, mask), (B, T) each, of the action tokens y_t of B trajectories: log pi(y_t | x, y_<t),
    or log pi(y_t | x + S(x), y_<t). Column j is the j-th action token under either prompt. Needs:
    torch, cross_entropy, pad_sequence, logits_at, autocast, cfg.temperature and .precision."""
    rows, masks = [], []
    for t in part:
        prompt = t.skill_prompt if with_skill else t.prompt
        rows.append(torch.tensor(prompt + t.ids))
        masks.append(torch.tensor([False] * len(prompt) + t.mask))
    ids = pad_sequence(rows, True).to(model.device)                                  # (B, L)
    action = pad_sequence(masks, True).to(model.device)                              # (B, L)
    before = action.roll(-1, dims=1)           # a token's logits stand one column before it
    with logits_at(before, model), autocast(model, cfg):       # only those; causal: no padding seen
        logits = model(input_ids=ids, use_cache=False).logits.float()      # (action.sum(), V)
    logp = -cross_entropy(logits / cfg.temperature, ids[action], reduction="none")
    counts = action.sum(1)                                                           # (B,)
    logp = pad_sequence(logp.split(counts.tolist()), True)                           # (B, T)
    mask = torch.arange(logp.shape[1], device=logp.device) < counts[:, None]         # of tokens
    return logp, mask


@torch.no_grad()
def score(teacher, part, cfg):
    """The teacher's log-probs (B, T) of the action tokens under x + S(x). Needs: response_logps."""
    teacher.eval()
    return response_logps(teacher, part, cfg, with_skill=True)[0]


def update(student, optimizer, parts, teacher_logps, cfg):
    """Minimise Eq. 14 over parts, lists of trajectories; teacher_logps: one (B, T) each, or none if
    lam is 0. Returns metrics of the last step. In the first one, r = rho = 1, and the gradient of L
    is -1/N sum (A_i - lambda l_it) grad log pi(y_it): SDL is a reward of -lambda l per token."""
    update_mode(student, cfg)                  # dropout off, as when sampling
    n_mine = sum(sum(t.mask) for part in parts for t in part)
    n_tokens = np.mean(gather(n_mine))         # N / processes, as average_gradients divides too
    reads_skill = cfg.skill_reader == "student"                # an ablation
    old_logps = []
    for step in range(cfg.updates_per_iteration):
        optimizer.zero_grad()
        metrics = defaultdict(float)
        for i, part in enumerate(parts):
            logp, mask = response_logps(student, part, cfg, with_skill=reads_skill)
            if step == 0:                      # log pi_theta_old. DEVIATION: anew, not t.logps
                old_logps.append(logp.detach())
            adv = torch.tensor([t.adv for t in part], device=logp.device)            # (B,)
            pg = grpo_loss(logp, old_logps[i], adv, mask, cfg.clip_low, cfg.clip_high, n_tokens)
            sdl = 0.0
            if teacher_logps:
                sdl = sdl_loss(logp, teacher_logps[i], old_logps[i], mask, n_tokens)
                metrics["sdl_loss"] += sdl.item()
                l = logp.detach() - teacher_logps[i]
                metrics["log_ratio"] += token_mean(l, mask, n_tokens).item()
            loss = cfg.reward_weight * pg + cfg.lam * sdl      # Eq. 14: L = L_GRPO + lambda L_SDL
            loss.backward()                    # gradients add up over the parts
            metrics["pg_loss"] += pg.item()
            measure(metrics, part, logp.detach(), old_logps[i], adv, mask, n_tokens, cfg)
        average_gradients(student)             # over the processes
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.max_grad_norm)
        metrics["grad_norm"] = norm.item()
        require(math.isfinite(sum(metrics.values())), f"{dict(metrics)}: lower lr or lam")
        optimizer.step()
    optimizer.zero_grad()                      # free the gradients for the next rollout
    return dict(metrics)


# ---- The algorithm -------------------------------------------------------------------------------
@dataclass
class State:
    """What one iteration hands on to the next. The generator's device is the student's."""
    student: torch.nn.Module
    teacher: torch.nn.Module
    optimizer: object                # torch.optim.Adam
    bank: SkillBank
    tokenizer: object                # of the transformers library
    generator: object                # torch.Generator


def iteration(k, state, tasks, world, cfg):
    """Iteration k on distinct tasks x; world.make_env(x): see rollout. Gives episodes, metrics."""
    student, teacher, bank = state.student, state.teacher, state.bank
    # 1. theta-bar <- theta. theta_old needs no copy: its log-probs are taken before theta changes
    if cfg.sync_every and k % cfg.sync_every == 0:
        teacher.load_state_dict(student.state_dict())

    # 2. S(x) <- UCB(B(x)); G trajectories of each task, by theta_old under the plain prompt. The
    # skills only become t.skill_prompt, which the teacher reads in 4 (in ablations, the actor)
    picks = {x: bank.select(x) for x in tasks}                 # None while B(x) is empty
    skills = shown_skills(picks, bank, cfg, k)                 # {x: S(x)}; other texts in controls
    xs = [x for x in tasks for _ in range(cfg.group_size)]     # each task G times
    actor = teacher if cfg.actor == "teacher" else student     # the student, but for an ablation
    episodes = rollout(actor, state.tokenizer, [world.make_env(x) for x in xs], cfg,
                       [skills[x] for x in xs], state.generator)
    assert [t.task_id for t in episodes] == xs, "make_env(x).task_id must be x"

    # 3. rewards, group advantages. CHOICE: lost episodes (nan) are left out of all that follows
    advantages = group_advantages([t.reward for t in episodes], cfg.group_size)
    for t, adv in zip(episodes, advantages.tolist()):
        t.adv = adv
    batch = not_lost(episodes, cfg.max_context)

    # 4. the teacher re-scores the same tokens under x + S(x)
    parts = micro_batches(batch, cfg.micro_batch_tokens)
    teacher_logps = []
    if cfg.lam > 0:
        teacher_logps = [score(teacher, part, cfg) for part in parts]

    # 5. minimise L over these tokens
    metrics = update(student, state.optimizer, parts, teacher_logps, cfg)

    # 6. credit the picks; Analyze(tau, x) of each group's best, then shortest (CHOICE) enters B(x)
    chosen = []
    for x in tasks:
        group = [t for t in batch if t.task_id == x]
        if group and picks[x]:
            bank.credit(picks[x], np.mean([t.reward for t in group]))
        best = max(group, key=lambda t: (t.reward, -t.turns), default=None)
        if best and bank.wants(x, best.reward) and cfg.skill_reader != "nobody":
            chosen.append(best)
    written = summarize(chosen, state, world, cfg)
    for t, skill in written:
        bank.add(t.task_id, skill, t.reward)
    metrics["skills_written"] = len(written)
    metrics["skills_failed"] = len(chosen) - len(written)
    return episodes, metrics


# ==== Part II: the engine =========================================================================
# ---- Two prompts, one token sequence: conversations as ids ---------------------------------------
class Chat:
    """Renders conversations to token ids, with the texts of the chat template between contents:
        before_system SYSTEM before_user TASK opening ANSWER after_answer OBSERVATION opening ...
    Sampled ids are never tokenised again. System prompts and prefills are trusted; tasks,
    observations and skills are not. Needs: re, asdict, SKILL_TEXT, UserError, a fast tokenizer."""
    def __init__(self, tokenizer, prefill="", max_skill_tokens=256):
        self.tokenizer, self.max_skill_tokens = tokenizer, max_skill_tokens
        self.backend = tokenizer.backend_tokenizer             # a few times faster than `encode`
        self.backend.no_truncation()
        self.backend.no_padding()
        try:
            pieces = self.cut("system", "user", "assistant", "user")
            self.before_system, self.before_user = pieces[:2]
        except UserError:                      # no system role: its text goes above the task
            pieces = self.cut("user", "assistant", "user")
            self.before_system, self.before_user = None, pieces[0]
        self.after_answer, generation_prompt = pieces[-2:]
        self.opening = generation_prompt + prefill
        self.prefill = prefill                 # what every answer begins with, unsampled
        if generation_prompt.rstrip().endswith("<think>"):
            self.prefill = "<think>" + prefill
        self.n_letter = len(self.ids("a"))
        self.end_ids = self.encode(self.after_answer)
        added = tokenizer.get_added_vocab()
        self.eos_ids = {tokenizer.eos_token_id}
        if self.end_ids and self.end_ids[0] in added.values():
            self.eos_ids.add(self.end_ids[0])  # the template's own token that ends a turn
        # Runs of blanks, and single characters, do no harm.
        self.control = {i for token, i in added.items() if len(token.strip(" \t\r\n\u2581")) > 1}

    def cut(self, *roles):
        """The template's texts before, between and after the contents of a conversation."""
        marks = [f"\t\t\u00a7{role} {i}\u00a7\t\t" for i, role in enumerate(roles)]
        chat = [{"role": role, "content": mark} for role, mark in zip(roles, marks)]
        text, reason = "", "a text is changed or lost"
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=0, add_generation_prompt=True)
        except Exception as error:             # a template may raise anything
            reason = error
        for i, mark in enumerate(marks):       # some templates trim contents, others do not
            if mark not in text:
                marks[i] = mark.strip()
        self.trim = str if marks[-1][0] == "\t" else str.strip
        any_mark = "|".join(marks)
        pieces = re.split(any_mark, text)
        complete = re.findall(any_mark, text) == marks and "\t\t" not in "".join(pieces)
        # The generation prompt may extend an old answer's header, e.g. by <think>.
        if not complete or not pieces[-1].strip().startswith(pieces[-3].strip()):
            raise UserError(f"model={self.tokenizer.name_or_path!r}: its chat template does not "
                            f"repeat one form for every turn ({reason}); use a model whose does")
        return pieces

    def clean(self, text):
        """The text with a blank in each control token, so that it can inject no turn."""
        text = text.encode("utf-8", "replace").decode()        # a lone surrogate has no encoding
        while True:                            # by ids: a normalizer may spell them otherwise
            encoded = self.backend.encode(text, add_special_tokens=False)
            found = [x for x, i in zip(encoded.offsets, encoded.ids) if i in self.control]
            if not found:
                return text
            for start, end in reversed(found):
                last = start + len(text[start:end].rstrip()) - 1
                text = f"{text[:last]} {text[last:]}"

    def ids(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode(self, text):
        """Ids of text in mid-conversation, after a letter: some tokenizers prepend a blank."""
        return self.ids("a" + text)[self.n_letter:]

    def prompt(self, system, task, skill=None):
        """Ids up to the first answer: with `skill` the teacher's, without it the student's."""
        content = self.clean(task)
        if skill is not None:                  # CHOICE: in the first user message, above the task
            notes = self.clean(SKILL_TEXT.format(**asdict(skill)))
            offsets = self.backend.encode(notes, add_special_tokens=False).offsets
            if len(offsets) > self.max_skill_tokens:
                notes = notes[:offsets[self.max_skill_tokens][0]]
            content = f"{notes}\n\n{content}"
        head = self.before_user
        if self.before_system is None:
            content = f"{system}\n\n{content}"
        else:
            head = self.before_system + system.strip() + head
        return self.ids(head + self.trim(content) + self.opening)

    def next_turn(self, observation, last):
        """Ids between an answer and the next; its last token may end the turn in the template."""
        said = self.trim(self.clean(observation))
        ids = self.encode(self.after_answer + said + self.opening)
        if last in self.eos_ids and last in self.end_ids:
            ids = ids[self.end_ids.index(last) + 1:]
        return ids


# ---- Forward passes: for scoring and updating, and with a cache for playing ----------------------
def autocast(model, cfg):
    """bfloat16 activations, if that is the precision; the weights are float32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16")


def update_mode(model, cfg):
    """Evaluation mode, but for layers that are to be computed twice: they do so in train mode."""
    model.eval()
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = bool(cfg.gradient_checkpointing)


def logits_at(positions, model):
    """Within this context the logits are those of these positions (B, L) alone, to save memory."""
    def keep(head, hidden):
        return (hidden[0][positions],)
    return model.get_output_embeddings().register_forward_pre_hook(keep)


def micro_batches(batch, max_tokens):
    """Parts of similar length, of at most max_tokens when padded, or one trajectory each. Needs:
    .skill_prompt and .ids."""
    batch = sorted(batch, key=lambda t: len(t.skill_prompt + t.ids))
    longest = len(batch[-1].skill_prompt + batch[-1].ids)
    size = max(1, max_tokens // longest)
    return [batch[i:i + size] for i in range(0, len(batch), size)]


def measure(metrics, part, logp, logp_old, adv, mask, n, cfg):
    """Add what the log tells of a part's action tokens to what it tells of the n of all parts."""
    adv = adv[:, None]                                                               # (B, 1)
    ratio = (logp - logp_old).exp()
    clipped = ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
    metrics["clip_fraction"] += token_mean(ratio * adv > clipped * adv, mask, n).item()
    if cfg.actor == "student":
        sampled = pad_sequence([torch.tensor(t.logps) for t in part], True)          # (B, T)
        gap = (sampled.to(logp.device) - logp_old)[mask].abs().max().item()
        metrics["rollout_gap"] = max(gap, metrics["rollout_gap"])
        metrics["entropy"] -= token_mean(logp_old, mask, n).item()       # estimated by its sample


class KeyValueCache(DynamicCache):
    def update(self, keys, values, *args, **kwargs):           # autocast leaves keys in float32
        return super().update(keys.to(values.dtype), values, *args, **kwargs)


class Decoder:
    """B ragged conversations that grow on one key-value cache. attention_mask (B, slots): 1 at
    tokens, 0 at padding, which stands left of each chunk. Needs: inspect, math, torch,
    KeyValueCache, autocast, and cfg.temperature, .precision."""
    def __init__(self, model, cfg, n):
        self.model, self.cfg = model, cfg
        self.rows = [[] for _ in range(n)]
        self.attention_mask = torch.zeros(n, 0, dtype=torch.long, device=model.device)
        self.cache = KeyValueCache()
        named = inspect.signature(model.forward).parameters    # past_key_values is being retired
        self.keyword = "cache" if "cache" in named else "past_key_values"
        self.window = getattr(model.config.get_text_config(), "sliding_window", None) or math.inf

    def read(self, chunks):
        """Append ids to rows (some may get none). Returns log-probs (B, V) of what is next."""
        self.rows = [row + chunk for row, chunk in zip(self.rows, chunks)]
        longest = max(map(len, chunks))
        if self.attention_mask.shape[1] + longest > self.window:     # it counts padding: read anew
            chunks = self.rows
            longest = max(map(len, chunks))
            self.attention_mask = self.attention_mask[:, :0]
            self.cache = KeyValueCache()
        ids = torch.tensor([[-1] * (longest - len(chunk)) + chunk for chunk in chunks])
        for part in ids.to(self.model.device).split(512, 1):   # bounds the attention mask's size
            self.attention_mask = torch.cat([self.attention_mask, (part >= 0).long()], 1)
            positions = self.attention_mask.cumsum(1)[:, -part.shape[1]:] - 1
            with autocast(self.model, self.cfg):
                out = self.model(
                    input_ids=part.clamp(min=0), position_ids=positions.clamp(min=0),
                    attention_mask=self.attention_mask, use_cache=True, logits_to_keep=1,
                    **{self.keyword: self.cache})
        logits = out.logits[:, -1].float() / self.cfg.temperature
        return logits.log_softmax(-1)

    def keep(self, rows):
        """Go on with these rows only; a row may be taken more than once."""
        self.rows = [self.rows[row] for row in rows]
        self.attention_mask = self.attention_mask[rows]
        self.cache.batch_select_indices(torch.tensor(rows, device=self.model.device))


# ---- Rollout: on-policy, multi-turn, token ids in and token ids out ------------------------------
DRAFT = (r"(?:think(?:ing)?|thoughts?|reasoning|analysis|reflection|scratchpad)\|?"
         r"(?: \w+=[^<>\n]*)?[>\]\u25b7]")
OPENS = rf"(?i)[<\[\u25c1]\|?(?:seed:|start_|begin_of_)?{DRAFT}|<\|?channel\|?>(?:thought|analysis)"
CLOSES = rf"(?i)[<\[\u25c1]\|?(?:/|/seed:|end_|end_of_){DRAFT}|<channel\|>|<\|channel\|>final[^>]*>"


def spoken(answer):
    """An answer without the drafts in its thinking, closed or not. Needs: re, OPENS, CLOSES."""
    said = re.split(CLOSES, answer)[-1]
    return re.split(OPENS, said)[0]


def sample_answers(decoder, logp, eos_ids, cfg, generator, greedy):
    """(ids, logps): one list per row, of an answer up to an eos id (kept) or max_new_tokens. logp
    (B, V): of the first token. The decoder has not read the last token when this returns."""
    ids, logps = [[] for _ in logp], [[] for _ in logp]
    unfinished = range(len(logp))
    while True:
        y = logp.argmax(-1, keepdim=True)                                            # (B, 1)
        if not greedy:
            y = torch.multinomial(logp.exp(), 1, generator=generator)
        tokens = y.squeeze(1).tolist()
        chosen = logp.gather(1, y).squeeze(1).tolist()
        chunks = [[] for _ in ids]
        for row in unfinished:
            ids[row].append(tokens[row])
            logps[row].append(chosen[row])
            if tokens[row] not in eos_ids and len(ids[row]) < cfg.max_new_tokens:
                chunks[row] = [tokens[row]]
        unfinished = [row for row, chunk in enumerate(chunks) if chunk]
        if not unfinished:
            return ids, logps
        logp = decoder.read(chunks)


@torch.no_grad()
def rollout(model, tokenizer, envs, cfg, skills=None, generator=None, greedy=False):
    """Play an episode in each environment and close it. It has task_id, system_prompt, reset() ->
    task, step(answer) -> (observation, done), completion() -> [0, 1] or nan if lost, and close().
    model samples, or is `greedy`. skills, one or None each, make skill_prompt. Needs: Part II."""
    if not envs:
        return []
    skills = skills or [None] * len(envs)
    size = cfg.rollout_batch
    if len(envs) > size:
        parts = []
        for i in tqdm(range(0, len(envs), size), leave=False, disable=None):
            some = envs[i:i + size], cfg, skills[i:i + size]
            parts += rollout(model, tokenizer, *some, generator, greedy)
        return parts
    model.eval()
    prefill = cfg.prefill or getattr(envs[0], "prefill", "")
    chat = Chat(tokenizer, prefill, cfg.max_skill_tokens)
    render = cache(chat.prompt)                # many are equal
    follow = cache(chat.next_turn)
    eos_ids = chat.eos_ids | {*np.ravel(model.generation_config.eos_token_id)}     # one or several
    added = tokenizer.added_tokens_decoder     # marks that a reader needs are shown
    unseen = {i for i in added if added[i].special and not re.search(
        "(?i)thought|think|reason|channel|message|answer", added[i].content)}
    limit = cfg.max_context - (cfg.max_skill_tokens + 2) - cfg.max_new_tokens  # 2: a blank line
    reads_skill = cfg.actor == "teacher" or cfg.skill_reader == "student"
    each = map
    if getattr(envs[0], "concurrent", False):  # they wait for a server
        each = ThreadPoolExecutor(len(envs)).map
    trajectories, playing, chunks = [], [], []
    tasks = list(each(partial(ask, name="reset"), envs))
    for env, skill, task in zip(envs, skills, tasks):
        prompt = render(env.system_prompt, task)
        skill_prompt = render(env.system_prompt, task, skill)
        said = [{"role": "user", "content": task}]
        t = Trajectory(env.task_id, skill, prompt, skill_prompt, said)
        too_long = len(prompt) > limit
        t.counts = {"cut_answers": 0, "truncated": too_long}
        trajectories.append(t)
        if too_long:                           # no turn is possible: its reward stays nan
            ask(env, "close")
        else:
            playing.append((t, env))
            chunks.append(skill_prompt if reads_skill else prompt)
    if not playing:
        return trajectories
    prompts = [list(ids) for ids in dict.fromkeys(map(tuple, chunks))]   # equal ones are read once
    rows = [prompts.index(chunk) for chunk in chunks]
    decoder = Decoder(model, cfg, len(prompts))
    logp = decoder.read(prompts)[rows]                                               # (B, V)
    decoder.keep(rows)
    require(not logp.isnan().any(), "the model's logits are nan: lower lr or lam")
    while True:
        answers, logps = sample_answers(decoder, logp, eos_ids, cfg, generator, greedy)
        texts = []
        for ids in answers:
            seen = [y for y in ids if y not in unseen]
            text = tokenizer.decode(seen, clean_up_tokenization_spaces=False)
            texts.append(chat.prefill + text)
        steps = list(each(
            lambda pair, text: ask(pair[1], "step", spoken(text), turn=pair[0].turns + 1),
            playing, texts))
        going_on, chunks = [], []
        for row, (t, env) in enumerate(playing):
            ids, (observation, done) = answers[row], steps[row]
            t.ids += ids
            t.mask += [True] * len(ids)
            t.logps += logps[row]
            t.turns += 1
            t.counts["cut_answers"] += ids[-1] not in eos_ids
            t.messages.append({"role": "assistant", "content": texts[row]})
            t.messages.append({"role": "user", "content": observation})
            following = [] if done else follow(observation, ids[-1])
            if done or len(t.prompt + t.ids + following) > limit:
                t.reward = ask(env, "completion", turn=t.turns)          # CHOICE: if full, it ends
                t.counts |= dict(truncated=not done) | getattr(env, "counts", {})
                ask(env, "close", turn=t.turns)
            else:
                t.ids += following
                t.mask += [False] * len(following)
                going_on.append(row)
                chunks.append(ids[-1:] + following)            # the last token is unread yet
        if not going_on:
            return trajectories
        if len(going_on) < len(playing):
            playing = [playing[row] for row in going_on]
            decoder.keep(going_on)
        logp = decoder.read(chunks)


# ---- Skills: what is shown; Analyze(tau, x), and who writes it -----------------------------------
SUMMARIZER_PROMPT = """You review one finished attempt of an agent at a task and write a skill for \
the next attempt at the same task: short, concrete, and true to what the transcript shows.
Answer with one JSON object and nothing else. It has exactly these three fields, each a string:
"success_analysis": which choices were right, and why (at most three sentences).
"mistake_analysis": what failed or lost time: a wrong assumption, a step that cannot be undone ...
"golden_workflow": the procedure to follow next time, as short ordered steps.
Do not retell the transcript. If it failed, say what to do instead. Completion 1.00 is success."""


def shown_skills(picks, bank, cfg, k):
    """{x: S(x)} from UCB's picks {x: entry or None}. Controls (skill_shown): another task's skill,
    or headings only. DEVIATION (borrow): for want of a skill another task's, without credit."""
    rng = random.Random(derived_seed(cfg.seed, "shown", k))
    shown = {}
    for x, entry in picks.items():
        lender = rng.choice([task for task in bank.entries if task != x] or [None])
        if (cfg.borrow and entry is None) or (cfg.skill_shown == "other" and entry):
            entry = bank.select(lender)
        shown[x] = entry and entry["skill"]
        if entry and cfg.skill_shown == "empty":
            shown[x] = Skill("", "", "")
    return shown


def summarize(batch, state, world, cfg):
    """Analyze(tau, x): [(trajectory, Skill)], without failures. DEVIATION: not asynchronously."""
    texts = []
    for t in batch:
        turns = [f"[{m['role']}]\n{m['content']}" for m in t.messages]
        texts.append("\n\n".join(turns) + f"\n\n[completion: {t.reward:.2f}]")
    if cfg.summarizer == "rules":              # DEVIATION: the tiny model is too small to write
        answers = []
        for t in batch:
            said = [dict(m, content=spoken(m["content"])) for m in t.messages]
            answers.append(json.dumps(world.analyse(said)))
    elif cfg.summarizer == "self":             # DEVIATION: the paper asks an external model
        answers = ask_student(texts, state.student, state.tokenizer, cfg, state.generator)
    else:
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(partial(ask_server, cfg=cfg), texts))
    skills, failed = [], []
    for t, answer in zip(batch, answers):
        try:
            skills.append((t, parse_skill(answer)))
        except ValueError as error:
            failed.append(error)
    if failed:
        tqdm.write(f"{len(failed)} of {len(answers)} skills failed, the first: {failed[0]}")
    return skills


def ask_student(texts, student, tokenizer, cfg, generator):
    """The student's answers, each an episode of one turn; none to a transcript that is too long.
    CHOICE: they begin with a prefill and are sampled at 0.6: else small models seldom end one."""
    longest = getattr(student.config.get_text_config(), "max_position_embeddings", cfg.max_context)
    own = SimpleNamespace(**asdict(cfg) | dict(
        max_new_tokens=cfg.summary_tokens, max_context=longest, max_skill_tokens=0, temperature=0.6,
        prefill='{"success_analysis": "'))
    envs = [SimpleNamespace(
        task_id="", system_prompt=SUMMARIZER_PROMPT, reset=partial(str, text), close=lambda: None,
        step=lambda answer: ("", True), completion=lambda: 0.0) for text in texts]
    written = rollout(student, tokenizer, envs, own, generator=generator)
    too_long = f"tokens, with {cfg.summary_tokens=} more than {longest}: use a server"
    answers = []
    for t in written:
        told = f"[a transcript of {len(t.prompt)} {too_long}]"
        answers.append(t.messages[1]["content"] if t.turns else told)
    return answers


def ask_server(text, cfg, timeout=60):
    """An OpenAI-compatible server's answer, or after three tries the reason why there is none."""
    url = cfg.summarizer.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    body = dict(model=cfg.summarizer_model, max_tokens=cfg.summary_tokens, messages=[
        {"role": "system", "content": SUMMARIZER_PROMPT}, {"role": "user", "content": text}])
    headers = {"Content-Type": "application/json", "User-Agent": "skill-sd"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"        # local servers need none
    request.add_unredirected_header("Authorization", f"Bearer {key}")
    for wait in 1, 4, 0:
        said, reason, end = b"", "no text", time.monotonic() + timeout
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                while time.monotonic() < end and (more := answer.read1(65536)):      # may be slow
                    said += more
            text = json.loads(said)["choices"][0]["message"]["content"]
            if isinstance(text, list):         # of parts, some of which may be thinking
                text = "".join(part["text"] for part in text if part["type"] == "text")
            if text.strip():
                return text
        except Exception as error:             # no network, or no answer of this form
            reason = error if isinstance(error, OSError) else reason
        time.sleep(wait)
    return f"[{cfg.summarizer}: {reason} {said[:300]}]".replace(key, "***")


def parse_skill(text):
    """The Skill in a summarizer's answer, else ValueError. Forgives fences, other text and fields,
    lists of lines, null, and bad JSON around the three strings. Needs: json, re, Skill, spoken."""
    names = "success_analysis", "mistake_analysis", "golden_workflow"
    text = text[:100_000]
    strings = r"\s*,\s*".join(rf'"{name}"\s*:\s*"(?:[^"\\]|\\.)*"' for name in names)
    # The last string ends before another key or the object's end, not at a quote within it.
    strings += r'(?=\s*,\s*"\w+"\s*:|[\s,]*(?:[}`][^"]*)?$)'
    pieces = []
    for part in spoken(text), text:            # what follows the thinking, else everything
        starts = [brace.start() for brace in re.finditer(r"\{", part)]
        pieces += [part[start:] for start in reversed(starts[-100:])]
        for found in re.finditer(strings, part):
            mended = re.sub(r'\\(?!["\\/bfnrtu])', r"\\\\", found[0])        # as in \_
            pieces.append("{" + mended + "}")
    for piece in pieces:
        values = []
        try:
            found = json.JSONDecoder(strict=False).raw_decode(piece)[0]
            for name in names:
                lines = "" if found[name] is None else found[name]
                value = "\n".join(lines if isinstance(lines, list) else [lines])
                values.append(value.encode("utf-8", "replace").decode().strip())
        except (ValueError, RecursionError, KeyError, TypeError):
            continue                           # no JSON, or of another form
        if re.search(r"\w", "".join(values)):
            return Skill(*values)
    raise ValueError(f"no JSON object with the text fields {', '.join(names)} in {text[:200]!r}")


# ==== Part III: the program =======================================================================
CODE = derived_seed(Path(__file__).read_text("utf-8"))                # this version of the file
RANK = int(os.environ.get("RANK", 0))          # the number of this process, and
RANKS = int(os.environ.get("WORLD_SIZE", 1))   # of all of them, under torchrun
QUANTILES = [math.nan, 12.71, 4.30, 3.18, 2.78, *[2.57] * 4, *[2.26] * 20, 1.96]     # of t, n - 1


@dataclass
class Config(Method, sokoban_env.Settings):
    """Every setting: the method's, Sokoban's, and these. The command line is made from them. Build
    one with `configure`, which alone applies METHODS and PRESETS, and pass it to `train`."""
    method: str = "skill_sd"         # of METHODS; in a shell also several after commas, or all
    preset: Literal["tiny", "scarce", "small", "paper", "appworld"] = "tiny"    # see PRESETS
    seed: int = 0                    # of training levels, warm start, sampling
    seeds: int = 1                   # how many seeds to run, from `seed` on
    out: str = "runs"                # folder for runs and warm starts
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # of the model
    save_every: int = 10             # iterations between checkpoints
    evals: int = 10                  # held-out evaluations along the run, before the last one
    env: str = "sokoban_env"         # appworld_adapter, or a module, or FILE.py, with make_world
    model: str = "tiny"              # tiny: the built-in model; else a Hugging Face name or folder
    precision: Literal["float32", "bfloat16"] = "float32"  # of rollout and scoring alike
    gradient_checkpointing: Literal[0, 1] = 0         # 1: less memory, each layer computed twice
    prefill: str = ""                # every answer begins with this; by default as the world says
    max_new_tokens: int = 1          # longest answer in tokens; tiny answers one word  CHOICE
    max_context: int = 1024          # longest conversation; a full one ends an episode  CHOICE
    max_skill_tokens: int = 256      # a skill longer than this is cut in the prompt    CHOICE
    rollout_batch: int = 512         # conversations played at once
    micro_batch_tokens: int = 4096   # tokens per forward pass while scoring and training
    summarizer: str = "rules"        # rules (the world's analyst), self, or http://HOST/v1
    summarizer_model: str = ""       # the model to ask for there; key in OPENAI_API_KEY
    summary_tokens: int = 400        # longest answer of a summarizing language model   CHOICE
    may_be_0 = "seed", "iterations", "sync_every", "evals"     # of the whole numbers

    def __post_init__(self):
        super().__post_init__()                # types, choices and ranges
        check = self.check
        check("method", self.method in METHODS, f"must be one of {', '.join(METHODS)}")
        for name, value in METHODS[self.method].items():
            check(name, getattr(self, name) == value,
                  f"method {self.method} means {value!r}; leave it to configure(method=...)")
        check("temperature", self.temperature >= 0.01, "at least 0.01")
        alone = self.reward_weight and self.iterations and self.group_size == 1
        check("group_size", not alone, "at least 2")
        even = self.tasks_per_iteration % RANKS == 0
        check("tasks_per_iteration", even, f"must be a multiple of {RANKS}, the processes")
        blind = self.skill_reader != "teacher" and (self.actor == "teacher" or self.lam > 0)
        check("skill_reader", not blind, "a teacher that acts or distils (lam > 0) must read it")
        check("device", self.device == "cpu" or torch.cuda.is_available(), "no GPU is found")
        least = self.max_skill_tokens + self.max_new_tokens + 2
        check("max_context", self.max_context > least, f"must exceed {least}: skill, answer")
        check("env", sokoban_env.world_file(self.env), "no such file, no module of that name")
        if self.summarizer not in ("rules", "self"):
            url = r"https?://(\[[\da-f:]+\]|[\w.-]+)(:\d+)?(/[!-~]*)?"
            served = re.fullmatch(url, self.summarizer, re.ASCII)
            check("summarizer", served, "rules, self, or a server http://HOST/v1")
            check("summarizer_model", self.summarizer_model, "one of the server's")
            key = os.environ.get("OPENAI_API_KEY", "").strip()
            check("summarizer", key.isascii() and key.isprintable(), "OPENAI_API_KEY: not a line")


METHODS = {
    "base": dict(iterations=0),                                    # untrained
    "skill_sd": {},
    "grpo": dict(lam=0.0, skill_reader="nobody"),
    "opd": dict(reward_weight=0.0, lam=1.0),                       # SDL alone, its weight CHOICE
    "skill_grpo": dict(lam=0.0, skill_reader="student"),           # skill in the student's prompt
    "frozen": dict(sync_every=0),                                  # ablations: frozen teacher
    "off_policy_frozen": dict(actor="teacher", sync_every=0),      # the teacher acts. CHOICE: r and
    "off_policy": dict(actor="teacher"),                           # rho against the student
    "borrowed": dict(borrow=1),                                    # DEVIATION: see `borrow`
    "other_skill": dict(skill_shown="other"),                      # controls: does its text matter?
    "empty_skill": dict(skill_shown="empty"),
}
CHAT = dict(summarizer="self", precision="bfloat16", gradient_checkpointing=1, lr=1e-6, evals=0,
            micro_batch_tokens=16384, lam=0.001)               # the paper's best on AppWorld
PAPER = CHAT | dict(model="Qwen/Qwen3-4B-Instruct-2507", max_turns=40, rollout_batch=16)
PRESETS = {      # tiny: see Config. Of the paper: model, boxes, levels, turns, iterations
    "scarce": dict(min_moves=5, max_moves=12, max_turns=16, timid=0.86, tasks_per_iteration=4,
                   group_size=4, iterations=160, lr=5e-4, adam_eps=3e-4),    # tuned on split val
    "small": CHAT | dict(model="Qwen/Qwen2.5-0.5B-Instruct", iterations=100, max_turns=20,
                         train_levels=96, test_levels=64, max_new_tokens=16, max_context=4096,
                         rollout_batch=128),                                 # a GPU of 24 GB
    "paper": PAPER | dict(iterations=180, boxes=2, max_moves=20, train_levels=96, test_levels=64,
                          max_new_tokens=256, max_context=16384),
    "appworld": PAPER | dict(iterations=300, env="appworld_adapter",
                             max_new_tokens=512, max_context=32768),
}


def configure(method="skill_sd", **typed):
    """A run's Config, as in train(configure(method="grpo", preset="scarce", iterations=20)).
    Precedence: `typed`, which must not contradict METHODS, a trained model's folder, PRESETS."""
    saved = {}
    path = Path(typed.get("model", "tiny")) / "skill_sd.json"
    if path.exists() and "preset" not in typed:
        left_out = {"method", "out", "device", "save_every"}.union(*METHODS.values())
        for name, value in load(path).items():
            if name in Config.__dataclass_fields__ and name not in left_out:
                saved[name] = value
    preset = "tiny" if sokoban_env.is_player(typed.get("model", "tiny")) else "small"
    if typed.get("env") == "appworld_adapter":
        preset = "appworld"
    preset = typed.get("preset", saved.get("preset", preset))
    settings = dict(method=method, preset=preset) | PRESETS.get(preset, {}) | saved
    return Config(**settings | METHODS.get(method, {}) | typed)          # which checks them


def load_model(cfg, world):
    """(student, tokenizer), float32: the built-in model, or a chat model (hub name or folder)."""
    path = cfg.model
    if path == "tiny":
        path = sokoban_env.warm_start(cfg, SKILL_TEXT, world)
    told = f"model={str(path)!r}"
    require(not (Path(path) / "adapter_config.json").exists(),
            f"{told}: merge the adapter first (peft's merge_and_unload)")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        for part in config, config.get_text_config():
            for name in vars(part):            # theta_old must be the policy that sampled
                if re.search("dropout|_pdrop$", name):
                    setattr(part, name, 0.0)
        config.gradient_checkpointing = bool(cfg.gradient_checkpointing)
        model, found = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, trust_remote_code=False,
            output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = model.to(cfg.device)
        gap = scoring_gap(model, cfg)
    except Exception as error:                 # each library, and each architecture, has its own
        raise UserError(f"{told} cannot be loaded and played on {cfg.device}; give the folder or "
                        "name of an instruct model of plain attention, delete a broken warm start. "
                        f"{type(error).__name__}: {' '.join(str(error).split()):.150}") from error
    missing = sorted(found["missing_keys"])    # unused ones are normal; the library tells them
    window = getattr(model.config.get_text_config(), "max_position_embeddings", cfg.max_context)
    embedded = model.get_input_embeddings().num_embeddings
    require(not missing, f"{told}: {len(missing)} weights are missing, as {missing[:1]}")
    require(tokenizer.is_fast and len(tokenizer) <= embedded, f"{told}: {tokenizer.is_fast=}, "
            f"{len(tokenizer)=}: needs a fast tokenizer of at most {embedded} ids")
    require(cfg.max_context <= window, f"max_context={cfg.max_context}: {told} reads only {window}")
    require(gap < 1e-3, f"{told} does not score what it samples: log-probs differ by {gap:.2g}. It "
            "counts padding, looks ahead, is recurrent, or (nan) broken; use a plain causal model")
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return model, tokenizer                    # its other generation settings might not be saved


@torch.no_grad()
def scoring_gap(model, cfg):
    """The largest difference between log-probs of tokens of two ragged conversations that are read
    through the cache, and at once, in float32. One of them grows beyond the model's windows."""
    own = replace(cfg, precision="float32")
    text = model.config.get_text_config()
    names = r'(?:window|original_max|chunk|local)\w*": (\d+)'
    found = map(int, re.findall(names, text.to_json_string(use_diff=False)))
    border = max([40, *(n for n in found if n < cfg.max_context)])       # where things change
    some = partial(random.Random(0).choices, range(text.vocab_size))
    chunks = [some(k=border - 10), some(k=border - 30)]
    rows = [Trajectory("", None, chunk, chunk, []) for chunk in chunks]
    decoder = Decoder(model.eval(), own, 2)
    for sizes in (7, 40), *[(1, 1)] * 19:
        logp = decoder.read(chunks).tolist()
        chunks = [some(k=n) for n in sizes]
        for t, chunk, row in zip(rows, chunks, logp):
            t.ids += chunk
            t.mask += [True] + [False] * (len(chunk) - 1)
            t.logps.append(row[chunk[0]])
    scored = score(model, rows, own)                                                 # (2, 20)
    return np.abs(scored.tolist() - np.array([t.logps for t in rows])).max()


def begin(cfg):
    """(world, state) before the first iteration."""
    world = sokoban_env.load_world(cfg, RANKS)
    student, tokenizer = load_model(cfg, world)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), cfg.lr, (0.9, 0.95), cfg.adam_eps)  # CHOICE
    bank = SkillBank(cfg.ucb_c, cfg.bank_size)
    generator = torch.Generator(student.device).manual_seed(cfg.seed)
    return world, State(student, teacher, optimizer, bank, tokenizer, generator)


# ---- One run: its folder, its checkpoints, its log -----------------------------------------------
def train(cfg):
    """Run, or go on. Returns the last evaluation with the curve, [(iteration, accuracy)]."""
    folder = run_folder(cfg)
    finished = folder / "result.json"
    with sokoban_env.locked(folder), sokoban_env.threads_for(cfg.model):
        gather(None)                           # the others wait for process 0
        if finished.exists():
            tqdm.write(f"finished: read {finished}")
            return load(finished, CODE)
        tqdm.write(f"works in {folder}")
        world, state = begin(cfg)
        log = resume(folder, state)
        for k in tqdm(range(len(log), cfg.iterations), folder.name, disable=RANK > 0 or None):
            line = {"iteration": k}
            if k * cfg.evals % cfg.iterations < cfg.evals:     # equally spaced, the first at 0
                evaluate(state, world, cfg, k, line)
            start = time.perf_counter()
            rng = random.Random(derived_seed(cfg.seed + 10**6 * RANK, "tasks", k))
            tasks = rng.sample(world.train[RANK::RANKS], cfg.tasks_per_iteration // RANKS)
            state.generator.manual_seed(derived_seed(cfg.seed + 10**6 * RANK, "rollout", k))
            episodes, metrics = iteration(k, state, tasks, world, cfg)
            line["seconds"] = time.perf_counter() - start
            log.append(log_line(line | metrics, episodes))
            save(folder / "log.jsonl", log)
            if (k + 1) % cfg.save_every == 0 or k + 1 == cfg.iterations:
                saved = {"log": log, "code": CODE}
                saved["banks"] = json.dumps(gather(state.bank.entries), default=asdict)
                for name in ("student", "teacher", "optimizer"):
                    saved[name] = getattr(state, name).state_dict()
                save(folder / "checkpoint.pt", saved)
        line = {"iteration": cfg.iterations}
        result = evaluate(state, world, cfg, cfg.iterations, line)
        lines = [*log, line]
        curve = [(x["iteration"], x["heldout_sampled"]) for x in lines if "heldout_sampled" in x]
        result |= {"curve": curve, "code": CODE}
        sokoban_env.save_model(folder / "student", state.student, state.tokenizer)
        save(folder / "student" / "skill_sd.json", asdict(cfg))
        save(folder / "bank.json", gather(state.bank.entries))
        save(folder / "log.jsonl", lines)
        save(finished, result)
    if log and not any(line["skill_share"] for line in log) and cfg.skill_reader != "nobody":
        tqdm.write("warning: no skill was ever shown, so no teacher knew more")
    if sum(line["skills_failed"] - line["skills_written"] for line in log) > 0:
        tqdm.write("warning: most skills failed to parse; use a larger model, or a server")
    return result


def run_folder(cfg):
    """Named by method, model, seed, and a hash of settings, model's files and world's file (but not
    of what that imports)."""
    settings = asdict(cfg)
    for name in ("preset", "seeds", "out", "device", "save_every"):
        del settings[name]
    world = Path(sokoban_env.world_file(cfg.env)).read_text("utf-8")
    weights = sorted(path.stat().st_ctime for path in Path(cfg.model).glob("*"))
    key = derived_seed(json.dumps([settings, RANKS, world, weights])) % 16**6
    return Path(cfg.out) / f"{cfg.method}-{Path(cfg.model).name}-seed{cfg.seed}-{key:06x}"


def resume(folder, state):
    """Load the last checkpoint into the state, if there is one. Returns the log up to there."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return []
    saved = load(path, CODE)
    for name in ("student", "teacher", "optimizer"):
        getattr(state, name).load_state_dict(saved[name])
    state.bank.entries = json.loads(
        saved["banks"], object_hook=lambda x: Skill(**x) if "golden_workflow" in x else x)[RANK]
    tqdm.write(f"going on at iteration {len(saved['log'])}")
    return saved["log"]


def evaluate(state, world, cfg, k, line):
    """{"sampled", "greedy"}: held-out completions, 0 if lost; the accuracies go into the line."""
    tasks = world.heldout[:None if k == cfg.iterations else 512]         # along the run: of some
    mine = np.array_split(tasks, RANKS)[RANK].tolist()
    result = {}
    for how in ("sampled", "greedy"):
        generator = state.generator.manual_seed(derived_seed(cfg.seed + 10**6 * RANK, "evaluate"))
        played = rollout(state.student, state.tokenizer, [world.make_env(task) for task in mine],
                         cfg, None, generator, how == "greedy")
        rewards = sum(gather([t.reward for t in played]), [])
        result[how] = np.nan_to_num(rewards).tolist()
        if np.isnan(rewards).all():
            not_lost(played, cfg.max_context)
        line[f"heldout_{how}"] = float(np.equal(rewards, 1).mean())
        if RANK == 0:
            tqdm.write(f"{cfg.method}, seed {cfg.seed}, after {k} iterations, {how}: solved "
                       f"{100 * line[f'heldout_{how}']:.1f} % of {len(tasks)}, completion "
                       f"{100 * np.mean(result[how]):.1f} %, {np.isnan(rewards).sum()} lost")
    return result


def log_line(line, episodes):
    """A line of log.jsonl, of means over all processes. Of `line`: iteration, heldout_sampled and
    _greedy (accuracies), seconds, skills_written and _failed; pg_loss, sdl_loss, log_ratio (l),
    grad_norm, clip_fraction, entropy (mean -log pi_old of the sampled tokens) and rollout_gap (to
    their scores: below 1e-4 in float32). Of the episodes: reward, success, turns, cut_answers, the
    world's counts; lost, truncated (by max_context) and skill_share. Of the groups:
    zero_spread_groups, the share with equal rewards, which teach GRPO nothing."""
    rewards = defaultdict(set)                 # of each task
    columns, rows = defaultdict(list), [line]
    for t in episodes:
        row = dict(lost=math.isnan(t.reward), skill_share=t.skill is not None)
        if not row["lost"]:
            rewards[t.task_id].add(t.reward)
            row = t.counts | row | dict(reward=t.reward, success=t.reward == 1, turns=t.turns)
        rows.append(row)
    rows += [dict(zero_spread_groups=len(distinct) == 1) for distinct in rewards.values()]
    for row in sum(gather(rows), []):
        for name, value in row.items():
            columns[name].append(value)
    return {name: float(np.mean(values)) for name, values in columns.items()}


# ---- Processes under torchrun: each has its share of the tasks, and a bank of its own ------------
def gather(item):                              # returns [item of process 0, of process 1, ...]
    items = [item] * RANKS
    if RANKS > 1:
        torch.distributed.all_gather_object(items, item)
    return items


def average_gradients(model):
    """Average over the processes, also the gradients of weights that one of them did not use."""
    for p in model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if RANKS > 1:
            torch.distributed.all_reduce(p.grad)
            p.grad /= RANKS


# ---- The command line ----------------------------------------------------------------------------
def print_table(results):
    """results: {method: [evaluated, per seed]}. ±: 95 % over tasks, or over seeds (t)."""
    rows = defaultdict(list)                                                 # (seeds, 3, tasks)
    for method, runs in results.items():
        for run in runs:
            solved = 100 * np.equal([run["sampled"], run["greedy"]], 1)      # (2, tasks)
            area = 100 * np.mean([y for _, y in run["curve"]])               # along the run
            rows[method].append([*solved, np.full(len(solved[0]), area)])
    ours = "skill_sd" if "skill_sd" in rows else list(rows)[-1]
    for name in results:
        if name != ours:
            rows[f"{ours} - {name}"] = np.subtract(rows[ours], rows[name])   # paired
    width = max(map(len, rows))
    print(f"\n{len(solved[0])} held-out tasks, {len(runs)} seed(s); percent, ± 95 % interval\n"
          f"{'':{width}}     sampled acc     greedy acc       area")
    for name, values in rows.items():
        values = np.mean(values, 2) if len(runs) > 1 else np.transpose(values[0])
        quantile = QUANTILES[min(len(values), 30) - 1]
        halves = quantile * values.std(0, ddof=1) / len(values) ** 0.5
        text = f"{name:<{width}}"
        for mean, half in zip(values.mean(0), halves):
            text += f"   {mean:5.1f} ±{half:5.1f}" if half > 1e-9 else f"   {mean:5.1f}{'':7}"
        print(text)


def look_inside(cfg):
    """(episode, skill, views) of the untrained player, the best of 8; see sokoban_env.views."""
    folder = run_folder(cfg)
    (bank,) = load(folder / "bank.json")
    with sokoban_env.threads_for(cfg.model):
        world, state = begin(cfg)
        task = next((x for x in world.train if x in bank), world.train[0])     # the easiest
        skill = Skill(**bank[task][-1]["skill"]) if bank else Skill("", "", "")
        envs = [world.make_env(task) for _ in range(8)]
        played = rollout(state.student, state.tokenizer, envs, cfg, [skill] * 8, state.generator)
        t = max(played, key=lambda t: (t.reward, -t.turns))
        trained = AutoModelForCausalLM.from_pretrained(folder / "student")
        return t, skill, sokoban_env.views(t, state.student, trained, state.tokenizer)


def plan(method="skill_sd", seed=0, **typed):
    """{method: [Config of each seed]} of what was typed; base comes along. All are checked."""
    names = METHODS if method == "all" else ["base", *method.split(",")]
    plans = {}
    for name in names:
        fixed = {} if name == method else METHODS.get(name, {})          # over what was typed
        settings = {key: value for key, value in typed.items() if key not in fixed}
        seeds = range(seed, seed + typed.get("seeds", 1)) or [seed]
        plans[name] = [configure(name, seed=each, **settings) for each in seeds]
    return plans


def main(argv=None):
    """Run what the words of argv, or of the command line, ask for."""
    typed = Config.parse_args(argv)
    try:
        plans = plan(**typed)
        *_, (*_, cfg) = plans.values()
        if RANKS > 1:
            if cfg.device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group()             # nccl for GPUs, gloo for CPUs
        results = {method: [train(cfg) for cfg in runs] for method, runs in plans.items()}
        if RANK == 0:
            print_table(results)
            if cfg.method == "skill_sd" and cfg.model == "tiny" and RANKS == 1:
                sokoban_env.watch(SKILL_TEXT, *look_inside(cfg))
        if RANKS > 1:
            time.sleep(0.1)                    # gloo's threads may hold tensors still
            torch.distributed.destroy_process_group()
    except (UserError, OSError) as error:      # all others are bugs
        sys.exit(" ".join(f"error: {error}".split())[:300])


if __name__ == "__main__":
    main()
