# SPDX-License-Identifier: MIT
"""Skill-SD in one file, to be read beside the paper: https://arxiv.org/abs/2604.10674

A student plays tasks over many turns with a plain prompt. Finished trajectories, here the best of
each group, become short skills. A UCB bandit picks one skill per task; only the teacher - the same
network, synchronised every iteration - reads it, and re-scores the tokens that the student sampled.
GRPO's reward loss plus an importance-weighted reverse KL to that teacher trains the student.

    in the paper                     in this file                       checked by test_skill_sd.py
    x, S(x), B(x); UCB               task, skill, SkillBank             test_ucb_by_hand
    pi(. | x), pi(. | x + S(x))      Chat.prompt                        test_teacher_sees_skill_only
    y_t, y_<t of tau_1 .. tau_G      ids, mask of a Trajectory t        test_rescoring_*
    theta, theta_old; theta-bar      student, logp_old; teacher         test_sync_teacher
    R_i, A_i; L_GRPO, Eq. 10         group_advantages; grpo_loss        test_adv*, test_grpo_*
    l_it, rho_it; L_SDL, Eq. 11-13   log_ratio, rho; sdl_loss           test_sdl_*
    N, lambda; L, Eq. 14             n_tokens, lam; update              test_update_*
    Analyze(tau, x)                  summarize, parse_skill             test_parse_skill_*
    the algorithm                    train                              test_every_method_trains

    python skill_sd.py                          the demo: warm start, train, table, a look inside
    python skill_sd.py --method all --seeds 5   every method, ablation and control, one table
    python skill_sd.py --model NAME_OR_DIR      a chat model of Hugging Face's; see PRESETS
The method ends with `train`. CHOICE marks what the paper leaves open, DEVIATION where we differ.
"""
import argparse
import atexit
import copy
import inspect
import json
import math
import os
import random
import re
import signal
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import sokoban_env
from sokoban_env import derived_seed

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))    # torchrun's


# ---- Configuration -------------------------------------------------------------------------------
@dataclass
class Config:
    """Every setting. The command line is made from this: --lam 0.001, --max-turns 40."""
    method: str = "skill_sd"         # of METHODS: one, several after commas, or all
    preset: Literal["tiny", "scarce", "small", "paper", "appworld"] = "tiny"    # see PRESETS
    seed: int = 0                    # of training levels, warm start, sampling
    seeds: int = 1                   # how many seeds to run, from `seed` on
    jobs: int = 1                    # runs at a time, each in a process of its own
    out: str = "runs"                # folder for runs and warm starts
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # of the model
    save_every: int = 10             # iterations between checkpoints
    split: Literal["test", "val"] = "test"            # held-out levels; val while tuning
    evals: Literal[0, 10] = 10       # held-out evaluations along the run; 0: only the last
    group_size: int = 8              # G, rollouts per task                             CHOICE
    tasks_per_iteration: int = 16    # tasks per iteration                              CHOICE
    iterations: int = 60             # iterations; the paper runs 180 on Sokoban
    updates_per_iteration: int = 1   # optimiser steps on each batch                    CHOICE
    reward_weight: float = 1.0       # weight of the GRPO loss; 0 leaves SDL alone (OPD)
    lam: float = 0.1                 # lambda, weight of SDL; paper: 0.001 (AppWorld)
    lam_until: float = 0.0           # share of the run over which lambda falls to 0; 0: constant
    kl: Literal["sampled", "exact"] = "sampled"       # SDL of sampled tokens, or of the vocabulary
    skill_reader: Literal["teacher", "student", "nobody"] = "teacher"  # who sees skills in training
    sync_every: int = 1              # iterations between teacher synchronisations; 0: never
    actor: Literal["student", "teacher"] = "student"  # who samples; the teacher with its skill
    skill_shown: Literal["own", "other", "empty"] = "own"  # controls: another task's, or blank
    borrow: Literal["no", "nearest", "random"] = "no"      # whose skills while a task has none
    clip_low: float = 0.2            # eps_l; 0.2 and 0.28 are reported second-hand     CHOICE
    clip_high: float = 0.28          # eps_h                                            CHOICE
    lr: float = 1e-3                 # of Adam; 1e-6 is usual for billions of weights   CHOICE
    max_grad_norm: float = 1.0       # gradients are clipped to this norm               CHOICE
    temperature: float = 1.0         # of sampling and of scoring alike                 CHOICE
    summarizer: str = "rules"        # rules (Sokoban's analyst), self, or http://HOST/v1
    summarizer_model: str = ""       # the model to ask for there; key in OPENAI_API_KEY
    summary_tokens: int = 400        # longest answer of a summarizing language model   CHOICE
    ucb_c: float = 1.0               # c, weight of exploration in UCB                  CHOICE
    bank_size: int = 4               # skills kept per task                             CHOICE
    max_skill_tokens: int = 256      # a skill longer than this is cut in the prompt    CHOICE
    env: str = "sokoban_env"         # appworld_adapter, or any module with a make_world(cfg)
    size: int = 6                    # room size, walls included, as in the paper
    boxes: int = 1                   # boxes per room; the paper has 2
    min_moves: int = 3               # shortest optimal solution                        CHOICE
    max_moves: int = 8               # longest optimal solution                         CHOICE
    max_turns: int = 12              # answers per episode, here moves; the paper allows 40
    timid: float = 0.65              # share of moves away from boxes in the play that `tiny` clones
    train_levels: int = 256          # training levels; the paper has 96
    test_levels: int = 2048          # held-out levels; the paper uses 64
    curriculum: float = 0.5          # share of the run after which all levels are in    CHOICE
    model: str = "tiny"              # tiny: the built-in model; else a Hugging Face name or folder
    precision: Literal["float32", "bfloat16"] = "float32"  # of rollout and scoring alike
    gradient_checkpointing: Literal[0, 1] = 0         # 1: less memory, each layer computed twice
    prefill: str = ""                # every answer begins with this, for student and teacher
    max_new_tokens: int = 1          # longest answer in tokens; tiny answers one word  CHOICE
    max_context: int = 1024          # longest conversation; a full one ends an episode  CHOICE
    rollout_batch: int = 512         # conversations played at once
    micro_batch_tokens: int = 16384  # tokens per forward pass while scoring and training
    warm_demos: int = 24000          # games that the built-in model's warm start learns from

    def __post_init__(self):
        for f in fields(self):
            least = int(f.type is int and f.name not in ("seed", "iterations", "sync_every"))
            if f.type in (int, float) and not least <= getattr(self, f.name) < math.inf:
                raise ValueError(f"{f.name}={getattr(self, f.name)}: must be finite, >= {least}")
        served = re.fullmatch(r"https?://(\[[\da-f:]+\]|[\w.-]+)(:\d+)?(/\S*)?", self.summarizer)
        rules = self.summarizer == "rules" and self.env == "sokoban_env"
        for name, wrong, right in (
                ("group_size", self.group_size < 2 and self.reward_weight, "one has no advantage"),
                ("temperature", not self.temperature, "must be above 0"),
                ("timid", self.timid > 1, "a share, at most 1"),
                ("tasks_per_iteration", self.tasks_per_iteration % RANKS, f"a multiple of {RANKS}"),
                ("skill_reader", self.skill_reader != "teacher" and (self.actor == "teacher" or
                 self.lam), "a teacher that acts or distils (lam above 0) must read the skill"),
                ("summarizer", not (served or rules or self.summarizer == "self"),
                 "self, a server http://HOST/v1, or for Sokoban rules"),
                ("device", self.device == "cuda" and not torch.cuda.is_available(), "none is here"),
                ("jobs", self.jobs > 1 and RANKS > 1, "must be 1 under torchrun"),
                ("max_context", self.max_context <= self.max_skill_tokens + self.max_new_tokens + 2,
                 "must exceed max_skill_tokens + max_new_tokens + 2"),
                ("summarizer", served and not os.environ.get("OPENAI_API_KEY", "").isascii(),
                 "OPENAI_API_KEY has characters that are not ASCII"),
                ("summarizer_model", served and not self.summarizer_model, "one of the server's")):
            if wrong:
                raise ValueError(f"{name}={getattr(self, name)!r}: {right}")


