# SPDX-License-Identifier: MIT
"""Skill-SD in one file: skill-conditioned self-distillation for multi-turn LLM agents.

A reference implementation, written from the paper, to be read beside it:
    Skill-SD, arXiv 2604.10674, https://arxiv.org/abs/2604.10674

A student plays tasks over many turns with a plain prompt. Each finished trajectory can be written
up as a short skill. A UCB bandit picks one skill per task; only the teacher - the same network,
synchronised every iteration - reads it, and re-scores the tokens that the student sampled. The
student is trained by GRPO's reward loss plus an importance-weighted reverse KL to that teacher.

    symbol          here            meaning
    x               task            the plain task prompt: system prompt and first observation
    S(x), B(x)      skill, bank     the skill picked for this task, and all skills of this task
    y_t, y_<t       ids             sampled action tokens; all that stands before them
    theta           student         the trained weights; theta_old: the same, when sampling
    theta-bar       teacher         the weights that read the skill
    tau_i, i<=G     trajectory      one of `group_size` rollouts of a task
    R_i, A_i        reward, adv     completion in [0, 1]; group-relative advantage
    l_it            log_ratio       log-prob of y_t: student's minus teacher's
    rho_it          rho             prob of y_t: student's over (stopped) theta_old's
    N               n_tokens        all valid action tokens of the batch

    in the paper                        in this file             checked by (test_skill_sd.py)
    skill fields, Analyze(tau, x)       Skill, SUMMARIZER_PROMPT test_parse_skill_*
    UCB retrieval                       SkillBank.select         test_ucb_by_hand
    pi(.|x), pi(.|x + S(x))             Chat.prompt              test_teacher_sees_skill_only
    group advantage, GRPO loss, Eq. 10  group_advantages, grpo_loss   test_advantages_*, test_grpo_*
    l, rho, SDL loss, Eq. 11-13         sdl_loss                 test_sdl_*
    total loss, Eq. 14                  update                   test_update_*
    dynamic synchronisation             sync_teacher             test_sync_teacher
    the algorithm                       train                    test_every_method_trains

    python skill_sd.py                          the demo: warm start, train, table
    python skill_sd.py --method all --seeds 5   every method, ablation and control, one table
    python skill_sd.py --model NAME_OR_DIR      a chat model of Hugging Face's; see PRESETS
    python skill_sd.py --eval runs/NAME         play the held-out levels with a finished student
    python skill_sd.py --resume runs/NAME       go on with a run that was stopped
    python skill_sd.py --show-prompts           student's and teacher's tokens, side by side

Deviations from the paper are marked DEVIATION, values the paper does not give CHOICE; the README
collects both.
"""
import argparse
import copy
import dataclasses
import hashlib
import http.client
import inspect
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import HfApi
from jinja2 import TemplateError
from safetensors.torch import load_model as load_weights, save_model as save_weights
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache, DynamicLayer

import sokoban_env


# =============================================================================================
# Configuration
# =============================================================================================

@dataclass
class Config:
    """Every setting. The command line is made from this: --lam 0.001, --max-turns 40."""
    method: str = "skill_sd"         # a row of METHODS, or `all`
    preset: str = ""                 # a row of PRESETS; empty: small if a model is named, else tiny
    seed: int = 0                    # of training levels, warm start, sampling
    seeds: int = 1                   # how many seeds to run, from `seed` on
    out: str = "runs"                # folder for runs and cached warm starts
    name: str = ""                   # name of the run's folder in it; empty: METHOD-seedN
    device: str = "auto"             # auto (cuda if there is one, else cpu), cpu, cuda
    save_every: int = 20             # iterations between checkpoints
    split: str = "test"              # levels for the table: test, or val while tuning
    tune_temperature: int = 0        # 1: sample held-out play at the temperature best on validation
    threads: int = 0                 # CPU threads; 0: as torch likes

    # -- the method
    group_size: int = 8              # G, rollouts per task                             CHOICE
    tasks_per_iteration: int = 16    # tasks per iteration                              CHOICE
    iterations: int = 60             # iterations; the paper runs 180 on Sokoban
    updates_per_iteration: int = 1   # optimiser steps on each batch                    CHOICE
    reward_weight: float = 1.0       # weight of the GRPO loss; 0 leaves SDL alone (OPD)
    lam: float = 0.1                 # lambda of SDL, if the teacher reads; paper: 0.001  CHOICE
    skill_reader: str = "teacher"    # who sees the skill while training: teacher, student, nobody
    sync_every: int = 1              # iterations between teacher synchronisations; 0: never
    actor: str = "student"           # who samples the tokens: student, or teacher with its skill
    skill_shown: str = "own"         # own: the picked one; controls: other (a random task's), empty
    clip_low: float = 0.2            # eps_l                                            CHOICE
    clip_high: float = 0.28          # eps_h                                            CHOICE
    adv_eps: float = 1e-6            # added to the group's standard deviation          CHOICE
    lr: float = 1e-3                 # AdamW; 1e-6 is usual for billions of weights     CHOICE
    max_grad_norm: float = 1.0       # gradients are clipped to this norm               CHOICE
    temperature: float = 1.0         # of sampling and of scoring alike                 CHOICE

    # -- skills
    summarizer: str = "auto"         # rules, self, http://HOST/v1; auto: rules if tiny, else self
    summarizer_model: str = ""       # the model to ask for there; key in OPENAI_API_KEY
    summarizer_timeout: float = 60.0  # seconds for one try of three                    CHOICE
    ucb_c: float = 1.0               # c, weight of exploration in UCB                  CHOICE
    bank_size: int = 4               # skills kept per task                             CHOICE
    max_skill_tokens: int = 256      # a skill longer than this is cut in the prompt    CHOICE
    summary_tokens: int = 400        # answer length of a summarizing language model    CHOICE

    # -- the world
    env: str = "sokoban"             # sokoban, or appworld (see the README; not for the tiny model)
    size: int = 6                    # room size, walls included, as in the paper
    boxes: int = 1                   # boxes per room; the paper has 2
    min_moves: int = 3               # shortest optimal solution                        CHOICE
    max_moves: int = 8               # longest optimal solution                         CHOICE
    max_turns: int = 12              # moves per episode; the paper allows 40
    train_levels: int = 256          # training levels; the paper has 96
    test_levels: int = 512           # held-out levels; the paper uses 64
    level_seed: int = 0              # of the validation and test levels
    curriculum: float = 0.5          # share of the iterations until all levels are in  CHOICE

    # -- the model
    model: str = "tiny"              # tiny: the embedded model; else a Hugging Face name or folder
    precision: str = "float32"       # float32 or bfloat16, of rollout and scoring alike
    gradient_checkpointing: int = 0  # 1: keep one activation per layer, compute the rest again
    prefill: str = ""                # every answer begins with this, for student and teacher
    max_new_tokens: int = 1          # longest answer, in tokens; the tiny model answers one word
    max_context: int = 1024          # longest conversation, in tokens; longer ones are truncated
    rollout_batch: int = 512         # conversations played at once
    micro_batch_tokens: int = 16384  # tokens per forward pass while scoring and training

    # -- warm start of the embedded model (levels and warm start were chosen on validation levels)
    warm_demos: int = 32000          # demonstrations
    warm_batch: int = 32             # demonstrations per step
    warm_lr: float = 3e-3            # peak learning rate
    warm_timid: float = 0.5          # share of timid moves in the play that is shown
    warm_notes: float = 0.6          # share of demonstrations whose player has a skill


# The size of the experiment. What is typed comes before it, a method's row before both.
PRESETS = {
    "tiny": {},
    # CHOICE: an instruct model that trains on one GPU of 24 GB
    "small": dict(
        model="Qwen/Qwen2.5-0.5B-Instruct", precision="bfloat16", gradient_checkpointing=1,
        lr=1e-6, lam=0.001, iterations=100, max_turns=20, train_levels=96, test_levels=64,
        max_new_tokens=16, prefill="<answer>", max_context=4096, rollout_batch=128),
    # the paper's Sokoban; lam: its best on AppWorld; what it does not give is CHOICE
    "paper": dict(
        model="Qwen/Qwen3-4B-Instruct-2507", boxes=2, train_levels=96, test_levels=64,
        iterations=180, max_turns=40, lam=0.001, sync_every=1,
        lr=1e-6, max_moves=20, max_new_tokens=256, max_context=16384, rollout_batch=16,
        precision="bfloat16", gradient_checkpointing=1),
}
# Methods differ by settings alone; one loop runs them all.
METHODS = {
    "base": dict(iterations=0),                                    # the warm start
    "base_best_t": dict(iterations=0, tune_temperature=1),         # is it more than sharper play?
    "skill_sd": {},
    "grpo": dict(lam=0.0, skill_reader="nobody"),
    "opd": dict(reward_weight=0.0, lam=1.0),                       # SDL alone, its weight CHOICE
    "skill_grpo": dict(lam=0.0, skill_reader="student"),           # skill in the student's prompt
    "frozen": dict(sync_every=0),                                  # ablations: on-policy, frozen
    "off_policy_frozen": dict(actor="teacher", sync_every=0),
    "off_policy": dict(actor="teacher"),
    "other_skill": dict(skill_shown="other"),                      # controls: does content matter?
    "empty_skill": dict(skill_shown="empty"),
}


def settings(given):
    """What a command line means: its preset's row, over it what was typed, and the method's row."""
    preset = given.get("preset") or ("tiny" if given.get("model", "tiny") == "tiny" else "small")
    row = PRESETS.get(preset, {}) | (dict(prefill="") if given.get("env") == "appworld" else {})
    return row | given | METHODS.get(given.get("method"), {})