# ---- Skills: three fields written from one finished trajectory. Our wording is a CHOICE ----------
@dataclass(frozen=True)
class Skill:
    """What one finished trajectory teaches, in the paper's three fields. Needs: dataclass."""
    success_analysis: str
    mistake_analysis: str
    golden_workflow: str


SKILL_TEXT = """Notes from an earlier attempt at this task
What worked: {success_analysis}
Mistakes: {mistake_analysis}
Workflow: {golden_workflow}"""

SUMMARIZER_PROMPT = """You review one finished attempt of an agent at a task and write a skill for \
the next attempt at the same task: short, concrete, and true to what the transcript shows.

Answer with one JSON object and nothing else. It has exactly these three fields, each a string:
"success_analysis": which choices were right, and why (at most three sentences).
"mistake_analysis": what failed or lost time: a wrong assumption, a step that cannot be undone ...
"golden_workflow": the procedure to follow next time, as short ordered steps.

Do not retell the transcript. If the attempt failed, say what to do instead.
The completion is the share of the task that was done at the end; 1.00 is success."""


def parse_skill(text):
    """The Skill in a summarizer's answer; ValueError if there is none. Accepts code fences, text
    around the object, more fields, lists of lines, null, and an object that is cut off or ill-
    formed around three whole strings. Needs: json, re, contextlib.suppress, Skill."""
    names, text = ("success_analysis", "mistake_analysis", "golden_workflow"), text[:100_000]
    strings = r"\s*,\s*".join(rf'"{name}"\s*:\s*"(?:[^"\\]|\\.)*"' for name in names)
    # The last string ends before another key or the object's end, not at a quote within it.
    strings += r'(?=\s*,\s*"\w+"\s*:|\s*,?\s*(?:[}`][^"]*)?$)'
    for part in (re.split(r"</think(?:ing)?>|\[/THINK\]", text)[-1], text):  # the answer, or all
        starts = [m.start() for m in re.finditer(r"\{", part)][-100:]
        damaged = ["{" + re.sub(r'\\(?!["\\/bfnrtu])', r"\\\\", m[0]) + "}"         # as in \_
                   for m in re.finditer(strings, part)]
        for candidate in [part[start:] for start in reversed(starts)] + damaged:
            with suppress(ValueError, RecursionError, KeyError, TypeError):
                found = json.JSONDecoder(strict=False).raw_decode(candidate)[0]
                values = ["" if found[name] is None else found[name] for name in names]
                values = ["\n".join(x if isinstance(x, list) else [x]) for x in values]
                if re.search(r"\w", "".join(values)):     # a lone surrogate is legal, but no text
                    return Skill(*(x.encode("utf-8", "replace").decode().strip() for x in values))
    raise ValueError(f"no JSON object with the text fields {', '.join(names)} in {text[:200]!r}")


def summarize(trajectories, student, tokenizer, cfg, generator):
    """Analyze(tau, x) of finished trajectories: [(trajectory, Skill)], without failed answers."""
    if cfg.summarizer == "rules":              # DEVIATION: the tiny model is too small to write
        answers = [json.dumps(sokoban_env.analyse(t.messages)) for t in trajectories]
    elif cfg.summarizer == "self":
        # DEVIATION: the paper asks an external model; here the student writes, as an episode of one
        # turn. CHOICE: its JSON is prefilled, and sampled at 0.6; small models seldom end it else.
        size = getattr(student.config.get_text_config(), "max_position_embeddings", cfg.max_context)
        own = replace(cfg, max_new_tokens=cfg.summary_tokens, max_context=size,
                      temperature=0.6, prefill='{"success_analysis": "')
        envs = [SimpleNamespace(
            task_id=t.task_id, system_prompt=SUMMARIZER_PROMPT, reset=t.transcript,
            step=lambda answer: ("", True), completion=lambda: 0.0, close=lambda: None)
            for t in trajectories]
        written = rollout(student, tokenizer, envs, own, generator=generator)
        answers = [w.messages[1]["content"] if w.turns else "" for w in written]
    else:
        with ThreadPoolExecutor(16) as pool:
            answers = [*pool.map(partial(ask_server, cfg=cfg), trajectories)]
    skills, failed = [], []
    for t, answer in zip(trajectories, answers):
        try:
            skills.append((t, parse_skill(answer)))
        except ValueError as error:
            failed.append(error)
    if failed:
        tqdm.write(f"{len(failed)} of {len(answers)} skills failed, the first: {failed[0]}")
    return skills


# ---- The bank: B(x), and UCB over the skills of the same task ------------------------------------
class SkillBank:
    """Skills by task, picked by UCB. Needs: math, dataclasses.asdict, Skill.
    entries: {task_id: [entry, ...]}, oldest first; an entry has skill, picks n(e), reward_sum, and
    source_reward, the completion of the trajectory it was written from. CHOICE: call `wants` before
    `add`: if every skill entered, untried ones would always win and UCB never decide. The student
    does not see the skill that is credited; its reward is from before it: a lagging proxy."""

    def __init__(self, c, size=4):
        self.c, self.size, self.entries = c, size, {}

    def select(self, task_id):
        """The entry with the highest UCB score (of equals the oldest); None without skills."""
        entries = self.entries.get(task_id, [])
        n_ucb = sum(e["picks"] for e in entries)               # CHOICE: of the skills still held

        def score(e):      # UCB: mean_reward(e) + c * sqrt(ln N_ucb / n(e)); untried: inf, so first
            n = e["picks"]
            return e["reward_sum"] / n + self.c * math.sqrt(math.log(n_ucb) / n) if n else math.inf
        return max(entries, key=score, default=None)

    def credit(self, entry, reward):
        """Count a pick and the mean reward (CHOICE) of the group played when it was picked."""
        entry["picks"] += 1
        entry["reward_sum"] += float(reward)

    def wants(self, task_id, source_reward):
        """CHOICE: whether a skill from a trajectory of this reward may enter: if the reward exceeds
        the sources' of all skills of the task, or once all of these were picked twice."""
        entries = self.entries.get(task_id, [])
        return (all(source_reward > e["source_reward"] for e in entries)
                or all(e["picks"] >= 2 for e in entries))

    def add(self, task_id, skill, source_reward=0.0):
        """Insert a skill, unless its text is there. CHOICE: if full, the worst tried one leaves."""
        entries = self.entries.setdefault(task_id, [])
        if any(e["skill"] == skill for e in entries):
            return
        if len(entries) >= self.size:
            worst = min(entries, key=lambda e: e["reward_sum"] / e["picks"] if e["picks"] else 2)
            entries[:] = [e for e in entries if e is not worst]
        entries.append(dict(skill=skill, picks=0, reward_sum=0.0, source_reward=source_reward))

    def state_dict(self):
        return {task: [dict(e, skill=asdict(e["skill"])) for e in entries]
                for task, entries in self.entries.items()}

    def load_state_dict(self, state):
        self.entries = {task: [dict(e, skill=Skill(**e["skill"])) for e in entries]
                        for task, entries in state.items()}


# ---- Two prompts, one token sequence: pi(. | x, y_<t) and pi(. | x + S(x), y_<t) -----------------
class Chat:
    """Renders conversations to token ids. The chat template is rendered once, with marks, and split
    there. The prompt, and each later turn, is one string, encoded once. A conversation only grows:
    sampled ids are never tokenised again, and thinking stays in it."""

    def __init__(self, tokenizer, prefill="", max_skill_tokens=256):
        self.tokenizer, self.max_skill_tokens = tokenizer, max_skill_tokens
        self.backend = tokenizer.backend_tokenizer             # a few times faster than `encode`
        self.backend.no_truncation()
        self.backend.no_padding()
        try:
            pieces = self.cut("system", "user", "assistant", "user")
        except ValueError:                     # no system role: its text goes above the task
            pieces = self.cut("user", "assistant", "user")
            pieces.insert(1, "\n\n")
        # Texts before the system's, the user's, an old answer; after that answer; before a new one.
        self.before_system, self.before_user, _, self.after_answer, generation_prompt = pieces
        self.opening = generation_prompt + prefill
        self.thinks = "<think>" * generation_prompt.rstrip().endswith("<think>")  # not sampled
        added = tokenizer.get_added_vocab()    # some are runs of blanks, which are harmless
        names = [re.escape(t) for t in (token.strip(" \t\r\n\u2581") for token in added) if t[1:]]
        self.control = re.compile("|".join(names) or "(?!)")
        self.n_letter = len(self.backend.encode("a", add_special_tokens=False).ids)
        # The template's own end-of-turn token ends an answer, too, if it is a control token.
        self.end_ids = self.encode(self.after_answer)
        self.eos_ids = {tokenizer.eos_token_id} | ({*self.end_ids[:1]} & {*added.values()})

    def cut(self, *roles):
        """The template's texts before, between and after the contents of a conversation."""
        marks = [f"\u00a7{role} {i}\u00a7" for i, role in enumerate(roles)]
        chat = [dict(role=role, content=mark) for role, mark in zip(roles, marks)]
        text, reason = "", "a text is changed or lost"
        try:
            text = self.tokenizer.apply_chat_template(chat, tokenize=0, add_generation_prompt=True)
        except Exception as error:             # a template may raise anything
            reason = error
        pieces, every = re.split("|".join(marks), text), re.findall("|".join(marks), text)
        # The generation prompt may extend an old answer's header, e.g. by <think>.
        if every != marks or not pieces[-1].strip().startswith(pieces[-3].strip()):
            raise ValueError(f"model={self.tokenizer.name_or_path!r}: its chat template does not "
                             f"repeat one form for every turn ({reason}); use a model whose does")
        return pieces

    def clean(self, text):
        """The text with a blank inside each control token, so that it can inject no turn."""
        text = text.encode("utf-8", "replace").decode()        # a lone surrogate has no encoding
        while self.control.search(text):
            text = self.control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
        return text

    def encode(self, text):
        """Ids of text in mid-conversation, after a letter: some tokenizers prepend a blank."""
        return self.backend.encode("a" + text, add_special_tokens=False).ids[self.n_letter:]

    def prompt(self, system, task, skill=None):
        """Ids up to the first answer: with `skill` the teacher's, without it the student's."""
        head, notes = self.before_system + self.clean(system) + self.before_user, ""
        if self.tokenizer.chat_template == sokoban_env.TINY_TEMPLATE:      # has no system prompt
            head = self.before_system
        if skill is not None:                  # CHOICE: in the first user message, above the task
            notes = self.clean(SKILL_TEXT.format(**asdict(skill)))
            offsets = self.backend.encode(notes, add_special_tokens=False).offsets
            past = offsets[self.max_skill_tokens:]
            notes = notes[:past[0][0] if past else None] + "\n\n"
        text = head + notes + self.clean(task) + self.opening
        return self.backend.encode(text, add_special_tokens=False).ids

    def next_turn(self, observation, last):
        """Ids between an answer, whose last token is `last`, and the next one. If `last` ends a
        turn in the template, it is not repeated."""
        ids = self.encode(self.after_answer + self.clean(observation) + self.opening)
        ended = last in self.eos_ids and last in self.end_ids
        return ids[self.end_ids.index(last) + 1 if ended else 0:]


# ---- Rollout: on-policy, multi-turn, token ids in and token ids out ------------------------------
@dataclass
class Trajectory:
    """One episode, and what belongs to it. The action ids are the same under both prompts."""
    task_id: str
    skill: Skill | None              # S(x)
    prompt: list                     # ids of x up to the first answer: what the student reads
    skill_prompt: list               # ids of x + S(x); the same as `prompt` without a skill
    messages: list                   # the conversation as text
    ids: list = field(default_factory=list)       # answers and observations, after the prompt
    mask: list = field(default_factory=list)      # of each id: True where the actor sampled it
    logps: list = field(default_factory=list)     # (T,) their log-probs, as sampled
    turns: int = 0
    counts: dict = field(default_factory=dict)    # cut_answers (tiny: all), truncated, more
    reward: float = math.nan         # completion rate R_i in [0, 1]; nan: leave this episode out
    adv: float = 0.0                 # A_i
    logp_old: torch.Tensor | None = None          # (T,) log pi_theta_old
    logp_teacher: torch.Tensor | None = None      # (T,) log-probs under x + S(x)

    def transcript(self):
        """The finished conversation as the text that a summarizing language model reads."""
        turns = "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in self.messages)
        return f"{turns}\n\n[completion: {self.reward:.2f}]"


class KeyValueCache(DynamicCache):
    def update(self, keys, values, *args, **kwargs):           # autocast leaves keys in float32
        return super().update(keys.to(values.dtype), values, *args, **kwargs)


class Decoder:
    """Next-token log-probs for ragged conversations that grow on one KV cache. Each call appends a
    chunk per row, padded on the left; the attention mask `real` (B, slots) is 1 at tokens."""

    def __init__(self, model, cfg):
        self.model, self.temperature, self.real = model, cfg.temperature, None
        self.bfloat16 = cfg.precision == "bfloat16"            # of activations; weights are float32
        named = inspect.signature(model.forward).parameters    # past_key_values is being retired
        self.keyword = "cache" if "cache" in named else "past_key_values"
        # A sliding window counts padding: if it may fill up, every call reads the whole rows again.
        window = getattr(model.config.get_text_config(), "sliding_window", None)
        self.reads_again = bool(window) and window < cfg.max_context

    def __call__(self, chunks):
        """chunks: B lists of ids, some may be empty. Returns log-probs (B, V), float32."""
        if self.real is None:                  # first call: read equal prompts once, copy the rows
            order = list(dict.fromkeys(map(tuple, chunks)))
            self.rows, self.cache = [[] for _ in order], KeyValueCache()
            self.real = torch.zeros(len(order), 0, dtype=torch.long, device=self.model.device)
            logp, rows = self(order), [order.index(tuple(chunk)) for chunk in chunks]
            self.keep(rows)
            return logp[rows]
        if self.reads_again:
            chunks = self.rows = [[*row, *chunk] for row, chunk in zip(self.rows, chunks)]
            self.real, self.cache = self.real[:, :0], KeyValueCache()
        longest = max(map(len, chunks))
        ids, real = (torch.tensor(rows, device=self.model.device) for rows in (     # (B, L) each
            [[0] * (longest - len(c)) + [*c] for c in chunks],
            [[0] * (longest - len(c)) + [1] * len(c) for c in chunks]))
        for part, seen in zip(ids.split(512, 1), real.split(512, 1)):    # bounds the mask's size
            self.real = torch.cat([self.real, seen], 1)
            positions = (self.real.cumsum(1) - 1).clamp(min=0)[:, -part.shape[1]:]
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16):
                logits = self.model(
                    input_ids=part, position_ids=positions, attention_mask=self.real,
                    use_cache=True, logits_to_keep=1, **{self.keyword: self.cache}).logits[:, -1]
        return F.log_softmax(logits.float() / self.temperature, dim=-1)      # (B, V)

    def keep(self, rows):
        """Go on with these rows only; a row may be taken more than once."""
        self.rows, self.real = [self.rows[row] for row in rows], self.real[rows]
        self.cache.batch_select_indices(torch.tensor(rows, device=self.model.device))