def check(cfg):
    """ValueError naming the field, the value and what would be right."""
    choices = dict(method=[*METHODS, "all"], preset=["", *PRESETS], env=["sokoban", "appworld"],
                   skill_reader=["teacher", "student", "nobody"], actor=["student", "teacher"],
                   skill_shown=["own", "other", "empty"], split=["test", "val"],
                   precision=["float32", "bfloat16"], gradient_checkpointing=[0, 1],
                   tune_temperature=[0, 1])
    positive = ("save_every seeds group_size tasks_per_iteration updates_per_iteration temperature "
                "lr max_grad_norm adv_eps bank_size max_turns train_levels test_levels "
                "max_new_tokens max_context rollout_batch micro_batch_tokens warm_batch "
                "summary_tokens summarizer_timeout").split()
    for f in dataclasses.fields(cfg):
        name, value = f.name, getattr(cfg, f.name)
        if isinstance(value, bool) or not isinstance(value, (int, float) if f.type is float
                                                     else f.type):
            raise ValueError(f"{name}={value!r}: must be of type {f.type.__name__}")
        if name in choices and value not in choices[name]:
            raise ValueError(f"{name}={value!r}: must be one of "
                             f"{', '.join(map(str, choices[name]))}")
        if f.type is not str and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value}: must be a finite number, 0 or more")
        if name in positive and not value:
            raise ValueError(f"{name}={value}: must be above 0")
        if name in ("warm_timid", "warm_notes", "curriculum") and value > 1:
            raise ValueError(f"{name}={value}: a share, at most 1")
    served = re.match("https?://", cfg.summarizer)
    for name, wrong, right in (
            ("group_size", cfg.group_size < 2 and cfg.reward_weight,
             "the advantage of one rollout alone is always 0; use 2 or more"),
            ("tasks_per_iteration", cfg.iterations and cfg.tasks_per_iteration > cfg.train_levels,
             f"at most train_levels={cfg.train_levels}"),
            ("actor", cfg.actor == "teacher" and cfg.skill_reader != "teacher",
             f"with skill_reader={cfg.skill_reader!r}: a teacher that acts must be the one that "
             "reads the skill"),
            ("summarizer", not served and cfg.summarizer not in ("auto", "rules", "self"),
             "must be auto, rules, self, or where an OpenAI-compatible server is, such as "
             "http://localhost:8000/v1"),
            ("summarizer_model", served and not cfg.summarizer_model,
             f"with summarizer={cfg.summarizer!r}: name the model that the server is to use (it "
             "lists them under /models)"),
            ("summarizer", cfg.summarizer == "rules" and cfg.env != "sokoban",
             f"with env={cfg.env!r}: the analyst knows Sokoban only; use self"),
            ("reward_weight", not cfg.reward_weight
             and not (cfg.lam and cfg.skill_reader == "teacher"),
             f"with lam={cfg.lam}, skill_reader={cfg.skill_reader!r}: nothing would be learned; "
             "SDL needs lam above 0 and a reading teacher"),
            ("tune_temperature", cfg.tune_temperature
             and (cfg.env != "sokoban" or cfg.split != "test"),
             f"with env={cfg.env!r}, split={cfg.split!r}: it is tuned on Sokoban's validation "
             "levels, and reported on its test levels")):
        if wrong:
            raise ValueError(f"{name}={getattr(cfg, name)!r}: {right}")
    return cfg


def derived_seed(*parts):
    """A 63-bit seed from whole numbers and words; the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# =============================================================================================
# Several processes (torchrun). With one, as in most of the story, none of this matters.
# Tasks are divided over the ranks and all episodes gathered, so that each rank keeps the same bank;
# a rank scores its own episodes, and the gradients are summed.
# =============================================================================================

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def start_ranks(cfg):
    """Join the other processes of `torchrun --nproc_per_node=N skill_sd.py`."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        gpu = cfg.device != "cpu" and torch.cuda.is_available()
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The longest wait is for rank 0 while it writes all skills of an iteration.
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2))
        if cfg.tasks_per_iteration % ranks():
            raise ValueError(f"tasks_per_iteration={cfg.tasks_per_iteration}: must be a multiple "
                             f"of the {ranks()} processes")


def gather(mine):
    """Every rank's list, put together as if items[rank()::ranks()] had made each."""
    if ranks() == 1:
        return mine
    parts = [None] * ranks()
    dist.all_gather_object(parts, mine)
    whole = [None] * sum(map(len, parts))
    for r, part in enumerate(parts):
        whole[r::ranks()] = part
    return whole


def from_rank_0(call):
    """What the call returns on rank 0, on every rank: texts sampled twice could differ."""
    answer = [None if rank() else call()]
    if ranks() > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


# =============================================================================================
# Skills: three fields written from one finished trajectory
# =============================================================================================

@dataclass(frozen=True)
class Skill:
    """What one finished trajectory teaches, in the paper's three fields."""
    success_analysis: str
    mistake_analysis: str
    golden_workflow: str


SKILL_TEXT = """Notes from an earlier attempt at this task
What worked: {success_analysis}
Mistakes: {mistake_analysis}
Workflow: {golden_workflow}"""

# CHOICE: the paper's wording is not public.
SUMMARIZER_PROMPT = """You review one finished attempt of an agent at a task and write a skill for \
the next attempt at the same task: short, concrete, and true to what the transcript shows.

Answer with one JSON object and nothing else. It has exactly these three fields, each a string:
"success_analysis": which choices were right, and why (at most three sentences).
"mistake_analysis": where the attempt failed or lost time: a wrong assumption, an unchecked \
argument, a step that could not be undone (at most three sentences).
"golden_workflow": the procedure to follow next time, as short ordered steps.

Do not retell the transcript. If the attempt failed, say what to do instead.
The completion is the share of the task that was done at the end; 1.00 is success."""


def transcript(trajectory):
    """The finished conversation as the text that a summarizing language model reads."""
    turns = "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in trajectory.messages)
    return f"{turns}\n\n[completion: {trajectory.reward:.2f}]"


def parse_skill(text):
    """The Skill in a summarizer's answer. Forgiven are code fences, text around the object, more
    fields, and an object that is cut off or ill-formed around three whole strings.

    ValueError when the three fields, as text and not all empty, are not in it.
    """
    names = [f.name for f in dataclasses.fields(Skill)]
    if len(text) > 100_000:
        raise ValueError(f"skill text of {len(text)} characters: at most 100000 are read")
    text = text.rpartition("</think>")[2]

    def objects():
        for start in [m.start() for m in re.finditer(r"\{", text)][:100]:
            try:
                yield json.JSONDecoder(strict=False).raw_decode(text, start)[0]
            except (ValueError, RecursionError):
                continue
        string = r'"(?:[^"\\]|\\.)*"'
        cut_off = re.search(r"\s*,\s*".join(rf'"{name}"\s*:\s*({string})' for name in names), text)
        try:
            yield dict(zip(names, [json.loads(value, strict=False)
                                   for value in cut_off.groups()] if cut_off else []))
        except ValueError:
            pass                               # an escape that JSON does not have
    for found in objects():
        if all(isinstance(found.get(name), str) for name in names):
            # A lone surrogate is legal JSON, but no text that can be encoded.
            values = [found[name].encode("utf-8", "replace").decode().strip() for name in names]
            if any(values):
                return Skill(*values)
    raise ValueError(f"no JSON object with the text fields {', '.join(names)} in {text[:80]!r}")


def ask_server(text, cfg):
    """What an OpenAI-compatible server answers to SUMMARIZER_PROMPT and a transcript. Tried three
    times where that may help; raises what the last try raised, or what reading its JSON did."""
    body = dict(model=cfg.summarizer_model, max_tokens=cfg.summary_tokens, messages=[
        dict(role="system", content=SUMMARIZER_PROMPT), dict(role="user", content=text)])
    request = urllib.request.Request(cfg.summarizer.rstrip("/") + "/chat/completions",
                                     json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    if key := os.environ.get("OPENAI_API_KEY"):
        request.add_unredirected_header("Authorization", f"Bearer {key.strip()}")
    for wait in (1, 4, None):
        deadline, received = time.monotonic() + cfg.summarizer_timeout, b""
        try:
            with urllib.request.urlopen(request, timeout=cfg.summarizer_timeout) as answer:
                while block := answer.read1(1 << 16):          # one that drips must end as well
                    received += block
                    if time.monotonic() > deadline or len(received) > 1 << 20:
                        raise TimeoutError("the answer is too long or too slow")
            return str(json.loads(received)["choices"][0]["message"]["content"])
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 500)                 # 401, 404 ... would only come again
            if wait is None or code < 500 and code not in (408, 429):
                said = error.read(300) if hasattr(error, "read") else b""
                raise OSError(f"{error!r} {said.decode(errors='replace')}".strip()) from error
            time.sleep(wait)


def summarize(trajectories, student, tokenizer, cfg, generator):
    """Write up finished trajectories. Returns [(trajectory, Skill)] and the number of failures."""
    tiny = cfg.model == "tiny" and cfg.env == "sokoban"
    if cfg.summarizer == "rules" or cfg.summarizer == "auto" and tiny:     # too small to write
        texts = [json.dumps(sokoban_env.analyse(t.messages)) for t in trajectories]
    elif cfg.summarizer.startswith("http"):
        answers = try_each([partial(ask_server, transcript(t), cfg) for t in trajectories], True)
        texts = [text or "" for text, _ in answers]
        for error in {error for _, error in answers if error}:
            tqdm.write(f"no skill from {cfg.summarizer}: {error}")
    else:
        # DEVIATION: the paper asks an external model; here the student writes its own skills.
        # Writing is played as a world of one turn, so that `rollout` does it. CHOICE: the JSON is
        # begun for it, and sampled at 0.6: a small model seldom ends it otherwise.
        own = dataclasses.replace(
            cfg, max_new_tokens=cfg.summary_tokens, prefill='{"success_analysis": "',
            temperature=0.6, max_context=context_window(student, cfg.max_context))
        tasks = [SimpleNamespace(
            task_id=t.task_id, system_prompt=SUMMARIZER_PROMPT, counts={}, completion=lambda: 0.0,
            reset=partial(transcript, t), step=lambda response: ("", True), close=lambda: None)
            for t in trajectories]
        answers = play(student, tokenizer, SimpleNamespace(make_env=lambda task: task), tasks, own,
                       generator=generator)
        texts = ["" if t.error else t.messages[1]["content"] for t in answers]
    written, failed = [], 0
    for trajectory, text in zip(trajectories, texts):
        try:
            written.append((trajectory, parse_skill(text)))
        except ValueError:
            failed += 1
    return written, failed


# =============================================================================================
# The bank: B(x), and UCB over the skills of the same task
# =============================================================================================