def sample_answers(decoder, chunks, eos_ids, cfg, generator, greedy):
    """One answer per row: [(ids, logps)], each up to an eos id (kept) or max_new_tokens."""
    answers, unfinished = [([], []) for _ in chunks], range(len(chunks))
    while unfinished:
        logp = decoder(chunks)                                           # (B, V)
        y = logp.argmax(-1, keepdim=True) if greedy else (
            torch.multinomial(logp.exp(), 1, generator=generator))       # (B, 1)
        tokens, logps = y[:, 0].tolist(), logp.gather(1, y)[:, 0].tolist()
        chunks = [[] for _ in chunks]
        for row in unfinished:
            answers[row][0].append(tokens[row])
            answers[row][1].append(logps[row])
            if tokens[row] not in eos_ids and len(answers[row][0]) < cfg.max_new_tokens:
                chunks[row] = [tokens[row]]
        unfinished = [row for row, chunk in enumerate(chunks) if chunk]
    return answers


@torch.no_grad()
def rollout(model, tokenizer, envs, cfg, skills=None, generator=None, greedy=False):
    """Play one episode in every environment (like SokobanEnv; a completion of nan: it was lost) and
    close it. model samples from its full softmax at cfg.temperature, or is `greedy`. skills: one or
    None each, read by a teacher that acts, or by skill_reader student. generator: on its device."""
    skills, n = skills or [None] * len(envs), cfg.rollout_batch
    if len(envs) > n:
        parts = [(envs[i:i + n], cfg, skills[i:i + n]) for i in range(0, len(envs), n)]
        return sum([rollout(model, tokenizer, *part, generator, greedy)
                    for part in tqdm(parts, "rollout", leave=False, disable=None)], [])
    model.eval()
    chat, decoder = Chat(tokenizer, cfg.prefill, cfg.max_skill_tokens), Decoder(model, cfg)
    render, follow = cache(chat.prompt), cache(chat.next_turn)           # many are equal
    eos_ids = chat.eos_ids | {*np.ravel(model.generation_config.eos_token_id)}     # one or several
    limit = cfg.max_context - (cfg.max_skill_tokens + 2) - cfg.max_new_tokens    # "\n\n"
    reads_skill = cfg.actor == "teacher" or cfg.skill_reader == "student"
    threads = any(getattr(env, "concurrent", False) for env in envs)     # they wait for a server
    run = ThreadPoolExecutor(len(envs)).map if threads else (
        lambda call, *rows: [call(*row) for row in zip(*rows)])
    trajectories, playing, chunks = [], [], []
    for env, task, skill in zip(envs, run(lambda env: env.reset(), envs), skills):
        prompts = [render(env.system_prompt, task, shown) for shown in (None, skill)]
        trajectories.append(t := Trajectory(
            env.task_id, skill, *prompts, [dict(role="user", content=task)],
            counts=dict(cut_answers=0, truncated=int(len(prompts[0]) > limit))))
        if t.counts["truncated"]:              # no turn is possible: its reward stays nan
            env.close()
        else:
            playing.append((t, env))
            chunks.append(prompts[reads_skill])                # x or x + S(x)
    while playing:
        answers = sample_answers(decoder, chunks, eos_ids, cfg, generator, greedy)
        texts = [chat.thinks + cfg.prefill + tokenizer.decode(
            y, skip_special_tokens=True, clean_up_tokenization_spaces=False) for y, _ in answers]
        steps = run(lambda pair, text: pair[1].step(text), playing, texts)
        still, chunks = [], []
        for row, ((t, env), (ids, logps), step) in enumerate(zip(playing, answers, steps)):
            assert isinstance(step, tuple) and len(step) == 2 and isinstance(step[0], str), (
                f"{type(env).__name__}.step returned {step!r:.99}; expected are a str and a bool")
            observation, done = step
            following = [] if done else follow(observation, ids[-1])
            t.ids += ids
            t.mask += [True] * len(ids)
            t.logps += logps
            t.turns += 1
            t.counts["cut_answers"] += ids[-1] not in eos_ids
            t.messages += [dict(role="assistant", content=texts[row]),
                           dict(role="user", content=observation)]
            full = len(t.prompt) + len(t.ids) + len(following) > limit
            if done or full:                   # CHOICE: a full context ends the episode
                reward = env.completion()
                assert isinstance(reward, (int, float, np.number, np.bool_)), (
                    f"{type(env).__name__}.completion returned {reward!r}; expected is a number")
                t.reward = round(float(reward), 9)             # a sum of tenths may be 1, too
                t.counts |= dict(truncated=int(not done)) | getattr(env, "counts", {})
                env.close()
            else:
                t.ids += following
                t.mask += [False] * len(following)
                still.append(row)
                chunks.append(ids[-1:] + following)            # the last token is unread yet
        if still and len(still) < len(playing):
            decoder.keep(still)
        playing = [playing[row] for row in still]
    return trajectories


# ---- Scoring: log-probs of the action tokens, for student and teacher alike ----------------------
def response_logps(model, trajectories, cfg, with_skill=False):
    """(logp, mask, logp_all). logp (B, T): of the action tokens, T the most in a row; mask (B, T):
    True where there is one; logp_all (n, V): the whole vocabulary at all n of them, in row order.
    Column t is the t-th action token under both prompts: these align. With actions A, B, C:
        x A o B, or x + S(x) A o B      logp: log p(A), log p(B)     mask: 1, 1
        x C,     or x + S(x) C                log p(C), 0                  1, 0"""
    prompts = [t.skill_prompt if with_skill else t.prompt for t in trajectories]
    rows = [prompt + t.ids for prompt, t in zip(prompts, trajectories)]
    sampled = [[False] * len(prompt) + t.mask for prompt, t in zip(prompts, trajectories)]
    ids, sampled = (pad_sequence([*map(torch.tensor, part)], batch_first=True).to(model.device)
                    for part in (rows, sampled))                                     # (B, L) each
    before = sampled.roll(-1, dims=1)          # the position that predicts each action token
    # The LM head gets these positions alone: all of them times a vocabulary would not fit.
    # Padding stands on the right, where causal attention cannot see it: no mask is needed.
    bfloat16, head = cfg.precision == "bfloat16", model.get_output_embeddings()
    with (head.register_forward_pre_hook(lambda head, hidden: (hidden[0][before],)),
          torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16)):
        logits = model(input_ids=ids, use_cache=False).logits.float()                # (n, V)
    logp_all = F.log_softmax(logits / cfg.temperature, dim=-1)
    parts = logp_all.gather(1, ids[sampled][:, None])[:, 0].split(sampled.sum(1).tolist())
    logp, mask = (pad_sequence(x, batch_first=True)
                  for x in (parts, [*map(torch.ones_like, parts)]))                  # (B, T) each
    return logp, mask.bool(), logp_all