class SkillBank:
    """Skills by task, picked by UCB: mean_reward(e) + c * sqrt(ln N_ucb / n(e)).

    A plain dict {task_id: [entry, ...]}, oldest first; an entry is a dict with `skill`, `picks`
    n(e), `reward_sum`, and `source_reward`, the completion of the trajectory it was written from.
    A pick counts once it is credited: `select` alone changes nothing.

    Two things the paper does not discuss. (1) If every visit added a skill, "untried first" would
    always win and UCB would never decide. CHOICE: a visit's skills are taken in only if the best of
    its sources did better than the source of every skill the task has, or once all of these have
    been picked twice; equal texts are one skill; a full bank drops its worst tried entry. (2) The
    student never sees the skill: the reward credited to it was earned before it could act. The
    statistic lags.
    """

    def __init__(self, c, size=4):
        self.c, self.size, self.entries = c, size, {}

    def score(self, entry, total_picks):
        if not entry["picks"]:
            return math.inf                                    # untried first
        # UCB: mean_reward(e) + c * sqrt(ln N_ucb / n(e))
        bonus = self.c * math.sqrt(math.log(total_picks) / entry["picks"])
        return entry["reward_sum"] / entry["picks"] + bonus

    def select(self, task_id):
        """The entry of the highest score, the oldest among equals; None without skills."""
        entries = self.entries.get(task_id, [])
        total_picks = sum(e["picks"] for e in entries)         # CHOICE: of the skills still held
        return max(entries, key=lambda e: self.score(e, total_picks), default=None)

    def decided(self, task_id):
        """True if the next pick is UCB's own: a choice among several skills, all of them tried."""
        entries = self.entries.get(task_id, [])
        return len(entries) > 1 and all(e["picks"] for e in entries)

    def credit(self, entry, reward):
        """Count a pick and the mean reward (CHOICE) of the group played when it was picked."""
        entry["picks"] += 1
        entry["reward_sum"] += float(reward)

    def open_to(self, task_id, source_reward):
        """Whether the task takes new skills, the best of them from a trajectory of this reward."""
        entries = self.entries.get(task_id, [])
        return (all(source_reward > e["source_reward"] for e in entries)
                or all(e["picks"] >= 2 for e in entries))

    def add(self, task_id, skill, source_reward=0.0):
        """Insert a skill, unless its text is there already. Returns whether it was inserted."""
        entries = self.entries.setdefault(task_id, [])
        if any(e["skill"] == skill for e in entries):
            return False
        if len(entries) >= self.size:
            tried = [e for e in entries if e["picks"]] or entries
            worst = min(tried, key=lambda e: e["reward_sum"] / max(e["picks"], 1))
            entries[:] = [e for e in entries if e is not worst]
        entries.append(dict(skill=skill, picks=0, reward_sum=0.0,
                            source_reward=float(source_reward)))
        return True

    def __len__(self):
        return sum(map(len, self.entries.values()))

    def state_dict(self):
        """Plain data: dicts, lists, strings, numbers."""
        return {task: [dict(e, skill=dataclasses.asdict(e["skill"])) for e in entries]
                for task, entries in self.entries.items()}

    def load_state_dict(self, state):
        self.entries = {task: [dict(e, skill=Skill(**e["skill"])) for e in entries]
                        for task, entries in state.items()}


# =============================================================================================
# Two prompts, one token sequence: pi(. | x, y_<t) and pi(. | x + S(x), y_<t)
# =============================================================================================

# The embedded model's chat template: rules in English would only be unknown words to it.
TINY_TEMPLATE = ("{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
                 "{% elif m.role == 'assistant' %}<|assistant|>{{ m.content }}<|end|>{% endif %}"
                 "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


@lru_cache(maxsize=8)
def part_tokenizers(tokenizer):
    """The tokenizer twice, changed to add no blank before a text, since each is a part of a longer
    one: as it is, for the template's own text, and without its added tokens, so that no text can
    forge one of them, special or not. Runs of blanks in its vocabulary stay: they forge nothing."""
    try:
        text = tokenizer.backend_tokenizer.to_str()
    except AttributeError:
        raise ValueError(f"model={tokenizer.name_or_path!r}: its tokenizer is a slow one; use a "
                         "model whose folder has a tokenizer.json") from None
    for old, new in ((r'"prepend_scheme": ?"\w+"', '"prepend_scheme":"never"'),
                     (r'"add_prefix_space": ?true', '"add_prefix_space":false'),
                     (r'("type": ?"Prepend", ?"prepend": ?)"[^"]*"', r'\1""')):
        text = re.sub(old, new, text)
    spec = json.loads(text) | dict(truncation=None, padding=None)
    vocabulary = dict(spec["model"]["vocab"])
    blanks = [t for t in spec["added_tokens"]
              if t["content"] in vocabulary and not t["content"].strip(" \n\t\r\u2581")]
    return [Tokenizer.from_str(json.dumps(spec | dict(added_tokens=added)))
            for added in (spec["added_tokens"], blanks)]


class Chat:
    """Renders conversations to token ids with the tokenizer's own chat template.

    The template is cut once into the texts around the contents. Template text is encoded with
    control tokens, contents without, so that no observation or skill can forge a turn. A
    conversation only ever grows: the next turn is appended as ids, nothing is tokenised twice. So
    thinking stays in the history as it was sampled, also where the template would strip it.
    """

    def __init__(self, tokenizer, eos_ids=()):
        self.tokenizer, (template, self.plain) = tokenizer, part_tokenizers(tokenizer)
        if not tokenizer.chat_template:
            raise ValueError(f"model={tokenizer.name_or_path!r} has no chat template; "
                             "use an instruct model")
        system, *turns = (dict(role=role, content=f"\u00a7{name}\u00a7") for role, name in (
            ("system", "rules"), ("user", "task"), ("assistant", "answer"), ("user", "next")))
        try:
            pieces = self.cut([system, *turns])
        except ValueError:                     # no system role, or in another place
            pieces = [None, *self.cut(turns)]
        before, between, header, turn_end, opening = pieces
        # What opens an answer to be sampled may go on where that of an old one ends: <think>
        if not opening.strip().startswith(header.strip()):
            raise self.refusal()
        self.has_system = before is not None
        # Its text then goes above the task; the tiny template leaves it out on purpose.
        self.fold_system = not self.has_system and tokenizer.chat_template != TINY_TEMPLATE
        texts = [before or "", between, opening, turn_end]
        parts = [template.encode(text, add_special_tokens=False).ids for text in texts]
        first = 0 if self.has_system else 1    # the very start may have a blank before it
        parts[first] = tokenizer.encode(texts[first], add_special_tokens=False)
        self.before, self.between, self.opening, self.turn_end = parts
        # A turn may end on any eos id, and on the token that the template itself puts there, if
        # that is one which no text can make.
        self.eos_ids = {tokenizer.eos_token_id, *eos_ids} - {None}
        self.eos_ids |= {*self.turn_end[:1]} & {*tokenizer.get_added_vocab().values()}

    def refusal(self):
        return ValueError(f"model={self.tokenizer.name_or_path!r}: its chat template does not "
                          "repeat one form for every turn; use a model whose template does")

    def cut(self, messages):
        """The template's texts before, between and after the contents."""
        try:
            pieces, rest = [], self.tokenizer.apply_chat_template(messages, tokenize=False,
                                                                  add_generation_prompt=True)
        except TemplateError:
            raise self.refusal() from None
        for message in messages:
            if rest.count(message["content"]) != 1:
                raise self.refusal()
            piece, rest = rest.split(message["content"])
            pieces.append(piece)
        return [*pieces, rest]

    def encode(self, text):
        """Ids of a text in which nothing is a control token."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def prompt(self, system, task, skill=None, max_skill_tokens=None):
        """Ids up to the first answer: with `skill` the teacher's, without it the student's."""
        skill_ids = []
        if skill is not None:
            text = SKILL_TEXT.format(**dataclasses.asdict(skill))
            blank = self.encode("\n\n")
            room = None if max_skill_tokens is None else max(max_skill_tokens - len(blank), 0)
            skill_ids = self.encode(text)[:room] + blank
        if self.fold_system:
            task = f"{system}\n\n{task}"
        system_ids = self.encode(system) if self.has_system else []
        # CHOICE: the skill stands in the first user message, above the task.
        task_ids = skill_ids + self.encode(task)
        return self.before + system_ids + self.between + task_ids + self.opening

    def next_turn(self, observation, ended):
        """Ids between an answer and the next one; `ended`: the answer closed its turn itself."""
        ends = [i for i, y in enumerate(self.turn_end) if ended and y in self.eos_ids]
        return self.turn_end[ends[0] + 1 if ends else 0:] + self.encode(observation) + self.opening


def eos_ids(model):
    """The end-of-sequence ids that the model's generation config names, as a list."""
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]


def context_window(model, default):
    """The longest text, in tokens, that the model reads; `default` if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", default)


# =============================================================================================
# Rollout: on-policy, multi-turn, token ids in and token ids out
# =============================================================================================

@dataclass
class Trajectory:
    """One episode. `ids` is all that follows the prompt; the prompt itself is rendered when needed,
    with a skill or without, so that the action ids are the same under both."""
    task_id: str
    system: str                      # system prompt
    task: str                        # first user message, without any skill
    prompt_length: int = 0           # tokens of the plain prompt
    ids: list = field(default_factory=list)       # (T_all,) answers and observations
    mask: list = field(default_factory=list)      # (T_all,) True where the actor sampled the token
    logps: list = field(default_factory=list)     # (T,) their log-probs, as sampled
    messages: list = field(default_factory=list)  # the conversation as text
    turns: int = 0
    reward: float = 0.0              # completion rate R_i in [0, 1]
    idle: float = 0.0                # the same before the first turn: what doing nothing earns
    counts: dict = field(default_factory=lambda: dict(cut_answers=0, truncated=0))
    error: str = ""                  # set if the environment died: the episode is left out

    def add_tokens(self, ids, sampled):
        self.ids += ids
        self.mask += [sampled] * len(ids)

    def say(self, role, content):
        self.messages.append(dict(role=role, content=content))


def arithmetic(model, cfg):
    """The precision in which student and teacher alike sample and score; weights stay float32, or
    a small update would be rounded away."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=cfg.precision == "bfloat16")