def micro_batches(trajectories, max_tokens):
    """Lists of trajectories of similar length: at most max_tokens when padded, or one alone."""
    batches = []
    for t in sorted(trajectories, key=lambda t: len(t.skill_prompt) + len(t.ids)):
        if not batches or (len(batches[-1]) + 1) * (len(t.skill_prompt) + len(t.ids)) > max_tokens:
            batches.append([])
        batches[-1].append(t)
    return batches


# ---- Losses, Eq. 10-14. Pure functions of tensors: lift them into any trainer --------------------
def masked_mean(x, mask):
    """sum(x * mask) / sum(mask), a scalar, 0 if no mask is set. x, mask: (B, T). Needs: torch."""
    return torch.where(mask.bool(), x, 0.0).sum() / mask.sum().clamp(min=1)


def group_advantages(rewards, group_size, eps=1e-6):
    """A_i = (R_i - mean(R)) / (std(R) + eps) over each group of consecutive rollouts of one task.
    rewards: (n,), nan where an episode was lost. CHOICE: population std, eps. Returns (n,) float32,
    exactly 0 for nan, for equal rewards and for the only one of a group. Needs: math, torch."""
    r = torch.as_tensor(rewards, dtype=torch.float64)
    assert len(r) % group_size == 0, f"{len(r)} rewards: not a multiple of group_size={group_size}"
    r = r.view(-1, group_size)                                           # (tasks, G)
    r = r - r.nan_to_num(nan=math.inf).amin(1, keepdim=True)             # equal rewards: exactly 0
    deviation = r - r.nanmean(1, keepdim=True)
    std = deviation.square().nanmean(1, keepdim=True).sqrt()
    return (deviation / (std + eps)).nan_to_num(0.0).flatten().float()


def grpo_loss(logp_student, logp_old, adv, mask, clip_low, clip_high):
    """-1/N sum min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), a scalar. No KL to a reference.
    logp_*, mask: (B, T); adv: (B,). Padding may hold anything. Needs: torch, masked_mean."""
    mask = mask.bool()
    # r = pi_theta(y) / pi_theta_old(y). CHOICE: at most e^20
    ratio = torch.where(mask, logp_student - logp_old, 0.0).clamp(max=20).exp()      # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -masked_mean(torch.minimum(ratio * adv[:, None], clipped * adv[:, None]), mask)  # Eq. 10


def sdl_loss(logp_student, logp_teacher, logp_old, mask):
    """1/N sum rho * k3, k3 = exp(-l) - 1 + l: the importance-weighted reverse KL to the teacher.
    All (B, T); padding may hold anything; no gradient to logp_teacher and logp_old. For tokens that
    pi_old sampled, the expected gradient at a fixed prefix is that of KL(student || teacher), for
    every theta, because rho is differentiated too: d(rho * k3) / dlogp_student = rho * l. Example,
    rho = 1 and l = -1, 0, 1: loss (0.718 + 0 + 0.368) / 3, gradient [-1/3, 0, 1/3]. Returns a
    float64 scalar, since exp(-l) soon overflows float32. Needs: torch, masked_mean."""
    mask = mask.bool()
    p, q, old = (x.detach().double() for x in (logp_student, logp_teacher, logp_old))
    # Eq. 11: l = log pi_student - log pi_teacher
    log_ratio = torch.where(mask, p - q, 0.0)                            # (B, T)
    # Eq. 12: rho = pi_student / stopgrad(pi_old). CHOICE: at most e^20
    rho = torch.where(mask, p - old, 0.0).clamp(max=20).exp()            # (B, T)
    # Eq. 13: L_SDL = 1/N sum rho * (exp(-l) - 1 + l)
    k3 = torch.expm1(-log_ratio) + log_ratio
    # Autograd would take rho * l as a difference of numbers of size exp(-l): it is written out.
    zero = torch.where(mask, logp_student - logp_student.detach(), 0.0)      # its gradient is 1
    return masked_mean(rho * k3 + rho * log_ratio * zero, mask)


# ---- The algorithm -------------------------------------------------------------------------------
def sync_teacher(teacher, student):
    """theta-bar <- theta: copy every weight and buffer of the student into the teacher."""
    teacher.load_state_dict(student.state_dict())


@torch.no_grad()
def score_as_teacher(teacher, batch, cfg, synced):
    """Set logp_teacher, the log-probs (T,) of the sampled tokens under x + S(x). Without a skill,
    just synchronised, it would equal logp_old: then it stays None, and `update` takes logp_old."""
    teacher.eval()
    scored = [t for t in batch if t.skill is not None or not synced]
    for part in micro_batches(scored, cfg.micro_batch_tokens):
        logp, mask = response_logps(teacher, part, cfg, with_skill=True)[:2]
        for t, row, used in zip(part, logp, mask):
            t.logp_teacher = row[used]


def update(student, optimizer, batch, cfg, teacher=None):
    """Minimise L = L_GRPO + lambda * L_SDL (Eq. 14) over trajectories that carry adv and
    logp_teacher; if kl is exact the teacher is asked here. N counts the whole batch, of all
    processes. Returns metrics of the last step; AssertionError if one would not be finite."""
    student.train(bool(cfg.gradient_checkpointing))            # it needs train mode; dropout is 0
    n_tokens = all_sum(torch.tensor(float(sum(sum(t.mask) for t in batch)), device=student.device))
    names = "pg_loss sdl_loss log_ratio rho_gap clip_fraction entropy".split()
    for epoch in range(cfg.updates_per_iteration):
        optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(len(names), dtype=torch.float64, device=student.device)
        for part in micro_batches(batch, cfg.micro_batch_tokens):
            logp, mask, logp_all = response_logps(student, part, cfg, cfg.skill_reader == "student")
            if epoch == 0:                     # CHOICE: theta_old's, scored here, whoever acted
                for t, row, used in zip(part, logp.detach(), mask):
                    t.logp_old = row[used]
            adv = torch.tensor([t.adv for t in part], device=logp.device)            # (B,)
            logp_old = pad_sequence([t.logp_old for t in part], batch_first=True)    # (B, T)
            pg = grpo_loss(logp, logp_old, adv, mask, cfg.clip_low, cfg.clip_high)
            if cfg.kl == "exact" and cfg.lam:  # DEVIATION: KL(student || teacher) of all the words
                logp_teacher, _, taught = response_logps(teacher, part, cfg, with_skill=True)
                sdl = F.kl_div(taught, logp_all, log_target=True, reduction="none").sum(-1).mean()
            else:
                logp_teacher = pad_sequence([
                    t.logp_old if t.logp_teacher is None else t.logp_teacher for t in part], True)
                sdl = sdl_loss(logp, logp_teacher, logp_old, mask)
            logp_all = taught = None           # too large to be held during the next pass
            share = mask.sum() / n_tokens      # mean over the part * share = its sum / N
            # Eq. 14: L = L_GRPO + lambda * L_SDL
            (share * (cfg.reward_weight * pg + cfg.lam * sdl)).backward()
            ratio, a = (logp.detach() - logp_old).clamp(max=20).exp(), adv[:, None]
            clipped = ratio * a > ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * a
            means = [masked_mean(x, mask) for x in (
                logp.detach() - logp_teacher, (ratio - 1).abs(), clipped.float(), -logp_old)]
            totals += share * torch.stack([x.detach().double() for x in (pg, sdl, *means)])
        for p in student.parameters():         # some weights may be unused
            p.grad = all_sum(torch.zeros_like(p) if p.grad is None else p.grad)
        sums = dict(zip(names, all_sum(totals).tolist()))
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.max_grad_norm).item()
        assert math.isfinite(grad_norm + sum(sums.values())), f"{grad_norm=}, {sums}; lower lr, lam"
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # free them for the next rollout
    metrics = {x: sums[x] for x in names if cfg.lam or x not in ("sdl_loss", "log_ratio")}
    metrics |= dict(grad_norm=grad_norm, action_tokens=n_tokens.item())
    if cfg.actor == "student":                 # sampling against scoring
        gaps = [(t.logp_old.cpu() - torch.tensor(t.logps)).abs().max().item() for t in batch]
        metrics["rollout_gap"] = max(gaps)
    return metrics


def pick_tasks(tasks, cfg, k):
    """This process's tasks of iteration k. CHOICE: from the easiest quarter at first, then more."""
    tasks, mine = tasks[RANK::RANKS], cfg.tasks_per_iteration // RANKS
    opened = 0.25 + 0.75 * k / (cfg.curriculum * cfg.iterations) if cfg.curriculum else 1.0
    easiest = tasks[:max(mine, round(opened * len(tasks)))]
    return random.Random(derived_seed(cfg.seed + 10**6 * RANK, "tasks", k)).sample(easiest, mine)


@torch.no_grad()
def shown_skills(bank, picks, prompt, student, cfg, k):
    """{task: S(x)} from the UCB picks {task: entry}. Controls: another task's skill, or no words.
    DEVIATION, the paper's future work: a task without skills borrows the UCB pick, without credit,
    of a random task that has some, or of the nearest: by the cosine of the student's mean hidden
    states over the plain prompts (ids: `prompt(task)`), less their mean over the bank."""
    rng, lenders = random.Random(derived_seed(cfg.seed, "shown", k)), [*bank.entries]
    poor = [task for task in picks if not picks[task]]
    lender = {task: rng.choice([x for x in lenders if x != task] or [None]) for task in picks}
    if cfg.borrow == "nearest" and lenders and poor:
        rows = [torch.tensor(prompt(task)) for task in lenders + poor]
        ids, real = (pad_sequence(x, batch_first=True).to(student.device)
                     for x in (rows, [*map(torch.ones_like, rows)]))                     # (B, L)
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16"):
            h = torch.cat([student.base_model(input_ids=part, use_cache=False).last_hidden_state
                           for part in ids.split(32)])                               # (B, L, H)
        x = (h.float() * real[..., None]).sum(1) / real.sum(1, keepdim=True)        # (B, H)
        x = F.normalize(x - x[:len(lenders)].mean(0), dim=1)
        lender |= zip(poor, [lenders[i] for i in (x[len(lenders):] @ x[:len(lenders)].T).argmax(1)])
    skills = {}
    for task, pick in picks.items():
        elsewhere = cfg.skill_shown == "other" if pick else cfg.borrow != "no"
        pick = bank.select(lender[task]) if elsewhere else pick
        skills[task] = pick and (Skill("", "", "") if cfg.skill_shown == "empty" else pick["skill"])
    return skills


EVALS = 0, 1 / 20, 1 / 10, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 5 / 6        # shares of a run
METHODS = {
    "base": dict(iterations=0),                                    # untrained
    "skill_sd": {},
    "grpo": dict(lam=0.0, skill_reader="nobody"),
    "opd": dict(reward_weight=0.0, lam=1.0),                       # SDL alone, its weight CHOICE
    "skill_grpo": dict(lam=0.0, skill_reader="student"),           # skill in the student's prompt
    "frozen": dict(sync_every=0),                                  # ablations: frozen teacher
    "off_policy_frozen": dict(actor="teacher", sync_every=0),      # the teacher acts
    "off_policy": dict(actor="teacher"),
    "exact": dict(kl="exact"),                                     # DEVIATION: the exact KL
    "falling": dict(lam_until=0.5),                                # DEVIATION: to 0 at half
    "borrowed": dict(borrow="nearest"),                            # DEVIATION: see `borrow`
    "borrowed_random": dict(borrow="random"),                      # its control
    "borrowed_falling": dict(borrow="nearest", lam=0.3, lam_until=0.5),    # tuned in scarce
    "empty_borrowed_falling": dict(borrow="nearest", lam=0.3, lam_until=0.5, skill_shown="empty"),
    "other_skill": dict(skill_shown="other"),                      # controls: does its text matter?
    "empty_skill": dict(skill_shown="empty"),
}