def logits_where(model, where, **inputs):
    """Logits (n, V) in float32 at the n positions where the (B, L) bool tensor is True.

    The LM head sees only these: a large vocabulary times a long conversation would not fit.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda head, args: (args[0][where],))                                        # (n, H)
    try:
        return model(**inputs).logits.float()
    finally:
        hook.remove()


class SlotLayer(DynamicLayer):
    """Keys and values of one layer (B, heads, slots, width): a token's slot is its position."""

    def __init__(self, owner):
        super().__init__()
        self.owner = owner                     # the CachedForward, which knows the positions

    def update(self, key_states, value_states, *args, **kwargs):
        if self.keys is None:
            self.is_initialized, self.dtype = True, value_states.dtype
            self.device = value_states.device
            self.values = value_states[:, :, :0]
            self.keys = key_states[:, :, :0].to(self.values.dtype)   # autocast leaves them float32
        used, positions, rows = self.owner.used, self.owner.positions, self.owner.rows
        if used > self.keys.shape[2]:          # in steps of 256: seldom, and little is wasted
            more = (0, 0, 0, -(-used // 256) * 256 - self.keys.shape[2])
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        self.keys[rows, :, positions] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[rows, :, positions] = value_states.transpose(1, 2)
        return self.keys[:, :, :used], self.values[:, :, :used]


class CachedForward:
    """Next-token log-probs for rows of ragged conversations that grow on one KV cache.

    Every call appends one chunk per row. Chunks are padded on the right, and a token sees the slots
    up to its own position: what padding leaves behind lies ahead of it, and is overwritten by the
    row's next chunk. So the cache has no holes.
    """

    def __init__(self, model, temperature):
        self.model, self.temperature = model, temperature
        self.cache = Cache(layer_class_to_replicate=partial(SlotLayer, self))
        self.lengths = None                                    # B ints: tokens in each row
        named = inspect.signature(model.forward).parameters    # the older name is being retired
        self.keyword = "cache" if "cache" in named else "past_key_values"
        config = model.config.get_text_config()
        self.window = getattr(config, "sliding_window", None)
        self.kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])

    def __call__(self, chunks):
        """chunks: B lists of ids, some may be empty. Returns log-probs (B, V), float32."""
        if self.lengths is None:     # first call: each prompt is read once, then copied
            different = {}
            rows = [different.setdefault(tuple(chunk), len(different)) for chunk in chunks]
            self.lengths = [0] * len(different)
            logp = self([list(chunk) for chunk in different])
            self.keep(rows)
            return logp[rows]
        # A mask has the size chunk x conversation: long chunks are read in parts.
        logp = self.read([chunk[:512] for chunk in chunks])
        for start in range(512, max(map(len, chunks)), 512):
            longer = torch.tensor([len(chunk) > start for chunk in chunks], device=logp.device)
            part = self.read([chunk[start:start + 512] for chunk in chunks])
            logp = torch.where(longer[:, None], part, logp)
        return logp

    def read(self, chunks):
        """One forward pass over short chunks: log-probs (B, V) after each."""
        device, longest = self.model.device, max(map(len, chunks))
        ids = torch.tensor([c + [0] * (longest - len(c)) for c in chunks], device=device)   # (B, L)
        start, last = torch.tensor([self.lengths, [max(len(c) - 1, 0) for c in chunks]],
                                   device=device)[:, :, None]                        # (B, 1) each
        along = torch.arange(longest, device=device)
        self.positions = start + along                                               # (B, L)
        self.rows = torch.arange(len(chunks), device=device)[:, None]                # (B, 1)
        self.used = max(self.lengths) + longest
        logits = logits_where(
            self.model, along == last, input_ids=ids, position_ids=self.positions, use_cache=True,
            attention_mask=self.visible(), **{self.keyword: self.cache})
        self.lengths = [n + len(c) for n, c in zip(self.lengths, chunks)]
        return F.log_softmax(logits / self.temperature, dim=-1)                      # (B, V)

    def visible(self):
        """Which slots a token sees (B, 1, L, slots), for each kind of layer if there are two."""
        slots = torch.arange(self.used, device=self.positions.device)
        here = self.positions[:, None, :, None]
        full = near = slots <= here
        if self.window:
            near = full & (slots > here - self.window)
        if self.model.config._attn_implementation == "eager":  # which adds its mask to the scores
            full, near = (torch.zeros_like(m, dtype=self.model.dtype).masked_fill(~m, -1e9)
                          for m in (full, near))
        masks = dict(full_attention=full, sliding_attention=near)
        return masks if len(self.kinds) > 1 else masks[min(self.kinds)]

    def keep(self, rows):
        """Go on with these rows only; a row may be taken more than once."""
        self.lengths = [self.lengths[row] for row in rows]
        self.cache.batch_select_indices(torch.tensor(rows, device=self.model.device))


def try_each(calls, concurrent):
    """Run each call: [(value, "")], or (None, what it raised). In threads if `concurrent`."""
    def guarded(call):
        try:
            return call(), ""
        except Exception as error:             # reported with the episode, counted, left out
            return None, repr(error)
    if not concurrent or len(calls) < 2:
        return [guarded(call) for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(guarded, calls))


@torch.no_grad()
def rollout(model, tokenizer, envs, cfg, skills=None, generator=None, greedy=False):
    """Play one episode in every environment, all of them as one batch, and close them.

    model samples from its full softmax at cfg.temperature, or takes the likeliest token (`greedy`);
    envs: objects with task_id, system_prompt, reset(), step(text), completion() and close();
    skills: one Skill or None per environment, shown to whoever acts here; generator: a
    torch.Generator on the model's device. Returns a list[Trajectory] in the order of `envs`. An
    environment that raises ends its own episode with `error` set, and costs nobody else's.
    """
    model.eval()
    chat = Chat(tokenizer, eos_ids(model))
    prefill, skills = chat.encode(cfg.prefill), skills or [None] * len(envs)
    limit = cfg.max_context - cfg.max_skill_tokens             # so that either prompt leaves room
    concurrent = any(getattr(env, "concurrent", False) for env in envs)
    trajectories, chunks, rows = [], [], []                    # rows: environments still playing
    begun = try_each([lambda env=env: (env.reset(), env.completion()) for env in envs],
                     concurrent)
    for i, (env, (start, error)) in enumerate(zip(envs, begun)):
        t = Trajectory(env.task_id, env.system_prompt, "", error=error)
        trajectories.append(t)
        if error:
            continue
        t.task, t.idle = start
        t.say("user", t.task)
        t.prompt_length = len(chat.prompt(t.system, t.task))
        t.add_tokens(prefill, sampled=False)
        needed = t.prompt_length + len(prefill) + cfg.max_new_tokens
        if needed > limit:
            t.error = (f"max_context={cfg.max_context}: the prompt, an answer (max_new_tokens) and "
                       f"a skill (max_skill_tokens) need {needed + cfg.max_skill_tokens}")
            continue
        rows.append(i)
        chunks.append(chat.prompt(t.system, t.task, skills[i], cfg.max_skill_tokens) + prefill)
    forward = CachedForward(model, cfg.temperature)
    progress = tqdm(total=len(envs), desc="rollout", leave=False, disable=None)
    while rows:
        with arithmetic(model, cfg):
            answers = sample_answers(forward, chunks, chat.eos_ids, cfg.max_new_tokens, generator,
                                     greedy)
        for i, (ids, logps) in zip(rows, answers):
            t = trajectories[i]
            t.add_tokens(ids, sampled=True)
            t.logps += logps
            t.turns += 1
            t.counts["cut_answers"] += ids[-1] not in chat.eos_ids
            t.say("assistant", tokenizer.decode(prefill + ids, skip_special_tokens=True,
                                                clean_up_tokenization_spaces=False))
        steps = try_each([partial(envs[i].step, trajectories[i].messages[-1]["content"])
                          for i in rows], concurrent)
        still, chunks = [], []
        for row, (i, (ids, _), (outcome, error)) in enumerate(zip(rows, answers, steps)):
            t = trajectories[i]
            if error:
                t.error = f"turn {t.turns}: {error}"
                continue
            observation, done = outcome
            t.say("user", observation)
            following = chat.next_turn(observation, ended=ids[-1] in chat.eos_ids) + prefill
            length = t.prompt_length + len(t.ids) + len(following) + cfg.max_new_tokens
            if not done and length > limit:
                t.counts["truncated"] = 1                      # CHOICE: it ends the episode
            elif not done:
                t.add_tokens(following, sampled=False)
                still.append(row)
                chunks.append(ids[-1:] + following)            # the last token is unread yet
        progress.update(len(rows) - len(still))
        if still and len(still) < len(rows):
            forward.keep(still)
        rows = [rows[row] for row in still]
    progress.close()
    playing = [(t, env) for t, env in zip(trajectories, envs) if not t.error]
    scores = try_each([env.completion for _, env in playing], concurrent)
    for (t, env), (reward, error) in zip(playing, scores):
        t.reward, t.error = (0.0, f"completion: {error}") if error else (reward, "")
        t.counts.update(getattr(env, "counts", {}))
    try_each([env.close for env in envs], concurrent)          # the scores are in
    return trajectories


def sample_answers(forward, chunks, eos, max_new_tokens, generator, greedy):
    """One answer per row: [(ids, logps)], each up to an eos id (kept) or max_new_tokens."""
    answers = [([], []) for _ in chunks]
    open_rows = list(range(len(chunks)))
    while open_rows:
        logp = forward(chunks)                                                       # (B, V)
        token = logp.argmax(-1, keepdim=True) if greedy else (
            torch.multinomial(logp.exp(), 1, generator=generator))                   # (B, 1)
        tokens, logps = token[:, 0].tolist(), logp.gather(1, token)[:, 0].tolist()
        for row in open_rows:
            answers[row][0].append(tokens[row])
            answers[row][1].append(logps[row])
        open_rows = [r for r in open_rows
                     if answers[r][0][-1] not in eos and len(answers[r][0]) < max_new_tokens]
        chunks = [answers[r][0][-1:] if r in open_rows else [] for r in range(len(chunks))]
    return answers


def make_generator(model, *parts):
    """A torch.Generator on the model's device, seeded from whole numbers and words alone."""
    mine = (rank(),) if rank() else ()         # other ranks sample other tokens
    return torch.Generator(model.device).manual_seed(derived_seed(*parts, *mine))


def play(model, tokenizer, world, tasks, cfg, skills=None, generator=None, greedy=False):
    """One episode of each task, at most cfg.rollout_batch at a time: list[Trajectory]. Those whose
    environment failed have `error` set."""
    trajectories = []
    for start in range(0, len(tasks), cfg.rollout_batch):
        rows = slice(start, start + cfg.rollout_batch)
        envs = [world.make_env(task) for task in tasks[rows]]
        trajectories += rollout(model, tokenizer, envs, cfg, skills and skills[rows], generator,
                                greedy)
    for t in trajectories:
        if t.error:
            tqdm.write(f"left out: an episode of {t.task_id}: {t.error}")
    return trajectories


# =============================================================================================
# Scoring: log-probs of the action tokens, for student and teacher alike
# =============================================================================================

def action_logits(model, tokenizer, trajectories, skills=None, max_skill_tokens=None):
    """Logits at the action tokens only: (n, V) and the tokens (n,), rows after each other. One
    forward pass over the whole conversations."""
    chat = Chat(tokenizer)
    skills = skills or [None] * len(trajectories)
    prompts = [chat.prompt(t.system, t.task, skill, max_skill_tokens)
               for t, skill in zip(trajectories, skills)]
    rows = [prompt + t.ids for prompt, t in zip(prompts, trajectories)]
    longest, device = max(map(len, rows)), model.device

    def padded(values, filler):
        return torch.tensor([v + [filler] * (longest - len(v)) for v in values], device=device)

    ids = padded(rows, 0)                                                            # (B, L)
    sampled = padded([[False] * len(p) + t.mask for p, t in zip(prompts, trajectories)], False)
    before = sampled.roll(-1, dims=1)              # the position that predicts each action token
    # Padding stands on the right, where causal attention cannot see it: no mask is needed.
    return logits_where(model, before, input_ids=ids, use_cache=False), ids[sampled]