def train(cfg):
    """The algorithm, for all METHODS, which differ by settings alone. Returns evaluate's result."""
    folder = run_folder(cfg)
    if (folder / "result.json").exists():      # finished before
        return json.loads((folder / "result.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    world = __import__(cfg.env, fromlist=["make_world"]).make_world(cfg)     # train: easiest first
    assert world.heldout and cfg.tasks_per_iteration <= len(world.train), (
        f"{cfg.tasks_per_iteration=}, {len(world.train)=}, {len(world.heldout)=}: too few tasks")
    student, tokenizer = load_model(cfg, world)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=cfg.lr, betas=(0.9, 0.95))    # CHOICE
    bank, generator = SkillBank(cfg.ucb_c, cfg.bank_size), torch.Generator(student.device)
    parts = dict(student=student, teacher=teacher, optimizer=optimizer)
    log, path = [], folder / "checkpoint.pt"   # log: a line of JSON per iteration
    if path.exists():                          # go on
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        bank.load_state_dict(state["banks"][RANK])
        log = state["log"]

    @cache
    def prompt(task):                          # x as ids
        with closing(world.make_env(task)) as env:
            return Chat(tokenizer, cfg.prefill).prompt(env.system_prompt, env.reset())

    for k in tqdm(range(len(log), cfg.iterations), folder.name, disable=RANK > 0 or None):
        fallen = k / cfg.iterations / cfg.lam_until if cfg.lam_until else 0.0    # lambda's share
        now = replace(cfg, lam=cfg.lam * max(0.0, 1 - fallen))
        heldout = evaluate(student, tokenizer, world, cfg, k) if cfg.evals and k in [
            round(share * cfg.iterations) for share in EVALS] else {}
        start = time.perf_counter()
        generator.manual_seed(derived_seed(cfg.seed + 10**6 * RANK, "rollout", k))

        # 1. theta-bar <- theta. theta_old is no copy: `update` scores logp_old before it steps
        synced = cfg.sync_every > 0 and k % cfg.sync_every == 0
        if synced:
            sync_teacher(teacher, student)

        # 2. S(x) <- UCB(B(x)); G trajectories per task, the student under the plain prompt
        tasks = pick_tasks(world.train, cfg, k)                # their ids
        picks = {task: bank.select(task) for task in tasks}    # None where B(x) is empty
        decided = [e["picks"] > 0 and len(bank.entries[x]) > 1 for x, e in picks.items() if e]
        skills = shown_skills(bank, picks, prompt, student, cfg, k)
        rows = [task for task in tasks for _ in range(cfg.group_size)]
        episodes = rollout(teacher if cfg.actor == "teacher" else student, tokenizer,
                           [world.make_env(task) for task in rows], cfg,
                           [skills[task] for task in rows], generator)
        assert [t.task_id for t in episodes] == rows, "an env.task_id is not the id of its task"
        # 3. rewards, group advantages. CHOICE: lost episodes (nan) are in no mean, N included
        adv = group_advantages([t.reward for t in episodes], cfg.group_size)
        for t, a in zip(episodes, adv.tolist()):
            t.adv = a
        batch = [t for t in episodes if not math.isnan(t.reward)]
        assert batch, f"every episode was lost: {episodes[0].counts}, {episodes[0].messages}"
        groups = {task: [t for t in batch if t.task_id == task] for task in tasks}
        # 4. the teacher re-scores the same tokens under x + S(x) (if kl is exact: inside `update`)
        if now.lam and now.kl == "sampled":
            score_as_teacher(teacher, batch, now, synced)

        # 6a. credit the picks, write up each group's best trajectory (CHOICE: then the shortest)
        for task, group in groups.items():
            if picks[task] and group:
                bank.credit(picks[task], np.mean([t.reward for t in group]))
        best = [min(g, key=lambda t: (-t.reward, t.turns)) for g in groups.values() if g]
        chosen = [t for t in best
                  if cfg.skill_reader != "nobody" and bank.wants(t.task_id, t.reward)]
        analyze = partial(summarize, chosen, student, tokenizer, cfg, generator)
        if cfg.summarizer.startswith("http"):                  # while 5 runs; the student after it
            analyze = ThreadPoolExecutor(1).submit(analyze).result

        # 5. minimise L over the tokens
        metrics = update(student, optimizer, batch, now, teacher)
        # 6b. new skills enter the bank: they can be picked from iteration k + 1 on
        written = analyze()
        for t, skill in written:
            bank.add(t.task_id, skill, t.reward)

        log.append(log_line(
            batch, metrics, iteration=[k], lost=[math.isnan(t.reward) for t in episodes],
            skill_share=[skill is not None for skill in skills.values()], lam=[now.lam],
            bank_skills=[sum(map(len, bank.entries.values()))], ucb_decided=decided,
            skills_failed=[len(chosen) - len(written)], seconds=[time.perf_counter() - start],
            **{f"heldout_{how}": [x == 1 for x in rewards] for how, rewards in heldout.items()},
            zero_spread_groups=[len({t.reward for t in group}) == 1 for group in groups.values()]))
        write(folder / "log.jsonl", "".join(log))
        if (k + 1) % cfg.save_every == 0 or k + 1 == cfg.iterations:
            states = {name: part.state_dict() for name, part in parts.items()}
            write(path, states | dict(log=log, banks=gather(bank.state_dict())))

    result = evaluate(student, tokenizer, world, cfg, cfg.iterations)
    curve = [[line["iteration"], line["heldout_sampled"]]
             for line in map(json.loads, log) if "heldout_sampled" in line]
    result["curve"] = [*curve, [cfg.iterations, np.equal(result["sampled"][:512], 1).mean().item()]]
    if RANK == 0:
        student.save_pretrained(folder / "student")
        tokenizer.save_pretrained(folder / "student")
    write(folder / "student" / "skill_sd.json", json.dumps(asdict(cfg), indent=1))
    write(folder / "bank.json", json.dumps(gather(bank.state_dict()), indent=1))
    write(folder / "result.json", json.dumps(result))
    return result


# ---- Here the method ends. Processes: each its share of tasks and skills; the run's folder -------
def all_sum(tensor):
    if RANKS > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def gather(item):
    items = [item] * RANKS
    if RANKS > 1:
        torch.distributed.all_gather_object(items, item)
    return items


def run_folder(cfg):
    """Named by method, model, seed and a hash of all settings that the result depends on."""
    settings = {name: value for name, value in asdict(cfg).items()
                if name not in ("preset", "seeds", "jobs", "out", "device", "save_every")}
    key = derived_seed(json.dumps([settings, RANKS])) % 16**6
    return Path(cfg.out) / f"{cfg.method}-{Path(cfg.model).name}-seed{cfg.seed}-{key:06x}"


def write(path, data):
    """Replace a file by a finished temporary one: it is whole or absent. Process 0 writes."""
    if RANK == 0:
        part = path.with_name(path.name + ".part")
        torch.save(data, part) if path.suffix == ".pt" else part.write_text(data)
        os.replace(part, path)


def log_line(batch, metrics, **lists):
    """One line of JSON: means over lists, over the batch and over the processes."""
    lists |= dict(reward=[t.reward for t in batch], success=[t.reward == 1.0 for t in batch],
                  turns=[t.turns for t in batch])
    lists |= {f"count_{name}": [each.counts.get(name, 0) for each in batch]
              for t in batch for name in t.counts}
    metrics |= {name: np.mean(values) for name, values in lists.items() if values}
    rows = gather(metrics)
    return json.dumps({name: float(np.mean([row[name] for row in rows if name in row]))
                       for name in dict.fromkeys(name for row in rows for name in row)}) + "\n"


def ask_server(trajectory, cfg, timeout=60):
    """The answer of an OpenAI-compatible server to a transcript, or after three tries the reason
    why there is none. No failure costs more than a skill."""
    body = dict(model=cfg.summarizer_model, max_tokens=cfg.summary_tokens, messages=[
        dict(role="system", content=SUMMARIZER_PROMPT),
        dict(role="user", content=trajectory.transcript())])
    url = cfg.summarizer.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {
        "Content-Type": "application/json", "User-Agent": "skill-sd"})
    key = os.environ.get("OPENAI_API_KEY", "").strip() or "EMPTY"        # local servers need none
    request.add_unredirected_header("Authorization", f"Bearer {key}")
    for wait in (1, 4, 0):
        said, reason, end = b"", "no text", time.monotonic() + timeout     # for a slow stream
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                while time.monotonic() < end and (part := answer.read1(1 << 20)):
                    said += part
            text = json.loads(said)["choices"][0]["message"]["content"]
            if isinstance(text, list):         # of parts, some of which may be thinking
                text = "".join(part["text"] for part in text if part["type"] == "text")
            if text.strip():
                return text
        except Exception as error:             # of many kinds
            with suppress(Exception):          # an HTTP error has a body, which may quote the key
                said = said or error.read(300)
            reason = error if isinstance(error, OSError) else reason
        time.sleep(wait)
    return f"[{cfg.summarizer}: {reason} {said[:300]}]".replace(key, "***")


def load_model(cfg, world):
    """(student, tokenizer), float32: the built-in model, whose warm start is kept for the next run,
    or a chat model: a folder, or a name on the Hugging Face hub. Custom model code is never run."""
    path = cfg.model
    if path == "tiny":
        path = sokoban_env.player_folder(cfg, SKILL_TEXT)
        if RANK == 0 and not path.exists():
            sokoban_env.warm_start(path, cfg, SKILL_TEXT, world.levels)
        gather(None)                           # the other processes wait for it
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        for name in vars(config):              # theta_old must be the policy that sampled
            if "dropout" in name or name.endswith("_pdrop"):
                setattr(config, name, 0.0)
        config.gradient_checkpointing = bool(cfg.gradient_checkpointing)
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, trust_remote_code=False).to(cfg.device)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:                 # each of the libraries has its own
        raise ValueError(f"model={str(path)!r} cannot be loaded on {cfg.device}; give a folder, or "
                         f"an instruct model's name. {type(error).__name__}: {error}") from error
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if model._is_stateful or kinds or rope.get("rope_type") in ("longrope", "dynamic"):
        raise ValueError(f"model={str(path)!r}: its recurrent layers, or keys that change with the "
                         "length, do not fit the cache; use a model of plain attention")
    window = getattr(text, "max_position_embeddings", cfg.max_context)
    assert cfg.max_context <= window, f"max_context={cfg.max_context}: {path} reads only {window}"
    return model, tokenizer