def response_logps(model, tokenizer, trajectories, temperature=1.0, skills=None,
                   max_skill_tokens=None):
    """Log-probs of the action tokens: logp (B, T) and mask (B, T), T the most actions in a row.

    Column t is the t-th action token of the row, wherever it stands in the conversation: student
    and teacher align by construction, however long the teacher's prompt is.
    """
    logits, y = action_logits(model, tokenizer, trajectories, skills, max_skill_tokens)
    flat = F.log_softmax(logits / temperature, dim=-1).gather(1, y[:, None])[:, 0]   # (n,)
    lengths = torch.tensor([sum(t.mask) for t in trajectories], device=flat.device)
    mask = torch.arange(int(lengths.max()), device=flat.device) < lengths[:, None]   # (B, T)
    return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat), mask


def micro_batches(trajectories, max_tokens):
    """Lists of indices, similar lengths together: at most max_tokens when padded (skills aside)."""
    lengths, batches = [t.prompt_length + len(t.ids) for t in trajectories], [[]]
    for i in sorted(range(len(trajectories)), key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return [batch for batch in batches if batch]


# =============================================================================================
# Losses (Eq. 10-14). Pure functions of tensors: lift them into any trainer.
# =============================================================================================

def masked_mean(x, mask):
    """sum(x * mask) / sum(mask), a scalar; 0 when the mask is empty. x, mask: (B, T)."""
    return torch.where(mask.bool(), x, 0.0).sum() / mask.sum().clamp(min=1)


def group_advantages(rewards, group_size, eps=1e-6, valid=None):
    """A_i = (R_i - mean(R)) / (std(R) + eps) over each group of consecutive rollouts of one task.

    rewards: (n,), n a multiple of group_size; valid: (n,) bool, False leaves an episode out.
    Population std, in float64. Equal rewards give exactly 0, and so does a group with fewer than
    two valid episodes. Returns (n,) float32.
    """
    r = torch.as_tensor(rewards, dtype=torch.float64)
    if r.ndim != 1 or len(r) % group_size:
        raise ValueError(f"rewards of shape {tuple(r.shape)}: must be (n,), n a multiple of "
                         f"group_size={group_size}")
    ok = torch.as_tensor([True] * len(r) if valid is None else valid, device=r.device).bool()
    r, ok = r.view(-1, group_size), ok.view(-1, group_size)                          # (tasks, G)
    n = ok.sum(1, keepdim=True).clamp(min=1)
    deviation = torch.where(ok, r - torch.where(ok, r, 0.0).sum(1, keepdim=True) / n, 0.0)
    std = (deviation.square().sum(1, keepdim=True) / n).sqrt()
    # Rounding of the mean must not turn equal rewards into an advantage.
    highest = torch.where(ok, r, -math.inf).amax(1, keepdim=True)
    lowest = torch.where(ok, r, math.inf).amin(1, keepdim=True)
    adv = torch.where(highest > lowest, deviation / (std + eps), 0.0)
    return adv.flatten().float()


def grpo_loss(logp_student, logp_old, adv, mask, clip_low, clip_high):
    """-1/N sum min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), a scalar. No KL to a reference.

    logp_student, logp_old, mask: (B, T); adv: (B,). Padding may hold anything finite.
    """
    mask = mask.bool()
    # Eq. 10: -1/N sum min(r A, clip(r) A), r = pi_theta(y) / pi_theta_old(y)
    ratio = torch.where(mask, logp_student - logp_old, 0.0).exp()                    # (B, T)
    adv = adv[:, None]                                                               # (B, 1)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -masked_mean(torch.minimum(ratio * adv, clipped * adv), mask)


def sdl_loss(logp_student, logp_teacher, logp_old, mask):
    """1/N sum rho * (exp(-l) - 1 + l), a scalar: the importance-weighted reverse KL to the teacher.

    All (B, T); logp_teacher and logp_old are constants; padding may hold anything finite. With
    tokens sampled by pi_old, the expected gradient at a fixed prefix is that of KL(student ||
    teacher), for every theta. Both factors carry it: d/dlogp of rho * (exp(-l) - 1 + l) is rho * l.
    Value in float64, since exp(-l) soon leaves float32's range.
    """
    mask = mask.bool()
    p, q, old = (x.detach().double() for x in (logp_student, logp_teacher, logp_old))
    # Eq. 11: l = log pi_student - log pi_teacher
    log_ratio = torch.where(mask, p - q, 0.0)                                        # (B, T)
    # Eq. 12: rho = pi_student / stopgrad(pi_old)
    rho = torch.where(mask, p - old, 0.0).exp()                                      # (B, T)
    # Eq. 13: L_SDL = 1/N sum rho * (exp(-l) - 1 + l)
    k3 = torch.expm1(-log_ratio) + log_ratio
    # Autograd of rho * k3 subtracts two numbers of size exp(-l) to get rho * l. So its value is
    # a constant here and its gradient written down: d(rho * k3)/dlogp = rho * l.
    slope = torch.where(mask, logp_student - logp_student.detach(), 0.0)             # 0, gradient 1
    return masked_mean(rho * k3 + rho * log_ratio * slope, mask)


# =============================================================================================
# Dynamic teacher synchronisation
# =============================================================================================

@torch.no_grad()
def sync_teacher(teacher, student):
    """theta-bar <- theta: copy every weight and buffer of the student into the teacher."""
    teacher.load_state_dict(student.state_dict())


# =============================================================================================
# One iteration of the algorithm, and the loop
# =============================================================================================

@torch.no_grad()
def teacher_logps(teacher, tokenizer, trajectories, skills, cfg, synced):
    """Log-probs of the sampled tokens under x + S(x): a list of (T,) tensors.

    CHOICE: None, without a pass, where the teacher is theta_old: no skill, weights just synced.
    """
    teacher.eval()
    logps = [None] * len(trajectories)
    wanted = [i for i, skill in enumerate(skills) if skill is not None or not synced]
    for group in micro_batches([trajectories[i] for i in wanted], cfg.micro_batch_tokens):
        rows = [wanted[j] for j in group]
        with arithmetic(teacher, cfg):
            logp, mask = response_logps(teacher, tokenizer, [trajectories[i] for i in rows],
                                        cfg.temperature, [skills[i] for i in rows],
                                        cfg.max_skill_tokens)
        for i, row, used in zip(rows, logp, mask):
            logps[i] = row[used]
    return logps


def update(student, optimizer, tokenizer, trajectories, adv, logp_teacher, skills, cfg,
           n_tokens=None):
    """Minimise L = L_GRPO + lambda * L_SDL (Eq. 14) over one batch. Returns metrics.

    adv: (n,); logp_teacher: n (T,) tensors or None (see teacher_logps), or None without SDL;
    skills: what the student itself reads, None but for skill_grpo; n_tokens: N of the whole batch,
    if other ranks hold a part of it. Neither micro-batches nor ranks change the mean.
    """
    # CHOICE: logp_old is the plain-prompt student's, whoever acted; N counts every action token.
    # theta_old must be the policy that sampled: no dropout. transformers keeps activations in eval
    # mode, whatever it is told; load_pretrained has set dropout to 0.
    student.train(bool(cfg.gradient_checkpointing))
    n_tokens = n_tokens or sum(sum(t.mask) for t in trajectories)
    logp_old, asked = [None] * len(trajectories), logp_teacher or [None] * len(trajectories)
    names = "pg_loss sdl_loss log_ratio rho_minus_1 clip_fraction entropy".split()
    for epoch in range(cfg.updates_per_iteration):
        optimizer.zero_grad(set_to_none=True)
        totals = torch.zeros(len(names), dtype=torch.float64, device=student.device)
        for rows in micro_batches(trajectories, cfg.micro_batch_tokens):
            batch = [trajectories[i] for i in rows]
            with arithmetic(student, cfg):
                logp, mask = response_logps(student, tokenizer, batch, cfg.temperature, skills and
                                            [skills[i] for i in rows], cfg.max_skill_tokens)
            if epoch == 0:                     # theta is theta_old still: this is logp_old, exactly
                for i, row, used in zip(rows, logp.detach(), mask):
                    logp_old[i] = row[used]

            def filled(parts):                 # the rows' (T,) tensors, laid out as logp is: (B, T)
                return torch.zeros_like(logp).masked_scatter(mask, torch.cat(parts))

            old = filled([logp_old[i] for i in rows])
            teacher = filled([logp_old[i] if asked[i] is None else asked[i] for i in rows])
            pg = grpo_loss(logp, old, adv[rows].to(logp.device), mask, cfg.clip_low, cfg.clip_high)
            sdl = sdl_loss(logp, teacher, old, mask)
            share = mask.sum() / n_tokens
            # Eq. 14: L = L_GRPO + lambda * L_SDL
            (share * (cfg.reward_weight * pg + cfg.lam * sdl)).backward()
            with torch.no_grad():
                ratio = (logp - old).exp()
                outside = (ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)
                means = [masked_mean(x, mask) for x in (logp - teacher, (ratio - 1).abs(),
                                                        outside.float(), -old)]
                totals += share * torch.stack([x.double() for x in (pg, sdl, *means)])
        for p in student.parameters() if ranks() > 1 else ():
            if p.grad is None:                 # a rank may have had nothing to score
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad)
        if ranks() > 1:
            dist.all_reduce(totals)
        sums = dict(zip(names, totals.tolist()))
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.max_grad_norm).item()
        if not math.isfinite(grad_norm + sum(sums.values())):
            raise FloatingPointError(f"gradient norm {grad_norm}, losses {sums}: stopped before "
                                     "the update; try a smaller lr or lam")
        optimizer.step()
    if logp_teacher is None:
        del sums["sdl_loss"], sums["log_ratio"]
    metrics = dict(sums, grad_norm=grad_norm, action_tokens=n_tokens)
    if cfg.actor != "student":                 # -log p estimates the entropy of who sampled only
        del metrics["entropy"]
    elif trajectories:
        recorded = torch.tensor([logp for t in trajectories for logp in t.logps])
        gap = torch.cat(logp_old).cpu() - recorded             # sampling against scoring
        metrics["rollout_gap"] = gap.abs().max().item()
    return metrics


def pick_tasks(levels, cfg, k):
    """The tasks of iteration k, all different; the curriculum opens the list from its easy end
    (CHOICE)."""
    opened = 1.0
    if cfg.curriculum and cfg.env == "sokoban":                # AppWorld's tasks have no order
        opened = 0.25 + 0.75 * k / (cfg.curriculum * cfg.iterations)
    n = min(len(levels), max(cfg.tasks_per_iteration, round(opened * len(levels))))
    rng = random.Random(derived_seed(cfg.seed, "tasks", k))
    return [levels[i] for i in rng.sample(range(n), cfg.tasks_per_iteration)]