def evaluate(model, tokenizer, world, cfg, k):
    """{"sampled", "greedy"}: completions of the held-out tasks after k iterations, under the plain
    prompt; before the last iteration, of the first 512. A lost episode counts 0."""
    result, generator = {}, torch.Generator(model.device)
    tasks = world.heldout[:None if k == cfg.iterations else 512]
    for how in ("sampled", "greedy"):
        generator.manual_seed(derived_seed(cfg.seed + 10**6 * RANK, "evaluate"))
        envs = [world.make_env(task) for task in tasks[RANK::RANKS]]
        played = rollout(model, tokenizer, envs, cfg, generator=generator, greedy=how == "greedy")
        shares = gather([t.reward for t in played])            # of the processes; in order again:
        result[how] = [shares[i % RANKS][i // RANKS] for i in range(len(tasks))]
    sampled, greedy = (100 * np.equal(rewards, 1).mean() for rewards in result.values())
    if RANK == 0:
        tqdm.write(f"{cfg.method}, seed {cfg.seed}, after {k} iterations: {sampled:.1f} % sampled, "
                   f"{greedy:.1f} % greedy of {len(tasks)} held-out tasks; "
                   f"{np.isnan([*result.values()]).sum()} episodes lost")
    return {how: np.nan_to_num(rewards).tolist() for how, rewards in result.items()}


def print_table(results):
    """results: [(method, seed, evaluated)]. 95 % intervals over tasks for one seed, else over seeds
    (Student's t). comp: mean completion. area: mean sampled acc along the run, first 512 tasks."""
    rows, curves = {}, {}
    for method, _, result in results:
        sampled, greedy, (x, y) = (
            np.array(result[name]).T for name in ("sampled", "greedy", "curve"))
        area = np.diff(x) @ (y[1:] + y[:-1]) / 2 / x[-1] if len(x) > 1 else np.nan if x[0] else y[0]
        rows.setdefault(method, []).append([
            sampled == 1, sampled, greedy == 1, greedy, np.full(len(greedy), area)])
        curves.setdefault(method, []).append(y)
    rows = {name: 100 * np.array(runs) for name, runs in rows.items()}       # (seeds, 5, tasks)
    ours = "skill_sd" if "skill_sd" in rows else results[-1][0]
    rows |= {f"{ours} - {name}": rows[ours] - rows[name] for name in [*rows] if name != ours}
    (seeds, _, tasks), width = rows[ours].shape, max(map(len, rows)) + 3
    print(f"\n{tasks} held-out tasks, {seeds} seed(s); percent, ± 95 % interval\n{'':{width}}"
          "sampled acc     sampled comp    greedy acc      greedy comp     area")
    quantile = [math.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, *[2.26] * 20, 2.05]
    for name, values in rows.items():
        values = values.mean(2) if seeds > 1 else values[0].T            # (seeds or tasks, 5)
        half = quantile[min(len(values), 30) - 1] * values.std(0, ddof=1) / math.sqrt(len(values))
        cells = [f"{mean:5.1f} ±{h:5.1f}" if h > 1e-9 else f"{mean:5.1f}       "
                 for mean, h in zip(values.mean(0), half)]
        print(f"{name:<{width}}{'    '.join(cells)}".rstrip())
    print(f"\nheld-out sampled acc, 0 to 100 %, after iterations {x.astype(int).tolist()}")
    for name, runs in curves.items():
        blocks = [chr(0x2581 + min(7, int(8 * y))) for y in np.mean(runs, 0)]
        print(f"{name:<{width}}{''.join(blocks)}")


# ---- Presets. Precedence: a method's row, typed, saved with a model, a preset --------------------
CHAT = dict(summarizer="self", precision="bfloat16", gradient_checkpointing=1, lr=1e-6, lam=0.001,
            evals=0)
PAPER = CHAT | dict(model="Qwen/Qwen3-4B-Instruct-2507", max_turns=40, rollout_batch=16)
PRESETS = {
    "tiny": {},                                # reward is plentiful
    "scarce": dict(min_moves=5, max_moves=12, max_turns=16, timid=0.9, tasks_per_iteration=4,
                   group_size=4, iterations=160, lr=5e-4, curriculum=0.0),
    "small": CHAT | dict(model="Qwen/Qwen2.5-0.5B-Instruct", iterations=100, max_turns=20,
                         train_levels=96, test_levels=64, max_new_tokens=16, prefill="<answer>",
                         max_context=4096, rollout_batch=128),               # a GPU of 24 GB
    # the paper's worlds. lam: its best on AppWorld. CHOICE: what it leaves open
    "paper": PAPER | dict(iterations=180, boxes=2, max_moves=20, train_levels=96, test_levels=64,
                          max_new_tokens=256, max_context=16384),
    "appworld": PAPER | dict(iterations=300, env="appworld_adapter", curriculum=0.0,
                             max_new_tokens=512, max_context=32768),
}


def configure(typed, method, seed):
    """The Config of one run. A model trained by this program brings its settings of old."""
    assert method in METHODS, f"method={method!r}: must be all, or of {', '.join(METHODS)}"
    trained = Path(typed.get("model", "")) / "skill_sd.json"
    saved = json.loads(trained.read_text()) if trained.exists() and "preset" not in typed else {}
    left_out = {"jobs", "out", "device", "save_every"}.union(*METHODS.values())
    saved = {f.name: saved[f.name] for f in fields(Config) if f.name in {*saved} - left_out}
    fitting = "tiny" if typed.get("model", "tiny") == "tiny" else "small"
    fitting = "appworld" if typed.get("env", "sokoban_env") != "sokoban_env" else fitting
    preset = typed.get("preset") or saved.get("preset") or fitting
    for name, value in METHODS[method].items():
        assert typed.get("method") != method or typed.get(name, value) == value, (
            f"{name}={typed[name]!r}: method {method} means {value!r}")
    return Config(**PRESETS[preset] | saved | typed | METHODS[method]
                  | dict(method=method, seed=seed, preset=preset))


def parse_args(argv=None):
    """What was typed, as a dict. Config's comments are the help texts."""
    parser = argparse.ArgumentParser(description="Skill-SD: see the top of this file.")
    source = inspect.getsource(Config)
    for f in fields(Config):
        comment = re.search(rf"^    {f.name}: .*?  # (.*?)(  +CHOICE)?$", source, re.MULTILINE)
        parser.add_argument("--" + f.name.replace("_", "-"), type=type(f.default),
                            choices=get_args(f.type) or None, default=argparse.SUPPRESS,
                            help=f"{comment[1]} (default: {f.default!r})".replace("%", "%%"))
    return vars(parser.parse_args(argv))


def train_share(i, plans):
    """In process i of `run`: every `jobs`-th run."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)               # comes when the parent dies, too
    for cfg in plans[i::plans[0].jobs]:
        train(cfg)


def run(plans):
    """[(method, seed, evaluated)] of the Configs, `jobs` at a time in processes of their own."""
    if (jobs := plans[0].jobs) > 1:
        os.environ |= dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // jobs)), TQDM_DISABLE="1")
        torch.multiprocessing.spawn(train_share, (plans,), jobs)         # they end with this one
    return [(cfg.method, cfg.seed, train(cfg)) for cfg in plans]         # finished: read


def main():
    typed = parse_args()
    method, seed = typed.get("method", "skill_sd"), typed.get("seed", 0)
    methods = METHODS if method == "all" else dict.fromkeys(["base", *method.split(",")])
    try:
        seeds = range(seed, seed + max(1, typed.get("seeds", 1)))
        plans = [configure(typed, name, s) for name in methods for s in seeds]   # all checked first
        if RANKS > 1:
            if plans[0].device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group()             # nccl for GPUs, gloo for CPUs
            atexit.register(torch.distributed.destroy_process_group)
            atexit.register(time.sleep, 0.1)   # before: gloo's threads may hold tensors still
        results = run(plans)
        if RANK == 0:
            print_table(results)
            if RANKS == 1 and [*methods] == ["base", "skill_sd"] and plans[-1].model == "tiny":
                sokoban_env.watch(plans[-1])
    except (ValueError, AssertionError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