def shown_skill(bank, task_id, entry, cfg, k):
    """The skill of the picked entry; in the controls another task's, at random (the task's own, if
    no other has one yet), or one that says nothing."""
    if cfg.skill_shown == "empty":
        return Skill("", "", "")
    if cfg.skill_shown == "other":
        others = [e for task, entries in bank.entries.items() if task != task_id for e in entries]
        rng = random.Random(derived_seed(cfg.seed, "other", k, task_id))
        return rng.choice(others or [entry])["skill"]
    return entry["skill"]


def worth_writing_up(bank, groups):
    """CHOICE: the best trajectory of each group, the shortest of equals, if the bank is open to it.
    A worse one shows a teacher little that it does not know."""
    best = [min(group, key=lambda t: (-t.reward, t.turns)) for group in groups if group]
    return [t for t in best if bank.open_to(t.task_id, t.reward)]


def train(cfg):
    """The paper's algorithm. Returns what `evaluate` does for the trained student, and writes all
    of the run to its folder."""
    # Defined below: RunFolder is log and checkpoint, World holds the tasks and makes environments,
    # STOP is set by Ctrl-C.
    run, world = RunFolder(cfg), make_world(cfg)
    student, tokenizer = load_model(cfg, world)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, betas=(0.9, 0.95),   # CHOICE
                                  weight_decay=0.0)
    bank = SkillBank(cfg.ucb_c, cfg.bank_size)
    uses_skills, teacher_acts = cfg.skill_reader != "nobody", cfg.actor == "teacher"
    first = run.load(student, teacher, optimizer, bank)

    for k in tqdm(range(first, cfg.iterations), run.path.name, initial=first,
                  total=cfg.iterations, disable=rank() > 0):
        times, generator = [time.perf_counter()], make_generator(student, cfg.seed, "rollout", k)

        # 1. theta_old <- theta (held as logp_old, see update); theta-bar <- theta
        synced = cfg.sync_every > 0 and k % cfg.sync_every == 0
        if synced:
            sync_teacher(teacher, student)

        # 2. S(x) <- UCB(B(x)); G trajectories per task, the student under the plain prompt
        tasks = pick_tasks(world.train, cfg, k)
        names = [world.make_env(task).task_id for task in tasks]
        entries = [bank.select(name) for name in names]        # None where B(x) is empty
        decided = [bank.decided(name) for name, entry in zip(names, entries) if entry]
        shown = [entry and shown_skill(bank, name, entry, cfg, k)
                 for name, entry in zip(names, entries)]
        repeated = [(task, skill) for task, skill in list(zip(tasks, shown))[rank()::ranks()]
                    for _ in range(cfg.group_size)]
        in_student = cfg.skill_reader == "student"
        played = play(teacher if teacher_acts else student, tokenizer, world,
                      [task for task, _ in repeated], cfg,
                      [skill for _, skill in repeated] if teacher_acts or in_student else None,
                      generator)
        groups = gather([played[g:g + cfg.group_size]
                         for g in range(0, len(played), cfg.group_size)])
        episodes = [t for group in groups for t in group]
        times.append(time.perf_counter())

        # 3. rewards, group advantages; an episode whose world died is left out, and so is a group
        # that has fewer than two others
        alive = [[not t.error for t in group] for group in groups]
        valid = [ok and sum(group) >= min(2, cfg.group_size) for group in alive for ok in group]
        adv = group_advantages([t.reward for t in episodes], cfg.group_size, cfg.adv_eps, valid)
        kept = [i for i, ok in enumerate(valid) if ok]
        batch = [episodes[i] for i in kept]
        if not batch:
            raise EnvironmentError("every environment failed, or all but one of each group; the "
                                   f"first: {next(t.error for t in episodes if t.error)}")
        finished = [[] for _ in tasks]         # the groups, less what is left out
        for i in kept:
            finished[i // cfg.group_size].append(episodes[i])
        mine = [i for i in kept if i // cfg.group_size % ranks() == rank()]    # this rank scores
        own, skills = [episodes[i] for i in mine], [shown[i // cfg.group_size] for i in mine]

        # 4. the teacher re-scores the same tokens under x + S(x)
        logp_teacher = None
        if cfg.lam and cfg.skill_reader == "teacher":
            logp_teacher = teacher_logps(teacher, tokenizer, own, skills, cfg, synced)
        times.append(time.perf_counter())

        # 6 begins: credit the picks; a served summarizer writes while the weights move, the student
        # itself after that, with the new ones
        for entry, group in zip(entries, finished):
            if entry and group:
                bank.credit(entry, np.mean([t.reward for t in group]))
        chosen = worth_writing_up(bank, finished) if uses_skills else []
        write = partial(summarize, chosen, student, tokenizer, cfg, generator)
        if cfg.summarizer.startswith("http") and not rank():
            write = ThreadPoolExecutor(1).submit(write).result

        # 5. minimise L over the tokens
        try:
            metrics = update(student, optimizer, tokenizer, own, adv[mine], logp_teacher,
                             skills if in_student else None, cfg,
                             n_tokens=sum(sum(t.mask) for t in batch))
        except FloatingPointError as error:
            run.write("non_finite.pt", dict(       # all ranks' episodes; logp_teacher of rank 0
                iteration=k, trajectories=[dataclasses.asdict(t) for t in batch],
                adv=adv[torch.tensor(valid)], logp_teacher=logp_teacher,
                skills=[skill and dataclasses.asdict(skill) for skill in shown]))
            gather([])                             # nobody leaves before it is written
            raise FloatingPointError(f"iteration {k}: {error}; what was being trained on is in "
                                     f"{run.path / 'non_finite.pt'}") from error
        optimizer.zero_grad(set_to_none=True)  # room for what is played next
        times.append(time.perf_counter())

        # 6 ends: new skills enter the bank: they can be picked from iteration k + 1 on
        if uses_skills:
            written, failed = from_rank_0(write)
            for t, skill in written:
                bank.add(t.task_id, skill, t.reward)
            metrics |= dict(skill_share=np.mean([e is not None for e in entries]),
                            bank_skills=len(bank), skills_failed=failed)
        times.append(time.perf_counter())

        metrics |= dict(
            iteration=k, reward=np.mean([t.reward for t in batch]),
            success=np.mean([t.reward == 1.0 for t in batch]),
            turns=np.mean([t.turns for t in batch]),
            zero_spread_groups=sum(len({t.reward for t in group}) == 1 for group in finished),
            failed_episodes=sum(bool(t.error) for t in episodes),
            left_out_groups=sum(not group for group in finished),
            tokens_per_second=metrics["action_tokens"] / (times[-1] - times[0]))
        if decided:
            metrics["ucb_decided"] = np.mean(decided)
        for name, start, end in zip(("rollout", "teacher", "update", "skills"), times, times[1:]):
            metrics[f"seconds_{name}"] = end - start
        for name in {name for t in batch for name in t.counts}:
            metrics[f"count_{name}"] = sum(t.counts.get(name, 0) for t in batch)
        run.log(metrics)
        stopping = any(gather([STOP.is_set()]))
        if (k + 1) % cfg.save_every == 0 or k + 1 == cfg.iterations or stopping:
            run.save(student, teacher, optimizer, bank, k + 1)
        if stopping:
            gather([])
            raise KeyboardInterrupt(f"stopped after iteration {k}; the same command, or --resume "
                                    f"{run.path}, goes on")

    return run.finish(student, tokenizer, bank, evaluate(student, tokenizer, world, cfg))


# =============================================================================================
# Evaluation, log, checkpoint
# =============================================================================================

def evaluate(model, tokenizer, world, cfg):
    """Held-out completions under the plain prompt, one number per task: `sampled` at `temperature`
    (the training's, unless it is tuned), `greedy`, and `idle`, what doing nothing earns. A world
    that died counts as 0; EnvironmentError if all did."""
    if cfg.tune_temperature:
        val = make_world(dataclasses.replace(cfg, split="val"))
        trials = [dataclasses.replace(cfg, temperature=t) for t in (1.0, 0.8, 0.6, 0.4, 0.2)]
        cfg = max(trials, key=lambda trial: np.mean([t.reward == 1.0 for t in gather(play(
            model, tokenizer, val, val.heldout[rank()::ranks()], trial,
            generator=make_generator(model, cfg.seed)))]))
    tasks = world.heldout[rank()::ranks()]
    sampled = gather(play(model, tokenizer, world, tasks, cfg,
                          generator=make_generator(model, cfg.seed, "evaluate")))
    greedy = gather(play(model, tokenizer, world, tasks, cfg, greedy=True))
    if all(t.error for t in sampled + greedy):
        raise EnvironmentError(f"every environment failed; the first: {sampled[0].error}")
    return dict(sampled=[t.reward for t in sampled], greedy=[t.reward for t in greedy],
                idle=[t.idle for t in sampled], temperature=cfg.temperature)


def percent(values):
    """Mean and 95 % interval in percent: Student's t, of 10 up to 30 values (a little too wide)."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
    n = len(values)
    factor = t.get(n, 2.26 if n <= 30 else 1.96)
    half = factor * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return f"{100 * np.mean(values):5.1f} ±{100 * half:5.1f}"


def print_table(results):
    """results: [(method, seed, played)]. Intervals are over tasks for one seed, else over seeds;
    differences are paired, task by task or seed by seed."""
    columns = [(how, what) for how in ("sampled", "greedy") for what in ("acc", "comp")]
    rows = {}                                                  # name -> seed -> column -> (tasks,)
    for method, seed, played in results:
        idle = dict(sampled=played["idle"], greedy=played["idle"])
        for name, values in (("idle", idle), (method, played)):
            rows.setdefault(name, {})[seed] = {
                (how, what): np.equal(values[how], 1.0) * 1.0 if what == "acc"
                else np.array(values[how]) for how, what in columns}
    names = [name for name in rows if name != "idle"]
    reference = "grpo" if "grpo" in rows else "base"
    for a, b in [(name, reference) for name in names] + [("skill_sd", name) for name in names]:
        if a != b and a in rows and b in rows:
            rows[f"{a} - {b}"] = {seed: {c: rows[a][seed][c] - rows[b][seed][c] for c in columns}
                                  for seed in rows[a]}
    seeds = list(rows["idle"])
    print(f"\n{len(results[0][2]['idle'])} held-out tasks, {len(seeds)} seed(s); percent, "
          f"± 95 % interval over {'seeds' if len(seeds) > 1 else 'tasks'}")
    print(f"{'':<28}" + "".join(f"{f'{how} {what}':<16}" for how, what in columns))
    for name, runs in rows.items():
        cells = [percent([run[c].mean() for run in runs.values()] if len(seeds) > 1
                         else runs[seeds[0]][c]) for c in columns]
        print(f"{name:<28}" + "".join(f"{cell:<16}" for cell in cells))


def print_curves(runs):
    """A Mermaid chart from the logs: success in training, its mean over seeds, in ten steps. Only
    of methods whose tokens the student samples under the plain prompt."""
    curves = {}
    for run in runs:
        if run.iterations >= 10 and run.actor == "student" and run.skill_reader != "student":
            log = (RunFolder(run).path / "log.jsonl").read_text().splitlines()
            success = np.array([json.loads(line)["success"] for line in log])
            tenths = [100 * part.mean() for part in np.array_split(success, 10)]
            curves.setdefault(run.method, []).append(tenths)
    if curves:
        print(f"\n```mermaid\nxychart-beta\n    title \"{', '.join(curves)}\"\n"
              '    x-axis "tenth of the iterations" 1 --> 10\n    y-axis "success, %"')
        for tenths in curves.values():
            print(f"    line [{', '.join(f'{x:.1f}' for x in np.mean(tenths, axis=0))}]")
        print("```")


STOP = threading.Event()             # set by the first Ctrl-C: end after the current iteration


def digest(file):
    """SHA-256 of a file, read in blocks: a checkpoint may be larger than the memory."""
    sha = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 24):
            sha.update(block)
    return sha.hexdigest()


class RunFolder:
    """A run on disk: config.json, log.jsonl, checkpoint-N/, student/, bank.json, result.json.

    The same command again goes on from the last checkpoint; a finished run is not run again.
    """
    INCIDENTAL = ("seeds", "out", "name", "device", "threads", "save_every")     # may change

    def __init__(self, cfg):
        self.path = Path(cfg.out) / (cfg.name or f"{cfg.method}-seed{cfg.seed}")
        self.path.mkdir(parents=True, exist_ok=True)
        known, settings = self.path / "config.json", dataclasses.asdict(cfg)
        if known.exists() and (self.path / "log.jsonl").exists():      # begun in earnest
            for name, value in json.loads(known.read_text()).items():
                if name not in self.INCIDENTAL and settings.get(name) != value:
                    raise ValueError(f"{name}={settings.get(name)!r}: the run in {self.path} was "
                                     f"begun with {value!r}; give another --name or --out")
        self.write("config.json", settings)

    def write(self, name, data):
        """Written beside and moved into place: a file is whole or absent. Rank 0 writes."""
        if rank():
            return
        part = self.path / f"{name}.part"
        if name.endswith(".pt"):
            torch.save(data, part)
        else:
            part.write_text(data if isinstance(data, str) else json.dumps(data, indent=1))
        os.replace(part, self.path / name)

    def read(self, name):
        file = self.path / name
        return json.loads(file.read_text()) if file.exists() else None

    def log(self, metrics):
        if rank():
            return
        with open(self.path / "log.jsonl", "a") as file:
            file.write(json.dumps({k: v if isinstance(v, int) else float(v)
                                   for k, v in metrics.items()}) + "\n")

    def save(self, student, teacher, optimizer, bank, iteration):
        """A folder of its own, made beside and moved into place whole; the last two are kept."""
        part, whole = self.path / "checkpoint.part", self.path / f"checkpoint-{iteration:06}"
        if rank():
            return
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            save_weights(student, part / "student.safetensors")
            save_weights(teacher, part / "teacher.safetensors")
            torch.save(dict(optimizer=optimizer.state_dict(), bank=bank.state_dict(),
                            iteration=iteration), part / "state.pt")
            written = {file.name: digest(file) for file in sorted(part.iterdir())}
            (part / "sha256.json").write_text(json.dumps(written))
            shutil.rmtree(whole, ignore_errors=True)           # one that was damaged
            os.replace(part, whole)
        except Exception as error:             # each of the three libraries has its own
            raise OSError(f"the checkpoint after {iteration} iterations could not be written: "
                          f"{error}; make room in {self.path}, then the same command goes on "
                          "from the one before") from error
        for old in sorted(self.path.glob("checkpoint-*"))[:-2]:
            shutil.rmtree(old)

    def load(self, student, teacher, optimizer, bank):
        """Fill in the newest checkpoint that is whole. Returns the first iteration still to do.

        Every random draw is derived from the seed and the iteration: there is no other state.
        """
        first, folders = 0, sorted(self.path.glob("checkpoint-*"), reverse=True)
        for folder in folders:
            try:
                written = json.loads((folder / "sha256.json").read_text())
                if any(digest(folder / name) != sha for name, sha in written.items()):
                    raise ValueError("its files are not those that were written")
            except (OSError, ValueError) as error:
                tqdm.write(f"{folder} is damaged ({error}); trying the one before")
                continue
            load_weights(student, folder / "student.safetensors")
            load_weights(teacher, folder / "teacher.safetensors")
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            bank.load_state_dict(state["bank"])
            first = state["iteration"]
            break
        if folders and not first:
            raise ValueError(f"resume={str(self.path)!r}: every checkpoint there is damaged; move "
                             "the folder away to start anew")
        log = self.path / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        self.write("log.jsonl", "".join(lines[:first]))        # what comes after is done again
        return first

    def finish(self, student, tokenizer, bank, played):
        if not rank():
            student.save_pretrained(self.path / "student")
            tokenizer.save_pretrained(self.path / "student")
        self.write("bank.json", bank.state_dict())
        self.write("result.json", played)
        return played


# =============================================================================================
# The worlds
# =============================================================================================

@dataclass
class World:
    """Tasks to train on (Sokoban: easiest first) and held-out ones; make_env(task) plays."""
    train: list
    heldout: list
    make_env: object
    all_tasks: list = ()             # what a warm start must stay clear of


def make_world(cfg):
    """Sokoban: training, validation and test levels, disjoint up to rotation and reflection.
    AppWorld: its train and dev splits."""
    if cfg.env == "appworld":
        import appworld_adapter
        train_tasks = appworld_adapter.task_ids("train")
        if cfg.iterations and cfg.tasks_per_iteration > len(train_tasks):
            raise ValueError(f"tasks_per_iteration={cfg.tasks_per_iteration}: the data has "
                             f"{len(train_tasks)} training tasks; ask for no more")
        return World(train_tasks, appworld_adapter.task_ids("dev"),
                     lambda task: appworld_adapter.AppWorldEnv(task, cfg.max_turns))
    kind = dict(size=cfg.size, boxes=cfg.boxes, min_moves=cfg.min_moves, max_moves=cfg.max_moves)
    levels = []                                                # test, validation, training
    for name, n, seed in (("test", cfg.test_levels, cfg.level_seed),
                          ("val", cfg.test_levels, cfg.level_seed),
                          ("train", cfg.train_levels, cfg.seed)):
        levels.append(sokoban_env.generate_levels(n, derived_seed(name, seed),
                                                  exclude=sum(levels, []), **kind))
    return World(sorted(levels[2], key=lambda level: level.moves), levels[cfg.split == "val"],
                 lambda level: sokoban_env.SokobanEnv(level, cfg.max_turns), sum(levels, []))


# =============================================================================================
# The embedded model of the demo, and its warm start
# =============================================================================================

def tiny_tokenizer(size):
    """A word-level tokenizer for the demo's texts. Of a room it reads the lists of cells; the map
    above them shows nothing else and takes a small model longer to learn to read."""
    from tokenizers import Regex, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    control = ["<|pad|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|end|>"]
    texts = [SKILL_TEXT, sokoban_env.NO_MOVE, sokoban_env.BLOCKED, *sokoban_env.MOVES, "Walls "
             "Goals Boxes Player none seen yet pushed a box to where it is stuck boxes on goals in "
             "moves of at"]
    words = [word for text in texts for word in re.findall(r"\w+", text)]
    cells = [f"{chr(ord('a') + c)}{r + 1}" for r in range(size) for c in range(size)]
    vocab = dict.fromkeys(control + words + cells + [str(n) for n in range(100)])
    ids = {word: i for i, word in enumerate(vocab)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"^#.*$"), "")                  # the map
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", unk_token="<|unk|>", eos_token="<|end|>",
        additional_special_tokens=control[2:4], chat_template=TINY_TEMPLATE)


def tiny_model(tokenizer, seed):
    """A stock Llama of 0.16 million parameters with fresh weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed, "tiny"))
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
            initializer_range=0.1,             # with the usual 0.02 so narrow a model hardly starts
            tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None))


def demonstration(tokenizer, system, messages, turns):
    """A given conversation as a Trajectory, its answers standing where sampled tokens would."""
    chat = Chat(tokenizer)
    t = Trajectory("demonstration", system, messages[0]["content"], messages=messages)
    for turn in range(turns):
        answer, observation = messages[2 * turn + 1]["content"], messages[2 * turn + 2]["content"]
        t.add_tokens(chat.encode(answer), sampled=True)
        if turn + 1 < turns:
            t.add_tokens(chat.next_turn(observation, ended=False), sampled=False)
    return t


def warm_start(model, tokenizer, world, cfg):
    """Clone a player who is shy of boxes, and less so with notes on the level.

    The targets are the player's own move probabilities (see sokoban_env.play_as); the notes stand
    where a skill will. The rooms are none of the world's.
    """
    demos = sokoban_env.demonstrations(
        cfg.warm_demos, derived_seed(cfg.seed, "demos"), cfg.size, cfg.boxes, cfg.max_moves,
        cfg.max_turns, world.all_tasks, cfg.warm_timid, cfg.warm_notes)
    rng = random.Random(derived_seed(cfg.seed, "warm"))
    data = [(demonstration(tokenizer, "", messages, len(probs)), skill and Skill(**skill), probs)
            for messages, probs, skill in tqdm(demos, desc="demonstrations", disable=None)]
    batches = []
    for start in range(0, len(data), 50 * cfg.warm_batch):     # similar lengths: less padding
        window = sorted(data[start:start + 50 * cfg.warm_batch], key=lambda d: len(d[0].ids))
        window = [window[i:i + cfg.warm_batch] for i in range(0, len(window), cfg.warm_batch)]
        batches += rng.sample(window, len(window))
    move_ids = [tokenizer.convert_tokens_to_ids(move) for move in sokoban_env.MOVES]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    for step, batch in enumerate(tqdm(batches, desc="warm start", disable=None)):
        done = (step + 1) / len(batches)                       # rise for a tenth, then a cosine
        for group in optimizer.param_groups:
            group["lr"] = cfg.warm_lr * min(1, 10 * done) * (1 + math.cos(math.pi * done)) / 2
        trajectories, skills, targets = zip(*batch)
        logits, _ = action_logits(model, tokenizer, trajectories, skills)
        logp = F.log_softmax(logits, dim=-1)[:, move_ids]      # (turns, 4): an answer is one move
        loss = -(torch.tensor(sum(targets, []), device=logp.device) * logp).sum(-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def load_pretrained(path, cfg):
    """(model, tokenizer) of a chat model, float32: a folder, or a name on the Hugging Face hub, of
    which a copy on this machine is used as it is. No code of the model's own is run."""
    device = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {error}") from error

    def load(**where):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **where)
        for name in vars(config):              # see `update`
            if "dropout" in name or name.endswith("_pdrop"):
                setattr(config, name, 0.0)
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, trust_remote_code=False, **where)
        return model, AutoTokenizer.from_pretrained(path, trust_remote_code=False, **where)
    try:
        model, tokenizer = load(local_files_only=True)
    except Exception as error:                 # every library has its own
        try:
            if Path(path).is_dir():
                raise
            HfApi().model_info(str(path), timeout=10)          # from_pretrained retries for long
        except Exception as reason:            # of many kinds; all mean that it cannot be had
            raise ValueError(f"model={str(path)!r} is no folder with a model, not on this machine, "
                             "and not to be had from the hub; give a folder or an instruct model's "
                             "name, be online, and `hf auth login` if it is gated. "
                             f"{type(reason).__name__}: {reason}; here: {error}") from error
        model, tokenizer = load()
    config, window = model.config.get_text_config(), context_window(model, cfg.max_context)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for unfit in ({*(getattr(config, "layer_types", None) or [])}
                  - {"full_attention", "sliding_attention"},
                  model._is_stateful and "recurrent layers",
                  {rope.get("rope_type")} & {"longrope", "dynamic"}):
        if unfit:
            raise ValueError(f"model={str(path)!r} has {unfit}: the cache keeps keys that do not "
                             "change with the length; use a model of plain or sliding attention")
    if cfg.max_context > window:
        raise ValueError(f"max_context={cfg.max_context}: {path} reads at most {window} tokens")
    if cfg.gradient_checkpointing:
        renamed = getattr(model, "activation_checkpointing_enable", None)    # transformers 5
        (renamed or model.gradient_checkpointing_enable)(dict(use_reentrant=False))
    return model.to(device), tokenizer


def load_model(cfg, world):
    """(student, tokenizer). The embedded model's warm start is cached under what it depends on."""
    if cfg.model != "tiny":
        return load_pretrained(cfg.model, cfg)
    names = ("seed size boxes min_moves max_moves max_turns train_levels test_levels level_seed "
             "warm_demos warm_batch warm_lr warm_timid warm_notes").split()
    code = [inspect.getsource(part) for part in (sokoban_env, Chat, action_logits, tiny_tokenizer,
                                                 tiny_model, demonstration, warm_start)]
    key = [[getattr(cfg, name) for name in names], code, SKILL_TEXT, TINY_TEMPLATE,
           torch.__version__]
    folder = Path(cfg.out) / f"warm-start-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
    if not folder.exists() and not rank():
        tokenizer = tiny_tokenizer(cfg.size)
        student = tiny_model(tokenizer, cfg.seed)
        warm_start(student, tokenizer, world, cfg)
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        student.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if not folder.exists():                # else another run was as quick
            os.replace(part, folder)
    gather([])                                 # the other ranks wait for it
    return load_pretrained(folder, cfg)


# =============================================================================================
# Command line
# =============================================================================================

def show_prompts(cfg):
    """One task's student and teacher tokens side by side: only the skill differs."""
    world = make_world(dataclasses.replace(cfg, env="sokoban"))
    tokenizer = (tiny_tokenizer(cfg.size) if cfg.model == "tiny"
                 else AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False))
    env, rng = world.make_env(world.train[0]), random.Random(cfg.seed)
    messages, probs = sokoban_env.play_as(env, sokoban_env.distances(env.level), rng, timid=0.3)
    t = demonstration(tokenizer, env.system_prompt, messages, turns=min(3, len(probs)))
    skill, chat = Skill(**sokoban_env.analyse(messages)), Chat(tokenizer)
    student = chat.prompt(t.system, t.task)
    teacher = chat.prompt(t.system, t.task, skill, cfg.max_skill_tokens)
    extra = len(teacher) - len(student)                        # length of the skill
    start = len(chat.before + chat.between) + len(chat.encode(t.system)) * chat.has_system
    print(f"{'student':<32}{'teacher':<32}")
    for i, y in enumerate(teacher + t.ids):
        token = f"{y:>7}  {tokenizer.convert_ids_to_tokens(y)}"
        left = "" if start <= i < start + extra else f"{i - extra * (i >= start):>5}{token}"
        scored = i >= len(teacher) and t.mask[i - len(teacher)]
        print(f"{left:<32}{f'{i:>5}{token}':<32}{'<- action' if scored else ''}".rstrip())


def evaluate_run(cfg):
    """Play the held-out tasks with the student of a finished run."""
    folder = Path(cfg.out) / cfg.name
    if not (folder / "result.json").exists():
        raise ValueError(f"eval={str(folder)!r}: not a finished run, which has a result.json")
    student, tokenizer = load_pretrained(folder / "student", cfg)
    print_table([(cfg.method, cfg.seed, evaluate(student, tokenizer, make_world(cfg), cfg))])


def resumed(folder, given):
    """The Config of a run that was stopped, wherever its folder is now."""
    folder = Path(folder).resolve()
    try:
        cfg = Config(**json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"resume={str(folder)!r}: not the folder of a run: {error}") from error
    return check(dataclasses.replace(cfg, **(given | dict(out=str(folder.parent),
                                                          name=folder.name))))


def show_run(cfg):
    """What a reader wants to see of a finished run: a solved task, a skill, the files."""
    folder, world = RunFolder(cfg).path, make_world(cfg)
    student, tokenizer = load_pretrained(folder / "student", cfg)
    solved = max(play(student, tokenizer, world, world.heldout[:32], cfg, greedy=True),
                 key=lambda t: (t.reward, t.turns))
    print(f"\nHeld-out task {solved.task_id}, the trained student playing greedily, completion "
          f"{solved.reward:.2f}:\n")
    for m in solved.messages:
        print(m["content"] if m["role"] == "user" else f"  -> {m['content']}\n")
    bank = json.loads((folder / "bank.json").read_text())
    entries = [entry for task in bank.values() for entry in task]
    if entries:
        best = max(entries, key=lambda e: (e["source_reward"], e["picks"]))
        print(f"\nOne of {len(entries)} skills of {len(bank)} tasks, picked {best['picks']} times:")
        print(json.dumps(best["skill"], indent=1))
    print(f"\nFiles: {folder}/config.json log.jsonl result.json bank.json checkpoint-*/ student/")


def plan(method, seed, cfg, given):
    """The checked Config of one run: defaults, what was typed, and above it the method's row."""
    row, names = METHODS[method], [f.name for f in dataclasses.fields(Config)]
    training = set(names[names.index("group_size"):names.index("env")])
    training = training - {"temperature", "max_skill_tokens"} | {"curriculum"}
    if method == cfg.method:
        for name in row:
            if given.get(name, row[name]) != row[name]:
                raise ValueError(f"{name}={given[name]!r}: method {method} means {row[name]!r}; "
                                 "leave it out, or take another method")
    name = cfg.name if method == cfg.method or not cfg.name else f"{cfg.name}-{method}"
    given = settings(given | dict(method=method, seed=seed, name=name))
    if method != cfg.method and row.get("iterations") == 0:    # the base comes along, whatever the
        given = {k: v for k, v in given.items() if k not in training - row.keys()}   # training
    return check(Config(**given))


def run_all(cfg, given):
    """Every (method, seed) asked for, each from the warm start of its seed, as one table."""
    methods = [name for name in METHODS if cfg.method == "all" or name in ("base", cfg.method)]
    if cfg.env != "sokoban" or cfg.split != "test":            # no levels to tune it on
        methods = [name for name in methods if name != "base_best_t" or name == cfg.method]
    if cfg.name and (cfg.method == "all" or cfg.seeds > 1):
        raise ValueError(f"name={cfg.name!r}: one folder cannot hold several runs; use --out")
    plans = [plan(method, seed, cfg, given)                    # all checked before anything runs
             for seed in range(cfg.seed, cfg.seed + cfg.seeds) for method in methods]
    results = []
    for run, folder in [(run, RunFolder(run)) for run in plans]:
        if STOP.is_set():
            raise KeyboardInterrupt("stopped between two runs; the same command goes on")
        results.append((run.method, run.seed, folder.read("result.json") or train(run)))
    if not rank():
        print_table(results)
        print_curves(plans)
        show_run(next((run for run in plans if run.method == "skill_sd"), plans[-1]))


def parse_args(argv=None):
    """The typed settings and the other commands. Config's comments are the help texts."""
    parser = argparse.ArgumentParser(description="Skill-SD: see the top of this file.")
    source = inspect.getsource(Config)
    for f in dataclasses.fields(Config):
        comment = re.search(rf"^    {f.name}: .*?  # (.*?)(  +CHOICE)?$", source, re.MULTILINE)
        parser.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=argparse.SUPPRESS,
                            help=f"{comment[1]} (default: {f.default!r})".replace("%", "%%"))
    parser.add_argument("--eval", metavar="RUN", help="play held-out tasks with a run's student")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped")
    parser.add_argument("--show-prompts", action="store_true", help="both prompts, side by side")
    given = vars(parser.parse_args(argv))
    return given, SimpleNamespace(**{name: given.pop(name)
                                     for name in ("eval", "resume", "show_prompts")})


def stop(signum, frame):
    STOP.set()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tqdm.write("stopping after this iteration or evaluation; Ctrl-C again stops at once")


def main():
    given, command = parse_args()
    try:
        for name in given.keys() - {"device", "threads"} if command.eval else ():
            raise ValueError(f"{name}={given[name]!r}: --eval plays with the run's own settings; "
                             "leave it out")
        folder = command.resume or command.eval
        cfg = resumed(folder, given) if folder else check(Config(**settings(given)))
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        if command.show_prompts:
            show_prompts(cfg)
        elif command.eval:
            evaluate_run(cfg)
        else:
            signal.signal(signal.SIGINT, stop)
            start_ranks(cfg)
            if command.resume:
                played = train(cfg)
                if not rank():
                    print_table([(cfg.method, cfg.seed, played)])
            else:
                run_all(cfg, given)
            if ranks() > 1:
                dist.destroy_process_group()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interrupt:
        sys.exit(str(interrupt) or "stopped")


if __name__ == "__main__":
    main()
