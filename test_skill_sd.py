# SPDX-License-Identifier: MIT
"""What must stay true: `python -m pytest -q`, on a CPU, a minute and a half on two cores."""
import contextlib
import copy
import dataclasses
import fnmatch
import http.server
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import subprocess
import sys
import threading
import types
from pathlib import Path
from unittest.mock import Mock

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from torch.nn.utils import parameters_to_vector as vector

import appworld_adapter
import skill_sd
import sokoban_env
from skill_sd import (Chat, Config, Skill, SkillBank, group_advantages, grpo_loss, main,
                      parse_skill, response_logps, rollout, sdl_loss, token_mean)
from sokoban_env import (BLOCKED, MOVES, NO_MOVE, SokobanEnv, UserError, canonical, distances,
                         generate_levels, move_probs, parse_action, parse_level, solve, to_xsb)

torch.set_num_threads(1)             # on tensors this small, threads only wait for each other
HERE = Path(__file__).parent
README_CODE = re.findall("```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
SKILLS = [Skill("went up first", "none seen", "b2 up, b3 left"),
          Skill("1 of 2 boxes on goals", "pushed a box to d3 where it is stuck", "b2 down")]
SAID = f"Sure!\n```json\n{json.dumps(vars(SKILLS[0]))}\n```"
WRITTEN = {"choices": [{"message": {"content": SAID}}]}
SMALL = ("--device cpu --iterations 6 --tasks-per-iteration 3 --train-levels 3 --test-levels 8 "
         "--lr 0.01 --group-size 4 --max-turns 5 --min-moves 1 --max-moves 3 --warm-demos 800 "
         "--save-every 1 --sync-every 2 --out").split()
# Microban by David W. Skinner (April 2000); may be freely distributed provided it remains properly
# credited. This level takes 107 moves.
MICROBAN = "###### #####\n#    ###   #\n# $$     #@#\n# $ #...   #\n#   ########\n#####"


@pytest.fixture(scope="session")
def tiny():
    """A tokenizer and a tiny model with large weights. Each third word ends an answer."""
    tokenizer = sokoban_env.tiny_tokenizer(6)
    model = sokoban_env.tiny_model(tokenizer, seed=0)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *range(5, len(tokenizer), 3)]
    return model, tokenizer


def played(tiny, n=6, max_turns=4, skills=None, greedy=False, seed=1, **settings):
    """Trajectories of n ragged episodes of the tiny model, and their Config."""
    envs = [SokobanEnv(x, 1 + i % max_turns, "") for i, x in enumerate(generate_levels(n, seed=3))]
    cfg, generator = Config(**dict(max_new_tokens=4) | settings), torch.Generator(tiny[0].device)
    return rollout(*tiny, envs, cfg, skills, generator.manual_seed(seed), greedy), cfg


def smallest(out, **settings):
    """A Config that trains in seconds and comes back to its tasks."""
    typed = Config.parse_args([*SMALL, str(out)])
    return Config(**typed | dict(iterations=4, evals=0, save_every=10, sync_every=1) | settings)


# ---- Losses --------------------------------------------------------------------------------------
@pytest.mark.parametrize("at_theta_old", [True, False])
def test_sdl_by_enumeration_is_reverse_kl(at_theta_old):
    """Each token once, weighted by pi_old. With rho detached, or dropped at theta_old: forward."""
    rows = torch.randn(3, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    student = rows[0].requires_grad_()
    p, q, o = ((1.5 * x).log_softmax(-1)
               for x in (student, rows[1], student.detach() if at_theta_old else rows[2]))
    k3 = o.exp() * ((q - p).exp() - 1 + p - q)
    wrong = k3 if at_theta_old else (p - o).exp().detach() * k3
    shipped = sum(o[y].exp() * sdl_loss(*(x[y].view(1, 1) for x in (p, q, o)), torch.ones(1, 1))
                  for y in range(7))
    for loss, kl in (shipped, p.exp() * (p - q)), (wrong, q.exp() * (q - p)):
        a, b = (torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (loss, kl))
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("log_ratio", [0.0, 1e-4, 0.5, -3.0, 20.0, -20.0, 90.0, -90.0])
@pytest.mark.parametrize("shift", [0.0, 0.7, 90.0])           # rho is at most e**20
def test_sdl_value_and_gradient_per_token_in_float32(log_ratio, shift):
    logp = torch.tensor([[-100.0]], requires_grad=True)
    teacher, old = torch.tensor([[-100.0 - log_ratio]]), torch.tensor([[-100.0 - shift]])
    loss = sdl_loss(logp, teacher, old, torch.ones(1, 1))
    loss.backward()
    l, rho = (logp - teacher).item(), math.exp(min(20, (logp - old).item()))
    assert logp.grad.item() == pytest.approx(rho * l, rel=1e-6)
    assert loss.item() == pytest.approx(rho * (math.expm1(-l) + l), rel=1e-6)


@pytest.mark.parametrize("filler", [0.0, 1e30, -1e30, 3e38])
def test_padding_may_hold_anything_finite_and_parts_add_up_to_the_whole(filler):
    mask, adv = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([1.0, -2.0])
    rows = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    def losses(p, q, o, mask, adv, n=None):
        grpo = grpo_loss(p, o, adv, mask, 0.2, 0.3, n)
        return sdl_loss(p, q, o, mask, n) + grpo + token_mean(p, mask, n)
    p, q, o = (torch.where(mask.bool(), x, filler * sign) for x, sign in zip(rows, (1, -1, -1)))
    whole = p.requires_grad_(), q, o, mask, adv
    parts = sum(losses(*(x[i:i + 1] for x in whole), n=3) for i in (0, 1))
    for loss in losses(*whole), parts:
        p.grad = torch.autograd.grad(loss, p)[0]
        assert loss.item() == pytest.approx(losses(*(rows * mask), mask, adv).item(), rel=1e-6)
        assert torch.isfinite(p.grad).all() and (p.grad[mask == 0] == 0).all()
        assert torch.allclose(p.grad, torch.autograd.grad(losses(*whole), p)[0], rtol=1e-6)
    x = torch.tensor([[1.0, 2.0, filler], [6.0, math.inf, math.nan]])
    assert (token_mean(x, mask), token_mean(x, 0 * mask)) == (3, 0)      # not a mean of rows


@pytest.mark.parametrize("rewards, group_size, eps, advantages", [
    ([0, 0, 1, 1, 0, 1, 0, 0], 4, 0.0, [-1, -1, 1, 1, *(x / 3**0.5 for x in (-1, 3, -1, -1))]),
    ([0, 1], 2, 0.5, [-0.5, 0.5]), ([1, 1 + 1e-12], 2, 0.0, [-1, 1]),          # in float64
    ([0, 1, math.nan, 1, *[math.nan] * 5], 3, 0.0, [-1, 1, *[0] * 7]),      # lost episodes
    *(([r] * 6 + [end], 7, 0.0, [0] * 7) for r in (0.0, 1.0, 1 / 3, 0.1) for end in (r, math.nan))])
def test_advantages_by_hand(rewards, group_size, eps, advantages):
    found = group_advantages(rewards, group_size, eps)
    assert found.tolist() == pytest.approx(advantages, rel=1e-6, abs=0.0)
    pytest.raises(AssertionError, group_advantages, rewards, 5).match("group_size=5")


@pytest.mark.parametrize("ratio, adv, value, slope", [
    (1.1, 1.0, -1.1, -1.1), (1.5, 1.0, -1.28, 0.0), (0.5, 1.0, -0.5, -0.5),
    (1.5, -1.0, 1.5, 1.5), (0.5, -1.0, 0.8, 0.0), (0.9, -1.0, 0.9, 0.9),
    (math.exp(90), 1.0, -1.28, 0.0), (math.exp(90), -1.0, math.exp(20), 0.0)])    # e**20 at most
def test_grpo_clips_and_is_a_mean_over_tokens(ratio, adv, value, slope):
    logp = torch.tensor([[math.log(ratio), 9.0, 9.0], [0.0] * 3], requires_grad=True)
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    loss = grpo_loss(logp, torch.zeros(2, 3), torch.tensor([adv, 2.0]), mask, 0.2, 0.28)
    loss.backward()
    assert 4 * loss.item() == pytest.approx(value - 3 * 2.0, rel=1e-6)     # second row: ratio 1
    assert 4 * logp.grad[0, 0].item() == pytest.approx(slope, rel=1e-6)


def test_losses_refuse_what_would_broadcast():
    x, adv, thin, flat = (torch.ones(shape) for shape in ((2, 3), (2,), (2, 1), (3,)))
    told = r"logp_student torch.Size.*\(B, T\)"
    for given in (x, thin, adv, x), (x, x, thin, x), (x, x, adv, thin), (flat, flat, flat, flat):
        pytest.raises(ValueError, grpo_loss, *given, 0.2, 0.2).match(told)
    for given in (x, thin, x, x), (x, x, thin, x), (x, x, x, thin), (flat, flat, flat, flat):
        pytest.raises(ValueError, sdl_loss, *given).match(told)


# ---- Skills and bank -----------------------------------------------------------------------------
def test_parse_skill_forgives_what_surrounds_it_and_refuses_what_is_none():
    fields = dict(success_analysis=" a ", mistake_analysis="b", golden_workflow="c {d}")
    whole, dot = json.dumps(fields), json.dumps(dict.fromkeys(fields, "."))
    for text in (whole, f"Sure! Here:\n```json\n{json.dumps(fields, indent=2)}\n```\nDone.",
                 '{"note": {}} ' + json.dumps({"more": 1} | dict(reversed(fields.items()))),
                 whole[:-1] + ', "more": "and mo', '{"success_analysis": "lost"} ' + whole[:-1],
                 f"<think>As {whole.replace('b', 'x')}</think>" + whole[:-1].replace("a ", "a\n"),
                 f"{whole[:-1]}\n```\n</think>\n\nDone.", whole[:-1] + ",}\n```\nDone."):
        assert parse_skill(text) == Skill("a", "b", "c {d}")
        assert parse_skill(text.replace('"b"', '"b\\ud800"')) == Skill("a", "b?", "c {d}")
    assert parse_skill(whole.replace('" a "', "null")) == Skill("", "b", "c {d}")
    assert parse_skill(whole.replace('"c {d}"', '["c", "d"]')) == Skill("a", "b", "c\nd")
    assert parse_skill(whole.replace("{d}", "\\_d")).golden_workflow == r"c \_d"      # no JSON
    inner = [whole.replace("{d", f"\"{piece}\" {{d") for piece in ("up", "up, left", ",")]
    for text in (*inner, *(text[:-1] for text in inner), *(text[:-1] + ",}" for text in inner),
                 *(whole.replace('" a "', x) for x in ("1", "{}", "[1]", '{"x": "y"}', "false")),
                 "", "{" * 5000, '{"a":' * 3000, "[1, 2]", "null", dot.replace(".", " "),
                 '{"success_analysis": "x"}', whole[:-3], " " * 10**6 + whole,
                 '{"success_analysis": "a", "mistake_analysis": "b"} {"golden_workflow": "c"}'):
        pytest.raises(ValueError, parse_skill, text).match("no JSON object with")


def test_ucb_by_hand():
    """And the bank takes only what is new, and drops the worst."""
    bank, small = SkillBank(c=0.5), SkillBank(c=1.0, size=2)
    a, b, c = (Skill(name, "", "") for name in "abc")
    assert bank.select("t") is None
    for task, skill in (("t", a), ("t", b), ("other", a)):
        bank.add(task, skill)
    first, second = bank.entries["t"]
    for chosen, reward in ((first, 0.9),       # untried before any tried one
                           (second, 0.1),
                           (first, 0.0),       # equal bonus: 0.9 against 0.1
                           (first, 0.2),       # 0.45, n 2: 0.821; 0.1, n 1: 0.624
                           (first, 0.0),       # 0.367, n 3: 0.707; 0.1, n 1: 0.689
                           (second, 0.0),      # 0.275, n 4: 0.592; 0.1, n 1: 0.734
                           (first, 0.0)):      # 0.275, n 4: 0.610; 0.05, n 2: 0.523
        assert bank.select("t") is chosen
        bank.credit(chosen, reward)
        bank.credit(bank.select("other"), 0.0) # N is per task
    for reward, wanted, skill, held, credited in (
            (0.0, True, a, [a], ()), (1.0, True, a, [a], ()), (0.5, True, b, [a, b], ()),
            (0.2, False, c, [a, b], [(0, 0.7), (0, 0.2), (1, 0.2)]),   # it has to beat every one
            (0.5, False, c, [a, b], [(1, 0.2)]),           # no better, not all picked twice
            (0.0, True, c, [a, c], ()),                    # b: mean 0.2; a: 0.45
            (0.6, True, b, [c, b], [(0, 0.4)] * 2 + [(1, 0.2)] * 5),   # c is untried: it may stay
            (0.0, True, a, [c, a], ())):                   # the worst mean goes, not the worst sum
        assert small.wants("t", reward) == wanted
        if wanted:
            small.add("t", skill, reward)
        assert [e["skill"] for e in small.entries["t"]] == held
        for i, credit in credited:
            small.credit(small.entries["t"][i], credit)
    for reward in math.nan, torch.tensor(math.inf):            # a tensor is fine, if it is finite
        pytest.raises(AssertionError, bank.credit, first, reward).match("reward=")
        pytest.raises(AssertionError, bank.add, "t", c, reward).match("reward=")
    bank.credit(first, torch.tensor(0.5))
    assert (first["picks"], first["reward_sum"]) == (6, pytest.approx(1.6))


# ---- Prompts, of templates and tokenizers as real models have them -------------------------------
def template(start, end, before="", opens=""):
    return (before + "{% for m in messages %}" + start + "{{ m.content | trim }}" + end +
            "{% endfor %}{% if add_generation_prompt %}{% set m = {'role': 'assistant'} %}" +
            start + opens + "{% endif %}")


RULES, PREFILL = sokoban_env.SYSTEM_PROMPT, "<think>\n\n</think>\n\n"
ROOM = SokobanEnv(parse_level("#######\n#@$.#.#\n#  $###\n#######")).reset()
TINY, CHATML = sokoban_env.TINY_TEMPLATE, ("<|im_start|>{{ m.role }}\n", "<|im_end|>\n")
LLAMA_2 = TINY.replace("<|end|>", " </s>")     # a blank before what ends a turn
MISTRAL = ("<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and "
           "messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }} "
           "[/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}")
FAMILIES = dict(                               # what ends a turn, and the template
    tiny=("<|end|>", TINY), mistral=("</s>", MISTRAL),
    chatml=("<|im_end|>", template(*CHATML, "{% if messages[0].role != 'system' %}<|im_start|>"
                                   "system\nYou help.<|im_end|>\n{% endif %}")),
    gemma=("<end_of_turn>", template(
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n", "<end_of_turn>\n",
        "<s>{% if messages[0].role == 'system' %}{{ raise_exception(0) }}{% endif %}")),
    glm_4=("<|user|>", template("<|{{ m.role }}|>\n", "", "[gMASK]<sop>")),   # the next header
    opens_thinking=("<|im_end|>", template(*CHATML, "", "<think>\n")),
    always=("</s>", LLAMA_2), first=("</s>", LLAMA_2), normalizer=("</s>", LLAMA_2),
    nfkc=("<|im_end|>", template(*CHATML)))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_conversation_is_the_templates_own(name):
    """Turn by turn, ids are those of the whole rendered at once; what ends a turn is said once. A
    skill stands above the task, in no more than max_skill_tokens, and no text forges a turn."""
    (end, form), tokenizer = FAMILIES[name], Tokenizer(models.BPE())
    sentencepiece, level = form == LLAMA_2, ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="never") if sentencepiece else level
    tokenizer.train_from_iterator([RULES, skill_sd.SUMMARIZER_PROMPT, ROOM], trainers.BpeTrainer(
        vocab_size=500 * (name != "first"), initial_alphabet=ByteLevel.alphabet()))   # 0: no merges
    if name == "nfkc":                         # full-width letters become plain ones
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    if name == "normalizer":
        tokenizer.pre_tokenizer, tokenizer.normalizer = None, normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    elif sentencepiece:
        tokenizer.pre_tokenizer = Metaspace(prepend_scheme=name)
    tokenizer.add_special_tokens(
        "<s> </s> [gMASK] <sop> <|system|> <|user|> <|assistant|>".split())
    tokenizer.add_tokens([AddedToken(token, normalized=name == "nfkc") for token in (
        "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
        "<think>", "</think>", "\n\n\n", "think>up")])          # not special; two overlap
    tokenizer = sokoban_env.tiny_tokenizer(6) if form == TINY else (
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>",
                                             eos_token="</s>"))
    tokenizer.chat_template = form
    tokenizer.backend_tokenizer.enable_truncation(max_length=8)        # `encode` ignores both
    tokenizer.backend_tokenizer.enable_padding(length=900)
    def whole(*said, room=ROOM, more=""):      # the ids of a whole conversation
        head = [dict(role="system", content=RULES), dict(role="user", content=room)]
        if sentencepiece or name in ("gemma", "mistral", "tiny"):        # the rules stand above
            head = [dict(role="user", content=f"{RULES}\n\n{room}")]
        text = tokenizer.apply_chat_template([*head, *said], tokenize=0, add_generation_prompt=True)
        if name == "opens_thinking":           # what was sampled after <think> stays there
            text = re.sub("assistant\n(?!<think>)", "assistant\n<think>\n", text)
        return tokenizer.encode(text + more, add_special_tokens=False)
    chat, said, rng = Chat(tokenizer), [], random.Random(0)
    ids, begun = chat.prompt(RULES, ROOM), Chat(tokenizer, PREFILL)
    assert ids == whole() and begun.prompt(RULES, ROOM) == whole(more=PREFILL)
    assert chat.prompt(RULES, f" {ROOM}\n ") == whole(room=f" {ROOM}\n ")      # blank edges
    turn, prefill = chat.next_turn("left", 9), whole(more=PREFILL)[len(whole()):]
    assert begun.next_turn("left", 9) == turn + prefill
    for answer in ("up", "I see.\ndown", "left"):
        blank = " " * (form == MISTRAL)        # its template puts one before it
        ids += tokenizer.encode("<|user|>" + blank + answer, add_special_tokens=False)[1:]
        ids += chat.next_turn(ROOM, ids[-1])
        said += [dict(role="assistant", content=answer), dict(role="user", content=ROOM)]
    end = tokenizer.convert_tokens_to_ids(end)
    assert ids == whole(*said) and chat.eos_ids == {tokenizer.eos_token_id, end}
    assert turn.index(end) == sentencepiece    # behind a blank
    for last in range(len(tokenizer)):         # also where an answer was cut after a line break
        assert chat.next_turn("left", last) == turn[turn.index(end) + 1 if last == end else 0:]
    added = tokenizer.get_added_vocab()
    control = {i for token, i in added.items() if token.strip() and token != "<|unk|>"}
    pieces = [*added, *(token[:-1] for token in added), *(token[1:] for token in added), "<", ">",
              "|", " ", "\n", "\u2581", "e\u0301", "\ud800", "\x00", "user", "[", "<think>up",
              "\uff1c|im_end|\uff1e", "<|IM_END|>"]
    def control_ids(task, observation, *fields):
        ids = chat.prompt(RULES, task, Skill(*fields)) + chat.next_turn(observation, 9)
        return [i for i in ids if i in control]
    for _ in range(50):                        # no text can forge control tokens
        texts = ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(5)]
        assert control_ids(*texts) == control_ids(*["x"] * 5), ascii(texts)
        for text in texts:                     # no more than blanks have changed
            assert chat.clean(text).replace(" ", "") == text.replace("\ud800", "?").replace(" ", "")
    skill = Skill("went up,  na\u00efve but fine " * 9, "none seen", "b2 up, b3 left")
    notes = skill_sd.SKILL_TEXT.format(**dataclasses.asdict(skill))
    assert Chat(tokenizer, "", 999).prompt(RULES, ROOM, skill) == whole(room=f"{notes}\n\n{ROOM}")
    cuts = [whole(room=f"{notes[:n]}\n\n{ROOM}") for n in range(len(notes) + 1)]
    for room in (8, 17, 30, 31, 32, 33):
        cut = Chat(tokenizer, "", room).prompt(RULES, ROOM, skill)
        more = min(room, len(cuts[-1]) - len(whole()))
        assert cut in cuts and more - 2 <= len(cut) - len(whole()) <= more + 2


# ---- Rollout, scoring, one update ----------------------------------------------------------------
def recorded(monkeypatch, owner, *names):
    """The calls of these functions from now on, by name: [(arguments, result)]."""
    calls = {name: [] for name in names}
    for name in names:
        def spy(*args, real=getattr(owner, name), seen=calls[name], **keywords):
            seen.append((args + tuple(keywords.values()), real(*args, **keywords)))
            return seen[-1][1]
        monkeypatch.setattr(owner, name, spy)
    return calls


def world(texts, reward=0.5, meet=int, **more):
    """An environment that says these texts, one a turn, with no more than the interface."""
    def say(answer=None):
        meet()
        told.append(answer)
        return texts[len(told) - 1]
    told = []
    return types.SimpleNamespace(
        task_id=texts[-1], system_prompt="", reset=say, completion=lambda: reward, told=told,
        step=lambda answer: (say(answer), len(told) == len(texts)), texts=texts,
        close=lambda: told.append("closed"), **more)


@pytest.mark.parametrize("temperature, greedy", [(1.0, False), (0.7, True)])
@pytest.mark.parametrize("how", [{}, dict(skill_reader="student", lam=0.0), dict(actor="teacher")])
def test_rescoring_gives_the_recorded_logps(tiny, temperature, greedy, how, monkeypatch):
    """And those of each row by hand. The student's rows never hold a skill that it may not read."""
    model, skills, notes = tiny[0], [None, *SKILLS] * 2, tiny[1].convert_tokens_to_ids("Notes")
    passes = recorded(monkeypatch, model.model, "forward")["forward"]
    batch, cfg = played(tiny, skills=skills, greedy=greedy, rollout_batch=4,
                        temperature=temperature, **how)
    assert sum((ids == notes).sum() for (ids, *_), _ in passes) == 4 * bool(how)
    assert len({len(t.ids) for t in batch}) > 3                # ragged indeed
    sampled = torch.tensor([x for t in batch for x in t.logps])
    for with_skill in (False, True):
        logp, mask = response_logps(model, batch, cfg, with_skill)
        scored_by_teacher, best = skill_sd.score(model, batch, cfg), []
        assert torch.equal(scored_by_teacher, logp) == with_skill
        assert logp.requires_grad and not scored_by_teacher.requires_grad
        gap = (logp[mask] - sampled).abs().max()
        assert gap < 1e-4 if with_skill == bool(how) else gap > 0.1
        assert (logp[~mask] == 0).all()
        for t, skill, scored, used in zip(batch, skills, logp, mask):
            prompt = t.skill_prompt if with_skill else t.prompt
            assert prompt.count(notes) == (with_skill and skill is not None)
            logits = model(torch.tensor([prompt + t.ids])).logits[0, len(prompt) - 1:-1]
            by_hand = (logits / temperature).log_softmax(-1)[range(len(t.ids)), t.ids]
            assert torch.allclose(scored[used], by_hand[t.mask], atol=1e-5)
            best += (logits.argmax(-1) == torch.tensor(t.ids))[t.mask].tolist()
        assert with_skill != bool(how) or all(best) == greedy


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3Text"])
def test_sampling_equals_scoring_in_every_architecture(tiny, name, monkeypatch):
    """Ragged conversations longer than a sliding window, with texts longer than is read at once."""
    torch.manual_seed(0)
    mixed = dict(query_pre_attn_scalar=16, attn_logit_softcapping=5.0, layer_types=[
        "sliding_attention", "full_attention"]) if "Gemma" in name else {}
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name + "Config")(
        vocab_size=len(tiny[1]), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
        initializer_range=0.3, eos_token_id=[*range(5, 190, 3)], pad_token_id=0, bos_token_id=None,
        sliding_window=24 if name in ("Mistral", "Gemma2", "Gemma3Text") else None, **mixed))
    envs = [world(["Notes" + " up" * length for length in lengths]) for lengths in (
        (530, 3, 9), (40, 530), (40, 530, 0, 1), (600, 0, 513, 2), (503, 503))]
    cfg = Config(max_context=4096, max_new_tokens=3)
    passes = recorded(monkeypatch, model.model, "forward")["forward"]
    trajectories = rollout(model, tiny[1], envs, cfg)
    seen = [ids.shape for (ids, *_), _ in passes]
    assert max(length for _, length in seen) == 512 and seen[0][0] == 4      # two prompts are equal
    logp, mask = response_logps(model, trajectories, cfg)
    gap = logp[mask] - torch.tensor([x for t in trajectories for x in t.logps])
    assert len(gap) > 12 and gap.abs().max() < 1e-4


def test_answers_and_conversations_end_where_they_must(tiny, capsys):
    """Answers follow the generator; the next one, and a skill, have to fit into max_context."""
    p, n = torch.tensor([0.1, 0.2, 0.7]), 10_000
    ids, _ = skill_sd.sample_answers(
        None, p.log().expand(n, 3), {}, Config(), torch.Generator().manual_seed(0), greedy=False)
    assert (torch.tensor(ids).flatten().bincount() / n - p).abs().max() < 0.02
    chat, ends, every = Chat(tiny[1]), tiny[0].generation_config.eos_token_id, []
    how = dict(max_turns=6, max_skill_tokens=20, skills=SKILLS * 3, rollout_batch=4)
    for limit in range(70, 90, 2):
        batch, again, other = (played(tiny, max_context=limit, seed=i, **how)[0] for i in (1, 1, 2))
        assert [t.ids for t in batch] == [t.ids for t in again] != [t.ids for t in other]
        every += batch
        for i, t in enumerate(batch):
            text = " ".join(str(y) if m else "/" for y, m in zip(t.ids, t.mask))
            answers = [[int(y) for y in run.split()] for run in text.split("/") if run.strip()]
            assert len(t.logps) == sum(t.mask) and t.turns == len(t.messages) // 2 == len(answers)
            for *begun, last in answers:
                assert not any(y in ends for y in begun) and (last in ends or len(begun) == 3)
            assert t.counts["cut_answers"] == sum(answer[-1] not in ends for answer in answers)
            following = chat.next_turn(t.messages[-1]["content"], t.ids[-1])
            room = limit - len(t.prompt + t.ids) - 20 - 2      # "\n\n" are two tokens at most
            assert 0 <= room and len(t.skill_prompt + t.ids) <= limit and t.mask[-1]
            assert t.counts["truncated"] == (t.turns < 1 + i and t.reward < 1)
            assert not t.counts["truncated"] or len(following) + 4 > room
    assert 0 < sum(t.counts["cut_answers"] for t in every) < sum(t.turns for t in every)
    full = [t for t in every if t.counts["truncated"]]
    assert len(full) > 10 and sokoban_env.not_lost(full, 70) == full
    told = f"{len(full)} of {len(full)} episodes were cut short by max_context=70"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("threads", [{}, dict(concurrent=True)])
def test_environments_are_lost_closed_and_their_counts_taken_over(tiny, threads):
    meet = threading.Barrier(2, timeout=20).wait if threads else int   # calls meet if in threads
    envs = [world(["a", "b", "c", "d"], 0.5, meet, counts=dict(no_action=7), **threads),
            world(["e", "f", "gone"], math.nan), world(["h", "i", "j", "k"], 1.0, meet),
            world(["too long" + " up" * 2000], math.nan, counts=dict(truncated=1))]
    generator, cfg = torch.Generator().manual_seed(0), Config(prefill="go down")
    for t, env in zip(rollout(*tiny, envs, cfg, None, generator), envs):
        assert t.prompt == Chat(tiny[1], "go down").prompt("", env.texts[0])
        assert all(m["content"].startswith("go down") for m in t.messages[1::2])
        assert t.task_id == env.task_id and str(t.reward) == str(env.completion())
        assert [m["content"] for m in t.messages[::2]] == env.texts and t.turns == len(env.told) - 2
        assert [None, *(m["content"] for m in t.messages[1::2]), "closed"] == env.told
        assert t.counts.items() >= getattr(env, "counts", dict(truncated=0)).items()
    for name, value in (("completion", ""), ("completion", 20), ("completion", math.inf),
                        ("step", "up"), ("step", ("", 0, 1)), ("step", ("", "False")),
                        ("reset", ("up", {}))):
        broken = types.SimpleNamespace(**vars(world(["up"] * 2)) | {name: lambda *args: value})
        told = pytest.raises(UserError, rollout, *tiny, [broken], cfg)
        told.match(rf"SimpleNamespace.{name}, task 'up', turn [01]: returned .*(not|must be) a")
    broken = world(["up"], meet={}.popitem)                    # its own bug keeps its traceback
    told = pytest.raises(RuntimeError, rollout, *tiny, [broken], cfg)
    assert told.match("reset, task 'up', turn 0: KeyError") and told.value.__cause__.__traceback__


@pytest.mark.parametrize("begin, end", [
    *((mark % "", mark % "/") for mark in ("<%sthink>", "[%sTHINK]", "<%sseed:think>",
                                           "<%sthought>", "\u25c1%sthink\u25b7", "<%sreasoning>")),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")])
def test_no_world_plays_a_draft(begin, end, monkeypatch):
    """Also where the marks are special tokens: the transcript keeps these, and no others."""
    tokenizer = sokoban_env.tiny_tokenizer(6)
    tokenizer.add_tokens([AddedToken(x, special=True) for x in (begin, end)])
    model, env = sokoban_env.tiny_model(tokenizer, 0), world(["up"] * 4)
    said = [f"{begin}up{end}left<|end|>", f"down{begin}up", f"up{end}{begin}up{end}down<|end|>"]
    answers = iter([tokenizer.encode(text) for text in said])
    monkeypatch.setattr(skill_sd, "sample_answers", lambda *_: ([next(answers)], [[0.0]]))
    (t,) = rollout(model, tokenizer, [env], Config())
    assert [x and x.strip() for x in env.told] == [None, "left", "down", "down", "closed"]
    kept = [re.sub(" ", "", m["content"]) for m in t.messages[1::2]]
    assert kept == [text.replace("<|end|>", "") for text in said]
    heading = "[Analysis of the room] <thinker> left"
    assert skill_sd.spoken(heading) == heading
    assert skill_sd.spoken('<think effort="low">up') == ""


def one_step(model, batch, cfg, lr=0.0, teacher=None):
    """The metrics of one `update`, and the gradient of its last step as one vector."""
    for t in batch:
        t.adv = len(t.logps) % 4 - 1.5
    optimizer, grads = torch.optim.SGD(model.parameters(), lr=lr), []
    optimizer.register_step_pre_hook(                          # later they are cleared
        lambda *args: grads.append(vector(p.grad for p in model.parameters())))
    parts = skill_sd.micro_batches(batch, cfg.micro_batch_tokens)
    taught = [skill_sd.score(teacher or model, part, cfg) for part in parts] if cfg.lam else []
    return skill_sd.update(model, optimizer, parts, taught, cfg), grads[-1]


@pytest.mark.parametrize("precision, low, high", [("float32", 0, 1e-4), ("bfloat16", 1e-4, 0.5)])
def test_sync_teacher(tiny, precision, low, high):
    """In its turn it is the student before the update. Weights are float32, bfloat16 no no-op."""
    models = student, teacher = copy.deepcopy(tiny[0]), sokoban_env.tiny_model(tiny[1], seed=1)
    optimizer, rewards = torch.optim.SGD(student.parameters(), 1.0), iter([0, 1] * 12)
    state = skill_sd.State(student, teacher, optimizer, SkillBank(1), tiny[1], torch.Generator())
    cfg = Config(max_new_tokens=4, group_size=4, precision=precision, summarizer="self")
    tasks = types.SimpleNamespace(make_env=lambda x: world(["up", "up up", "up", x], next(rewards)))
    for k, cfg.sync_every, synced in (0, 0, False), (1, 2, False), (2, 2, True):
        before = [vector(m.parameters()) for m in models]
        batch, metrics = skill_sd.iteration(k, state, ["a", "b"], tasks, cfg)
        assert torch.equal(vector(teacher.parameters()), before[not synced])
        assert not torch.equal(vector(student.parameters()), before[0])
        assert (metrics["log_ratio"] == metrics["sdl_loss"] == 0.0) == synced
        assert low <= metrics["rollout_gap"] <= high
    rough, fine = (skill_sd.score(teacher, batch, each) for each in (cfg, Config()))
    assert low <= (rough - fine).abs().max() <= high
    assert {p.dtype for p in student.parameters()} == {torch.float32}


@pytest.mark.parametrize("reader, size, twice, steps", [
    ("teacher", 16384, 0, 1), ("teacher", 1, 0, 2), ("student", 300, 1, 1), ("teacher", 300, 0, 2)])
def test_update_follows_eq_14(tiny, tmp_path, reader, size, twice, steps):
    """In parts, with layers computed twice, and where r is clipped and rho weighs (two steps)."""
    batch, cfg = played(
        tiny, skills=[SKILLS[0], None] * 3, temperature=0.7, reward_weight=0.6, max_skill_tokens=9,
        lam=0.3 * (not twice), skill_reader=reader, model=str(tmp_path), max_grad_norm=1e9,
        micro_batch_tokens=size, gradient_checkpointing=twice, updates_per_iteration=steps)
    saved, layer_calls = copy.deepcopy(tiny[0]), []
    saved.config.update(dict(attention_dropout=0.3, resid_pdrop=0.3))      # loading sets them to 0
    sokoban_env.save_model(tmp_path, saved, tiny[1])
    model, teacher, twin = (
        skill_sd.load_model(cfg, None)[0].double().train(mode) for mode in (True, True, False))
    teacher.lm_head.weight.data *= 1.5
    old, batch[2].logps = response_logps(twin, batch, cfg, reader == "student")[0].detach(), [
        x + 0.25 for x in batch[2].logps]
    if steps == 2:
        one_step(twin, batch, dataclasses.replace(cfg, updates_per_iteration=1), 0.1, teacher)
    model.model.layers[0].self_attn.register_forward_hook(lambda *args: layer_calls.append(1))
    metrics, gradient = one_step(model, batch, cfg, 0.1, teacher)
    assert len(layer_calls) == steps * (1 + twice) * len(skill_sd.micro_batches(batch, size))
    logp, mask = response_logps(twin, batch, cfg, reader == "student")
    adv = torch.tensor([[t.adv] for t in batch])
    l = logp - skill_sd.score(teacher, batch, cfg)             # also without a skill
    assert [name for name, m in model.named_modules() if m.training] == [
        f"model.layers.{i}" for i in range(2 * twice)] and not teacher.training
    assert model.config.attention_dropout == model.config.resid_pdrop == 0
    pg = grpo_loss(logp, old, adv[:, 0], mask, 0.2, 0.28)
    sdl, rho_1 = (sdl_loss(logp, logp - l, below, mask) for below in (old, logp.detach()))
    for loss, same in ((0.6 * pg + cfg.lam * sdl, True), (0.6 * pg + cfg.lam * rho_1, steps == 1)):
        other = vector(torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True))
        gap = (gradient - other).norm() / gradient.norm()
        assert gap < 1e-6 if same else gap > 0.01
    beyond = ((logp - old).exp() - 1 - torch.where(adv > 0, 0.28, -0.2)) * adv
    right = dict(pg_loss=pg, entropy=-old[mask].mean(), grad_norm=gradient.norm(),
                 clip_fraction=token_mean(beyond > 0, mask))
    if cfg.lam:                                # else they are not measured
        right |= dict(sdl_loss=sdl, log_ratio=token_mean(l, mask))
    assert metrics.pop("rollout_gap") == pytest.approx(0.25, abs=1e-3)
    assert metrics == pytest.approx({name: x.item() for name, x in right.items()}, rel=1e-5)
    assert (right["clip_fraction"] > 0) == (steps == 2)
    rows = [types.SimpleNamespace(skill_prompt=[0] * 10, ids=[0] * n) for n in (50, 10, 40, 20, 30)]
    parts = skill_sd.micro_batches(rows, 130)  # of at most 2 * 60 tokens
    assert [[len(t.ids) for t in part] for part in parts] == [[10, 20], [30, 40], [50]]


def test_updates_are_clipped_and_stop_at_what_is_not_finite(tiny):
    model = copy.deepcopy(tiny[0])
    batch, cfg = played(tiny, max_grad_norm=1e-3)
    metrics, gradient = one_step(model, batch, cfg)
    assert metrics["grad_norm"] > 1e-3 and gradient.norm().item() == pytest.approx(1e-3, rel=1e-2)
    before, logp = vector(model.parameters()), skill_sd.score(model, batch, cfg)
    sgd = torch.optim.SGD(model.parameters())
    for lam, teacher, told in (1.0, 800.0, "'sdl_loss': inf"), (1e300, -1.0, "'grad_norm': nan"):
        cfg.lam = lam
        given = model, sgd, [batch], [torch.full_like(logp, teacher)], cfg
        pytest.raises(UserError, skill_sd.update, *given).match(told)
    assert torch.equal(vector(model.parameters()), before)


# ---- The algorithm -------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [name for name in skill_sd.METHODS if name != "base"])
def test_every_method_trains(tmp_path, method, monkeypatch, capsys):
    """Skills, advantages and credits meet their episodes, also where one is lost, or a group."""
    rewards = [0.1, math.nan, 0.7, 0.7, 0.2, 0.9, 0.9, 0.9] + [math.nan] * 4
    turns = [5, 1, 4, 3, 2, 5, 2, 4] + [1] * 4         # best of their group, then shortest: 3, 6
    writes, taught = method != "grpo", "grpo" not in method
    cfg = smallest(tmp_path.parent, method=method, **dict(sync_every=2) | skill_sd.METHODS[method])
    assert (cfg.reward_weight, cfg.lam) == ((0, 1) if method == "opd" else (1, 0.1 * taught))
    assert (cfg.sync_every, cfg.borrow) == (2 * ("frozen" not in method), method == "borrowed")
    assert cfg.skill_shown == (method.split("_")[0] if method[:5] in ("other", "empty") else "own")
    assert (cfg.skill_reader == "student") == (method == "skill_grpo")
    real, due, written, seeds = skill_sd.rollout, [], [], []
    def lossy(model, tokenizer, envs, *args, **keywords):
        seeds.append(args[2].initial_seed())
        out = real(model, tokenizer, envs, *args, **keywords)
        for t, *ends in zip(out[:12 if len(envs) == 12 else 2], rewards, turns):
            t.reward, t.turns = ends           # of the held-out tasks, only of two
        return out
    monkeypatch.setattr(skill_sd, "rollout", lossy)
    calls = recorded(monkeypatch, skill_sd, "begin", "rollout", "shown_skills", "update", "score",
                     "summarize")
    calls |= recorded(monkeypatch, SkillBank, "wants", "credit", "add")
    calls |= recorded(monkeypatch, torch, "load")
    result, folder = json.loads(json.dumps(skill_sd.train(cfg))), skill_sd.run_folder(cfg)
    (_, (_, state)), = calls["begin"]
    for k, ((actor, *_), out) in enumerate(calls["rollout"][:4]):
        (student, _, parts, _, _), _ = calls["update"][k]
        assert actor is (state.teacher if "off" in method else student) and student is state.student
        assert sorted(map(id, sum(parts, []))) == sorted(id(out[i]) for i in (0, *range(2, 8)))
        assert [t.adv for t in out] == group_advantages(rewards, 4).tolist()
        (picks, *_), shown = calls["shown_skills"][k]
        assert [(t.task_id, t.skill) for t in out] == [
            (task, skill) for task, skill in shown.items() for _ in range(4)]
        due += [(e, pytest.approx(x)) for e, x in zip(picks.values(), (0.5, 0.725)) if e]
        (chosen, *_), skills = calls["summarize"][k]
        wanted = [ok and writes for _, ok in calls["wants"][2 * k:2 * k + 2]]
        assert [id(t) for t in chosen] == [id(out[i]) for i, ok in zip((3, 6), wanted) if ok]
        written += [(t.task_id, skill, t.reward) for t, skill in skills]
    assert len({*seeds}) == 4 + 1              # no iteration repeats another; evaluations do
    assert due == [(entry, reward) for (_, entry, reward), _ in calls["credit"]]
    assert written == [(task, skill, reward) for (_, task, skill, reward), _ in calls["add"]]
    scored = [id(x) for (_, _, _, logps, _), _ in calls["update"] for x in logps]
    assert scored == [id(x) for args, x in calls["score"] if args[0] is state.teacher]
    assert len(scored) == 4 * taught
    assert [(args[6], {t.skill for t in out}) for args, out in calls["rollout"][4:]] == [
        (False, {None}), (True, {None})]       # the held-out tasks, sampled and greedy
    assert result["sampled"][:2] == result["greedy"][:2] == [0.1, 0.0]
    *lines, last = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    assert last == dict(iteration=4, heldout_sampled=result["curve"][-1][1],
                        heldout_greedy=sum(x == 1 for x in result["greedy"]) / 8)
    assert [(x["lost"], x["zero_spread_groups"]) for x in lines] == [(5 / 12, 0)] * 4
    assert [(x["skill_share"] > 0, x.get("sdl_loss", 0) > 0) for x in lines] == [
        (k > 0 and writes, k > 0 and taught) for k in range(4)]
    assert all(math.isfinite(x) for line in lines for x in line.values())
    assert skill_sd.train(cfg) == result and len(calls["rollout"]) == 6
    assert skill_sd.run_folder(dataclasses.replace(cfg, save_every=99)) == folder    # may change
    bank = state.bank.entries                  # the checkpoint's is equal, and another
    assert skill_sd.resume(folder, state) == lines and calls["load"][0][0][1:] == ("cpu", True)
    assert state.bank.entries == bank is not state.bank.entries and bool(written) == writes
    if method in ("skill_sd", "grpo"):         # a look inside, with and without a skill
        t, skill, views = skill_sd.look_inside(cfg)
        sokoban_env.watch("", t, skill, views)
        said = capsys.readouterr().out
        for i, message in enumerate(t.messages[1::2]):
            chances, logps = zip(*((chances[i], logps[i]) for chances, logps in views))
            assert logps[0] == pytest.approx(t.logps[i], abs=1e-4)
            assert math.exp(logps[1]) == pytest.approx(chances[1][MOVES.index(message["content"])])
            row = "      ".join("  ".join(f"{p:.2f}" for p in row) for row in chances)
            assert f"{row}{logps[0] - logps[1]:7.2f}\n" in said
    again = skill_sd.configure("base", model=str(folder / "student"), out=cfg.out, device="cpu")
    assert again == smallest(cfg.out, method="base", iterations=0, model=again.model)    # its own
    assert skill_sd.train(again) == result | dict(curve=[(0, result["curve"][0][1])])
    before = skill_sd.run_folder(again)        # what other weights make is another run
    (folder / "student" / "model.safetensors").write_bytes(b"others")
    assert skill_sd.run_folder(again) != before


def test_skills_that_are_shown_are_own_others_empty_or_borrowed():
    bank, lenders = SkillBank(c=1.0), [0, 2, 4, 5, 6]
    def shown(k=0, **how):
        picks = {i: bank.select(i) for i in [0, 1, 3, 7]}      # the last three have no skills
        found = skill_sd.shown_skills(picks, bank, Config(**how), k)
        return [skill and skill.success_analysis for skill in found.values()]
    for i in lenders:
        bank.add(i, SKILLS[0])
        bank.credit(bank.select(i), 0.0)
        bank.add(i, Skill(f"of {i}", "", ""))
        if i == 0:                             # at first, no other task has one
            assert shown() == ["of 0"] + [None] * 3 and shown(skill_shown="other") == [None] * 4
    held, none = copy.deepcopy(bank.entries), [None] * 3
    assert shown() == ["of 0", *none] and shown(skill_shown="empty") == ["", *none]
    assert shown(borrow=1, skill_shown="empty") == [""] * 4
    others = {f"of {i}" for i in lenders[1:]}
    assert {shown(k, skill_shown="other")[0] for k in range(40)} == others
    own, *borrowed = ({*x} for x in zip(*(shown(k, borrow=1) for k in range(40))))
    assert own == {"of 0"} and borrowed == [others | own] * 3
    assert shown(3, borrow=1) == shown(3, borrow=1) != shown(4, borrow=1)
    assert bank.entries == held                # shown without credit


# ---- Processes: killed, and more than one --------------------------------------------------------
def test_killed_runs_and_runs_that_share_a_folder_end_as_one_alone(tmp_path, capfd):
    """Killed six times, once in mid-file, or begun twice at once: bit for bit, and tidy."""
    said = subprocess.run([sys.executable, HERE / "skill_sd.py", *SMALL, tmp_path / "alone"],
                          check=True, capture_output=True, text=True).stdout
    assert "skill_sd - base" in said and "The teacher has read" in said
    fork, killed, shared = multiprocessing.get_context("fork").Process, "killed", "shared"
    for owner, name, nth in ((os, "replace", 1), (Path, "write_text", 3), (torch, "save", 2),
                             (os, "replace", 4), (skill_sd, "update", 2),
                             (transformers.PreTrainedTokenizerFast, "save_pretrained", 1)):
        calls, real = [], getattr(owner, name)
        def killing(*args, **keywords):
            calls.append(args)
            if len(calls) < nth:
                return real(*args, **keywords)
            if name in ("save", "write_text"):
                Path(args[name == "save"]).write_bytes(b"{")
            os.kill(os.getpid(), 9)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, killing)
            (child := fork(target=main, args=([*SMALL, str(tmp_path / killed)],))).start()
        child.join()
        assert child.exitcode == -9
    runs = [fork(target=main, args=([*SMALL, str(tmp_path / x)],)) for x in (killed, *[shared] * 2)]
    for run in runs:
        run.start()
    assert [run.join() or run.exitcode for run in runs] == [0] * 3
    told = re.findall("^finished: read .*/shared/(base|skill_sd)-", capfd.readouterr().out, re.M)
    assert sorted(told) == ["base", "skill_sd"]                # each was made once
    folders = [*tmp_path.glob("*/skill_sd-tiny-seed0-*")]
    for name in ("bank.json", "student/model.safetensors"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    (result,) = {(folder / "result.json").read_text() for folder in folders}
    (log,) = {re.sub('"seconds.*?, ', "", (x / "log.jsonl").read_text()) for x in folders}
    accuracies = [json.loads(line)["heldout_sampled"] for line in log.splitlines()]
    assert json.loads(result)["curve"] == [[k, acc] for k, acc in enumerate(accuracies)]
    assert len(folders) == 3 and len(accuracies) == 7
    assert not [*tmp_path.rglob("*-tiny-*/*.part")]


def torchrun(code, n, *args):
    """What becomes of n processes that run this code, in which this file is `tests`."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}",
         "--no-python", sys.executable, "-c", f"import sys, test_skill_sd as tests\n{code}", *args],
        env=os.environ | dict(PYTHONPATH=str(HERE)), capture_output=True, text=True, timeout=300)


def update_my_share(folder):
    """One update on this process's share of the same eight trajectories; the first one saves it."""
    tokenizer = sokoban_env.tiny_tokenizer(6)
    model, teacher = (sokoban_env.tiny_model(tokenizer, seed) for seed in (0, 1))
    batch, cfg = played((model, tokenizer), 8, skills=SKILLS * 4, lam=0.5, micro_batch_tokens=200)
    metrics, gradient = one_step(model, batch[skill_sd.RANK::skill_sd.RANKS], cfg, 0.0, teacher)
    means = torch.tensor([[*row.values()] for row in skill_sd.gather(metrics)]).mean(0)
    skill_sd.save(Path(folder, f"update-{skill_sd.RANKS}.pt"), (gradient, means))


def test_two_processes_are_one(tmp_path):
    """They train one student, write one log and table; an update is that of one process."""
    words = "--iterations 3 --train-levels 4 --tasks-per-iteration 2".split()
    done = torchrun(                           # first, as soon as they have met, the update
        "dist, out = tests.torch.distributed, sys.argv[1]\nmeet = dist.init_process_group\n"
        "dist.init_process_group = lambda: (meet(), tests.update_my_share(out))\n"
        "tests.main([*tests.SMALL, *sys.argv[1:]])", 2, str(tmp_path), *words)
    assert done.returncode == 0 and done.stdout.count("skill_sd - base") == 1, done.stderr
    update_my_share(tmp_path)
    (one, losses), (two, others) = (torch.load(tmp_path / f"update-{n}.pt") for n in (1, 2))
    assert (one - two).abs().max() < 1e-6 and torch.allclose(losses, others, 1e-6, 1e-6)
    (folder,) = tmp_path.glob("skill_sd-tiny-seed0-*")
    settings, result, banks = (json.loads((folder / name).read_text()) for name in (
        "student/skill_sd.json", "result.json", "bank.json"))
    train = sokoban_env.make_world(cfg := Config(**settings)).train
    assert len(result["sampled"]) == 8 and all(
        bank and set(bank) <= set(train[i::2]) for i, bank in enumerate(banks))
    assert skill_sd.run_folder(cfg) != folder                  # one process begins anew


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(tiny):
    """It samples as it scores, plays as the CPU does, and one process sums over itself by NCCL."""
    model = copy.deepcopy(tiny[0]).cuda()
    batch, cfg = played((model, tiny[1]), precision="bfloat16")
    metrics, _ = one_step(model, batch, cfg)
    assert metrics["log_ratio"] == 0 and metrics["rollout_gap"] <= 0.1
    games = [played((on, tiny[1]), greedy=True)[0] for on in (model, tiny[0])]
    assert [t.ids for t in games[0]] == [t.ids for t in games[1]]
    done = torchrun("tests.torch.distributed.init_process_group('nccl')\ntests.skill_sd.RANKS = 2\n"
                    "model = tests.torch.nn.Linear(2, 1, bias=False).cuda()\n"
                    "model.weight.grad = tests.torch.ones(1, 2, device='cuda')\n"
                    "tests.skill_sd.average_gradients(model)\nprint(model.weight.grad)", 1)
    assert done.stdout == "tensor([[0.5000, 0.5000]], device='cuda:0')\n", done.stderr


# ---- Summarizers ---------------------------------------------------------------------------------
def test_self_summarizer_writes_through_rollout(tiny, monkeypatch):
    """A transcript that is too long costs a skill, not the run."""
    batch, cfg = played(tiny, n=3, summarizer="self", summary_tokens=5)
    batch[1].messages[0]["content"] = "up " * 5000
    calls = recorded(monkeypatch, skill_sd, "rollout", "ask_student")
    monkeypatch.setattr(skill_sd, "parse_skill", lambda text: text[:22])    # it cannot write yet
    monkeypatch.setattr(tiny[0].config, "max_position_embeddings", 4096)
    state = skill_sd.State(tiny[0], None, None, None, tiny[1], torch.Generator().manual_seed(0))
    (_, one), (_, long), (_, other) = skill_sd.summarize(batch, state, None, cfg)
    assert one == other == '{"success_analysis": "' and long == "[a transcript of 5023 "
    (((_, _, envs, own, _), episodes),), (((texts, *_), _),) = calls.values()
    assert (own.max_new_tokens, own.temperature, own.max_context) == (5, 0.6, 4096)
    assert own.max_skill_tokens == 0           # they take no room
    assert [(t.messages[0]["content"], env.system_prompt) for t, env in zip(episodes, envs)] == [
        (text, skill_sd.SUMMARIZER_PROMPT) for text in texts]


@contextlib.contextmanager
def serving(answer, drip=0):
    """(URL, what it was asked). answer(nth request): status, JSON, after 20 * `drip` seconds."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, self.headers["Authorization"], json.loads(body)))
            with contextlib.suppress(OSError):                 # who asked may be gone
                status, value = answer(len(asked))
                self.send_response(status)
                self.end_headers()
                for _ in range(20):
                    self.wfile.write(b" ")
                    threading.Event().wait(drip)
                self.wfile.write(json.dumps(value).encode())
    asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
        server.shutdown()


def test_server_writes_after_the_update(tmp_path, monkeypatch, capsys):
    """Three at once. A bad one costs skills only; what it says is printed, the key never."""
    updates_then = []
    together = threading.Barrier(3, lambda: updates_then.append(len(calls["update"])), timeout=20)
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")           # as it stands in a file
    calls = recorded(monkeypatch, skill_sd, "update", "summarize")
    with serving(lambda number: (200, together.wait() < 3 and WRITTEN)) as (url, asked):
        cfg = smallest(tmp_path.parent, iterations=1, summarizer=url, summarizer_model="m",
                       summary_tokens=77)
        skill_sd.train(cfg)
    ((batch, *_), skills), = calls["summarize"]
    assert [skill for _, skill in skills] == [SKILLS[0]] * 3 and updates_then == [1]
    texts = ["\n\n".join([*(f"[{m['role']}]\n{m['content']}" for m in t.messages),
                          f"[completion: {t.reward:.2f}]"]) for t in batch]
    wanted = [("/v1/chat/completions", "Bearer secret", dict(model="m", max_tokens=77, messages=[
        dict(role="system", content=skill_sd.SUMMARIZER_PROMPT),
        dict(role="user", content=text)])) for text in texts]
    assert sorted(asked, key=str) == sorted(wanted, key=str)
    batch, waits = batch[:1], []
    monkeypatch.setattr(skill_sd.time, "sleep", waits.append)
    capsys.readouterr()
    parts = [dict(type=kind, text=text) for kind, text in (
        ("thinking", SAID.replace("up", "down")), ("text", SAID[:9]), ("text", SAID[9:]))]
    script = [(503, ""), (429, ""), (200, {"choices": [{"message": {"content": parts}}]})]
    with serving(lambda number: script[number - 1]) as (cfg.summarizer, asked):
        assert skill_sd.summarize(batch, None, None, cfg) == [(batch[0], SKILLS[0])]
    assert waits == [1, 4] and capsys.readouterr().out == ""
    for bad in ((401, "no such user: secret"), (200, math.nan), (204, ""), (200, {"choices": []}),
                (200, {"error": "busy"}), (200, {"choices": [{"message": {"content": None}}]})):
        with serving(lambda number: bad) as (cfg.summarizer, asked):
            assert skill_sd.summarize(batch * 3, None, None, cfg) == []
            (line,) = capsys.readouterr().out.splitlines()     # one, whatever many skills it cost
            assert str(bad[0]) in line or json.dumps(bad[1] or "") in line or bad[0] == 204
            assert "secret" not in line and len(asked) == 9
    for late, drip in (1, 0), (0, 0.05):       # a server that is late, or goes on and on
        with serving(lambda number: (200, threading.Event().wait(late) or WRITTEN), drip) as (
                cfg.summarizer, asked):
            told = skill_sd.ask_server("[user]", cfg, timeout=0.2)
            assert told.startswith(f"[{cfg.summarizer}: ") and ("timed" in told or drip)
            assert len(asked) == 3             # none of them was waited for
    for key in ("", "secret", "secret\nsecret", "secret\u2026"):       # the server is gone
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert skill_sd.summarize(batch, None, None, cfg) == []
    told = capsys.readouterr().out
    assert told.count("refused") == 2 and "secret" not in told and r"\x00" not in told


# ---- Models, settings, the command line ----------------------------------------------------------
def test_warm_start_learns_moves_from_ids_that_are_chats_own(tmp_path):
    """It comes closer to the player than half of the way, at games of other rooms."""
    cfg = smallest(tmp_path.parent)
    model, tokenizer = skill_sd.load_model(cfg, world := sokoban_env.make_world(cfg))
    skill_sd.load_model(cfg, None)                             # kept: no world is needed
    too_small = dataclasses.replace(cfg, max_context=262)
    pytest.raises(UserError, skill_sd.train, too_small).match("prompt has .* max_context=262")
    other = sokoban_env.make_world(dataclasses.replace(cfg, model="other"))
    assert [each.make_env(world.train[0]).system_prompt for each in (world, other)] == ["", RULES]
    games = [sokoban_env.demonstrate(x, distances(x), random.Random(i), cfg.timid, 5, 0.8,
                                     vars(SKILLS[0])) for i, x in enumerate(world.levels)]
    encoded, chat = sokoban_env.encode_games(games, tokenizer, skill_sd.SKILL_TEXT), Chat(tokenizer)
    for (level, _, moves, probs, notes), row in zip(games, encoded):
        env = SokobanEnv(level, 9)
        ids = chat.prompt("", env.reset(), notes and Skill(**notes))
        for move in moves[:-1]:
            y = tokenizer.convert_tokens_to_ids(MOVES[move])
            ids += [y, *chat.next_turn(env.step(MOVES[move])[0], y)]
        assert row == (ids, probs)
    at_once, fresh = (sokoban_env.player_kl(m, tokenizer, encoded) for m in (
        model, sokoban_env.tiny_model(tokenizer, 0)))
    alone = [sokoban_env.player_kl(model, tokenizer, [game]) for game in encoded]
    assert torch.allclose(at_once, torch.cat(alone), atol=1e-5) and at_once.min() > -1e-3
    assert at_once.mean() < 0.5 * fresh.mean()


@pytest.mark.parametrize("name, settings, change, told", [
    ("Llama", {}, lambda w: w.pop("model.norm.weight"), "1 weights are missing, as ['model"),
    ("Llama", {}, lambda w: w["model.norm.weight"].fill_(math.nan), "differ by nan"),
    ("Llama", dict(max_position_embeddings=1000), id, "max_context=1024: model="),
    ("Llama", dict(vocab_size=300), id, "len(tokenizer)=341: needs a fast tokenizer of at most"),
    ("Mistral", dict(sliding_window=40, num_key_value_heads=4), id, ""),
    ("Mamba", dict(state_size=4), id, "cannot be loaded and played on cpu"),
    *((name, settings, id, "does not score what it samples") for name, settings in (
        ("Bert", {}),                          # looks ahead
        ("Mpt", dict(d_model=32, n_heads=4, n_layers=2)), ("Doge", dict(keep_window_size=16)),
        ("GPTNeo", dict(attention_types=[[["local"], 2]], window_size=64, num_layers=2,
                        num_heads=4)),
        ("Llama4Text", dict(attention_chunk_size=300, num_local_experts=2, head_dim=8,
                            layer_types=["chunked_attention"] * 2, num_key_value_heads=4)),
        ("Phi3", dict(original_max_position_embeddings=64, rope_scaling=dict(
            type="longrope", short_factor=[1.0] * 4, long_factor=[40.0] * 4)))))])
def test_models_that_score_otherwise_are_refused(tiny, tmp_path, name, settings, change, told):
    tiny[1].save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(
        **dict(num_attention_heads=4, hidden_size=32, intermediate_size=64, pad_token_id=0,
               vocab_size=len(tiny[1]), num_hidden_layers=2, initializer_range=0.3,
               max_position_embeddings=2048) | settings))
    change(weights := model.state_dict())
    model.save_pretrained(tmp_path, state_dict=weights)
    cfg = Config(model=tmp_path)
    if told:
        end = pytest.raises(UserError, skill_sd.load_model, cfg, None).value
        assert told in str(end) and str(tmp_path) in str(end) and "\n" not in str(end)
    else:
        skill_sd.load_model(cfg, None)
        (tmp_path / "adapter_config.json").touch()
        pytest.raises(UserError, skill_sd.load_model, cfg, None).match("merge the adapter first")


def test_templates_that_change_with_turns_are_refused(tiny):
    tokenizer, form, lost = copy.deepcopy(tiny[1]), template(*CHATML), "a text is changed or lost"
    for tokenizer.chat_template, reason in (
            (form.replace("'assistant'", "'bot'"), lost), ("{{ raise_exception('no') }}", "no"),
            (form.replace("m.content", "m.content | upper"), lost), ("{{ 1 + 'x' }}", "operand"),
            (form.replace("m.content", "(m.content * 2)"), lost),
            *((form.replace(" | trim", f".{side}strip()"), lost) for side in "lr"),
            (None, "template is not set")):
        pytest.raises(UserError, Chat, tokenizer).match(f"does not repeat one form .*{reason}")


@pytest.mark.parametrize("name, left", [("checkpoint.pt", 0), ("checkpoint.pt", 99),
                                        ("result.json", 0), ("result.json", 9)])
def test_damaged_files_are_named_and_a_full_disk_leaves_none(tmp_path, name, left, monkeypatch):
    """And what other code made is read, and said."""
    cfg = smallest(tmp_path, iterations=1)
    path = skill_sd.run_folder(cfg) / name
    skill_sd.begin(cfg)                        # makes the warm start
    def full(data, part):
        Path(part).touch()
        raise RuntimeError("unexpected pos 1 vs 2")
    with monkeypatch.context() as disk:
        disk.setattr(*((os, "replace") if name == "result.json" else (torch, "save")), full)
        pytest.raises(UserError, skill_sd.train, cfg).match("is the disk full")
    assert not [*tmp_path.rglob("skill_sd-*/*.part")]
    result = skill_sd.train(cfg)
    (path.parent / "result.json").unlink() if "pt" in name else None
    path.write_bytes(path.read_bytes()[:left])
    told = pytest.raises(UserError, skill_sd.train, cfg)
    told.match(f"{name} is damaged .*; delete .*{name}, and the same command")
    path.unlink()
    monkeypatch.setattr(skill_sd, "CODE", 0)
    assert skill_sd.train(cfg)["sampled"] == result["sampled"]


@pytest.mark.parametrize("words, told", [
    *(("--" + told.replace("_", "-").replace("=", " "), told) for told in (
        "lr=inf", "lam=nan", "seed=-1", "max_turns=0", "group_size=1", "temperature=0.0",
        "tasks_per_iteration=5", "max_context=200", "timid=1.5", "evals=-1",
        "seed=4294967296", "lr=1e+300")),
    ("--actor teacher --skill-reader nobody", "skill_reader='nobody'"),
    ("--env argparse", "env='argparse': the module has no `make_world`"),
    ("--summarizer http://x", "summarizer_model=''"), ("--summarizer https//x", "='https//x'"),
    ("--help", f"(default: {Config().summary_tokens})"),
    ("--method opd --lam 0.5", "lam=0.5: method opd means 1.0"),
    ("--method opd,ppo", "method='ppo': must be one of base, skill_sd"),
    ("--preset huge", "--preset"), ("--max-turns 1.5", "--max-turns"), ("--borrow 2", "--borrow"),
    *[("--device cuda", "device='cuda': no GPU is found")] * (not torch.cuda.is_available()),
    ("--summarizer http://x --summarizer-model m", "OPENAI_API_KEY"),
    ("--model no/such", "'no/such' cannot be loaded"), ("--out /dev/null/x", "/dev/null"),
    ("--env no_such_world", "env='no_such_world': no such file, no module"),
    ("--env no/such.py", "env='no/such.py': no such file"),
    ("--tasks-per-iteration 6 --train-levels 5", "len(world.train)=5")])
def test_wrong_settings_are_refused_by_name(words, told, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(skill_sd, "RANKS", 2 - bool(re.search("out|env|6|--model|timid", words)))
    monkeypatch.setattr(sokoban_env, "warm_start", Mock(side_effect=AssertionError("too late")))
    monkeypatch.setenv("OPENAI_API_KEY", "se\u201ccret" * ("-model m" in words))
    monkeypatch.chdir(tmp_path)
    end = pytest.raises(SystemExit, main, words.split()).value
    assert told in f"{end} {capsys.readouterr()}" and "cret" not in f"{end}"


def test_a_method_stands_over_what_is_typed_and_that_over_a_preset(tmp_path):
    configure, parse_args = skill_sd.configure, Config.parse_args
    assert parse_args("--max-turns 7 --lr 1e-5".split()) == dict(max_turns=7, lr=1e-5)
    assert configure(**parse_args([])) == configure() == Config()
    assert all(configure(preset=name) for name in skill_sd.PRESETS)
    assert configure(env="appworld_adapter").preset == "appworld"
    for typed, told in (                       # by hand, too
            (dict(lam="0.1"), "lam='0.1': must be of type float"), (dict(seeds=1.5), "seeds=1.5: "),
            (dict(actor="nobody"), "actor='nobody': must be one of")):
        pytest.raises(UserError, Config, **typed).match(told)
    cfg = configure("grpo", model="x", prefill="go")
    assert (cfg.preset, cfg.max_new_tokens, cfg.prefill, cfg.lam) == ("small", 16, "go", 0.0)
    (tmp_path / "skill_sd.json").write_text(json.dumps(vars(configure(preset="scarce"))))
    assert configure(model=str(tmp_path)) == configure(preset="scarce", model=str(tmp_path))


@pytest.mark.parametrize("seeds, base, opd, paired", [         # 3.18 * s / sqrt(4), then
    (1, "25.0 79.5 50.0 91.8 50.0", "50.0 91.8 0.0 40.0", "25.0 79.5 -50.0 91.8 -10.0"),
    (3, "25.0 62.1 66.7 71.7 50.0", "41.7 35.8 33.3 94.8 43.3 8.3",        # 4.30 * s / sqrt(3)
     "16.7 35.8 -33.3 35.8 -6.7 8.3")])
def test_main_prints_a_table(seeds, base, opd, paired, monkeypatch, capsys):
    """Its figures were computed by hand. `base` comes along; several keep their own settings."""
    results = [([0, 0.5, 1, 0], [1, 0.5, 1, 0.8]),             # of `base` and `opd`, by seed
               ([0, 0, 0, 0], [1, 0, 0, 0]), ([1, 1, 0, 0], [1, 1, 0, 0.4])]
    def train(cfg):
        asked.append((cfg.method, cfg.seed))
        assert cfg.lam == skill_sd.METHODS[cfg.method].get("lam", lam)
        sampled = results[cfg.seed][cfg.method != "base"]
        return dict(sampled=sampled, greedy=[1 - x for x in sampled], curve=[(0, 0.5)] if (
            cfg.method == "base") else [(0, 0.0), (2, 0.5), (4, 0.7 + cfg.seed / 10)])
    monkeypatch.setattr(skill_sd, "train", train)
    for method, lam, names in ("all", 0.25, [*skill_sd.METHODS]), ("opd", 1.0, ["base", "opd"]):
        asked = []
        main(["--method", method, "--seeds", str(seeds), "--lam", str(lam)])
        assert asked == [(name, seed) for name in names for seed in range(seeds)]
        out = capsys.readouterr().out
    rows = re.findall(r"^(\S+|\S+ - \S+)  +(\d.*)$", out, re.MULTILINE)
    assert {name: " ".join(re.findall(r"-?[\d.]+", row)) for name, row in rows} == {
        "base": base, "opd": opd, "opd - base": paired}


def test_the_small_player_runs_on_one_thread(tmp_path, monkeypatch):
    """For as long as its run lasts, or until it fails."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    seen, begin, threads = [], skill_sd.begin, torch.get_num_threads
    monkeypatch.setattr(skill_sd, "begin", lambda cfg: seen.append(threads()) or begin(cfg))
    torch.set_num_threads(2)
    for settings in {}, dict(size=3), dict(model="no/such"), dict(ucb_c=2.0):
        if "ucb_c" in settings:
            monkeypatch.setenv("OMP_NUM_THREADS", "2")
        with contextlib.suppress(ValueError):
            skill_sd.train(smallest(tmp_path.parent, iterations=0, bank_size=9, **settings))
        seen.append(threads())
    torch.set_num_threads(1)
    assert seen == [1, 2, 1, 2, 2, 2, 2, 2]


def test_the_file_is_in_the_order_that_it_promises():
    """Its table names tests that are there, the method comes first, and the world stands alone."""
    named = set(re.findall(r"test_\w+\*?", skill_sd.__doc__)) - {"test_skill_sd"}
    assert len(named) > 7 and all(fnmatch.filter(globals(), pattern) for pattern in named)
    source = inspect.getsource(skill_sd)
    _, *starts = (source[:x.start()].count("\n") + 1 for x in re.finditer("# ==== Part", source))
    lines_of, first = inspect.getsourcelines(skill_sd.iteration)
    assert len(lines_of) <= 50 and first + len(lines_of) < starts[0] < 363
    lines = re.findall(r"\((?:to line|from) (\d+)\)", (HERE / "README.md").read_text())
    assert [*map(int, lines)] == [first + len(lines_of) - 1, *starts]
    imported = re.findall(r"^ *(?:import|from) (\w+)", inspect.getsource(sokoban_env), re.MULTILINE)
    assert "torch" in imported and not {*imported} & {path.stem for path in HERE.glob("*.py")}


def test_pieces_can_be_lifted_out(tmp_path, monkeypatch, capsys):
    """The README's loops run, its trainer among these pieces alone: it moves to the teacher."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(skill_sd.__file__)                          # importing prints and trains nothing
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())
    entry, _, line, code = README_CODE
    exec(re.sub("cfg = .*", "", entry), dict(cfg=smallest(tmp_path.parent)))
    model, y = torch.zeros(5, requires_grad=True), torch.tensor([[0, 1], [2, 3]])
    def sample(model, prompt):
        old = score(model, prompt, y).detach()
        return y, torch.ones(2, 2), old, torch.tensor([0.0, 1.0]), "ab"
    def score(model, prompt, y):               # who reads a skill prefers late tokens
        return (model + ("What worked" in prompt) * torch.arange(5)).log_softmax(-1)[y]
    def your_loss(logp, old, rewards, mask):
        return names["grpo_loss"](logp, old, names["group_advantages"](rewards, 2), mask, 0.2, 0.28)
    names = {x: vars(skill_sd)[x] for x in "OPENS CLOSES SKILL_TEXT dataclass json math re".split()}
    names |= dict(model=model, sample=sample, score=score, your_loss=your_loss, lam=0.1,
                  write_up=lambda text: SAID, tasks=[("t", "go")] * 3)
    for part in (token_mean, sdl_loss, group_advantages, grpo_loss, Skill, skill_sd.spoken,
                 parse_skill, SkillBank):
        exec(inspect.getsource(part), names)
    exec(re.sub("from skill_sd .*", "", code), names)
    assert names["bank"].select("t")["picks"] == 2 and model.grad[0] != 0
    adv, old, taught = torch.ones(2), score(model, "", y), score(model, "What worked", y)
    told = dict(adv=adv, lam=0.5, logp_old=old, logp_teacher=taught)
    exec(line, told)                           # the gradient of both losses in the first step
    pg = grpo_loss(old, old.detach(), adv, torch.ones(2, 2), 0.2, 0.2)
    whole = pg + 0.5 * sdl_loss(old, taught, old.detach(), torch.ones(2, 2))
    a, b = (torch.autograd.grad(loss, model, retain_graph=True)[0] for loss in (
        whole, -(told["adv"].detach() * old).mean()))
    assert torch.allclose(a, b, atol=1e-6)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The folder of a small model with random weights that follows a chat template."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    folder, tokenizer = tmp_path_factory.mktemp("chat"), Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=template(*CHATML))
    sokoban_env.save_model(folder, sokoban_env.tiny_model(tokenizer, 0), tokenizer)
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')     # cannot be saved
    return folder


@pytest.mark.parametrize("old, new, told", [
    ("", "", ""), ("heldout=ids", "heldout=range(9)", "world.heldout=range(0, 9): must be a list"),
    ('return "It is a', 'return 1, "It is a', "must be a str (gymnasium's is a"),
    ('return "It is a', 'return str(id(self)) + "It is a', "begin in the same way"),
    ("= task_id, int", "= 'x', int", "task_id is 'x': must be that of the task"),
    ("make_env=Guess", "make_env=lambda x: 1 / 0", "('number 1'): ZeroDivisionError"),
    ("make_env=Guess", "make_env=lambda x, e=Guess('number 1'): e", "one object twice"),
    ("analyse=analyse", "", "write one, or give --summarizer self"),
    ("analysis=", "analysys=", "must be a dict of the str success_analysis"),
    ("def close", "def end", "no `close`"), ("import re", "x = 1 / 0", "ZeroDivisionError"),
    ("said = re", "assert 0, re", "Guess.step, task 'number")])
def test_the_worlds_of_others(old, new, told, tmp_path, chat_model, capsys):
    """The README's is played, learnt from, and its edits make another run. Wrong ones are told."""
    path = tmp_path / "guess.py"
    text = README_CODE[1].replace(old, new)
    path.write_text(text)
    words = ("--max-new-tokens 4 --iterations 2 --tasks-per-iteration 15 --group-size 2 --device "
             "cpu --precision float32 --summarizer rules --save-every 1 --env")
    words = [*words.split(), str(path), "--out", str(tmp_path)]
    if told:
        raised = SystemExit if "env=" in told or told[0].islower() else Exception      # a traceback
        end = pytest.raises(raised, main, [*words, "--model", str(chat_model)])
        assert told in end.exconly()
        return
    main([*words, "--model", str(chat_model)])
    path.write_text(text + "\n")
    main([*words, "--model", str(chat_model)])
    out = capsys.readouterr().out
    assert "40 held-out tasks" in out and "no skill was ever shown" not in out
    (bank,), (same,) = (json.loads(x.read_text()) for x in tmp_path.glob("skill_sd*/bank.json"))
    assert bank == same
    for entry, *_ in bank.values():
        assert entry["skill"]["golden_workflow"].startswith("The last guess: My guess: ")
    pytest.raises(SystemExit, main, words).match("reads words of Sokoban only")


# ---- Sokoban, hostile text -----------------------------------------------------------------------
def test_levels_are_read_or_refused_solved_optimally_and_generated():
    for text, message in (
            ("", "empty"), ("#" * 27, "27 columns"), ("##", "no player"), ("@-", "0 boxes and 0"),
            ("@$$.", "2 boxes and 1"), ("##\n@$x", "line 2, column 3: unknown glyph 'x'"),
            ("# # #\n# @ x", "column 5: unknown"), ("##\n.$@@", "line 2, column 4: a second"),
            ("\n####\n#@$.\n####", "line 3, column 2: '@' is outside"),
            ("####\n#@.# $\n####", "line 2, column 6: '\\$' is outside")):
        pytest.raises(ValueError, parse_level, text).match(message)
    for moves, text in (0, "####\n#*@#\n####"), (5, "#####\n#+$ #\n#   #\n#####"), (107, MICROBAN):
        level = after = parse_level(text)
        for letter in solve(level, state_limit=8000):          # with hopeless pushes: over 50,000
            after = after.after("UDLR".index(letter))
        assert len(solve(level)) == moves and after.completion() == 1.0
    pytest.raises(RuntimeError, solve, level, state_limit=50).match("state_limit=50")
    assert solve(parse_level("#####\n#$ @#\n# . #\n#####")) is None       # a box in a corner
    given = dict(n=60, seed=11, min_moves=3, max_moves=15)
    levels = generate_levels(**given)          # exact, distinct, and the same everywhere
    assert sokoban_env.derived_seed(*map(to_xsb, levels)) == 6184254315946153153       # a digest
    assert all(len(solve(level)) == level.moves and 3 <= level.moves <= 15 for level in levels)
    flipped = [parse_level("\n".join(map("".join, zip(*to_xsb(x).split("\n"))))) for x in levels]
    keys = set(map(canonical, flipped))
    assert len(keys) == 60 and keys == set(map(canonical, levels)) and flipped != levels
    assert keys.isdisjoint(map(canonical, generate_levels(**given, exclude=flipped)))
    for name, value in ("size", 3), ("size", 27), ("boxes", 0), ("min_moves", 21):
        pytest.raises(ValueError, generate_levels, 1, 0, **{name: value}).match(f"{name}={value}")
    pytest.raises(ValueError, generate_levels, 1, 0, 6, 2, 300, 300).match("300.* in 2000 rooms")


def test_environment_reads_tolerantly_counts_and_ends():
    for text, move in (("Up, then LEFT", 2), ("<answer>jump</answer> left", None),
            ("<answer>up</answer> or <ANSWER>\nright</ANSWER>", 3), ("<answer>up then left", 0),
            ("<answer>not up but left</answer>", 2), ("<answer>up<answer>", 0),
            ("<answer>left<answer> of the right", 2), ("<answer>left/answer> not right", 2),
            ("<answer>up <answer>left", 2), ("<answer>up<answer>left</answer>", 2),
            ("so <answer>up\nnot left", 0), ("<answer>1. up, 2. left</answer>", 0),
            ("<answer>left</anwser> since it is on the right", 2), ("upwards uplift", None),
            ("<answer>right (push the box to e4), down</answer>", 3)):
        assert parse_action(text) == move
    env = SokobanEnv(parse_level("#######\n#@ $.*#\n#######"), max_turns=5)
    first = env.reset()
    assert first.endswith(
        "To the goal f2 push 0 up, 2 right. The box f2 is 0 up, 4 right of you (blocked: up down "
        "right). To the goal e2 push 0 up, 1 left. To the goal f2 push 0 up, 0 left.")
    room = parse_level("#####\n#$$@#\n#..##\n####")
    assert "(blocked: up left right)" in SokobanEnv(room).reset()      # by another box, too
    for xsb, said in re.findall(r"((?:# .*\n)+)(You are .*)\n<answer>", RULES):
        assert SokobanEnv(parse_level(xsb)).reset() == xsb + said
    assert env.step("banana")[0].startswith(NO_MOVE) and env.step("up")[0].startswith(BLOCKED)
    assert env.counts == {"no_action": 1, "blocked": 1}
    assert [env.step("right")[1] for _ in range(2)] == [False, True] and env.completion() == 1.0
    assert env.step("right")[0].startswith(BLOCKED)            # nobody can push two boxes
    assert env.reset() == first and env.counts == {"no_action": 0, "blocked": 0}
    done = [env.step(answer)[1] for answer in ("left", "up", "down", "banana", "left")]
    assert done == [False] * 4 + [True] and env.completion() == 0.5


def test_analyst_tells_what_happened_and_player_is_timid_but_learns_from_it():
    room = "#######\n#     #\n# .$  #\n#  @  #\n#   $.#\n#######"
    for text, answers, *fields in (
            (room, "left right right banana up left down up", "1 of 2 boxes on goals in 6 moves",
             "kept away from boxes", "at e3 push left, push right"),
            ("#######\n#  .. #\n# $@$ #\n#######", "up down left right right",
             "0 of 2 boxes on goals in 0 moves", "at d3 left pushed a box to b3 where it is stuck",
             "push up, push right, push up"),
            ("#######\n#     #\n#@$ * #\n#     #\n#    .#\n#######", "up",
             "1 of 2 boxes on goals in 0 moves", "kept away from boxes", "push down, push right"),
            ("#####\n#@$.#\n#####", "right", "1 of 1 boxes on goals in 1 moves", "none seen",
             "at b2 push right")):
        env = SokobanEnv(parse_level(text))
        said = [dict(role="user", content=env.reset())]
        for x in answers.split():
            said += [dict(role="assistant", content=x), dict(role="user", content=env.step(x)[0])]
        assert [*sokoban_env.analyse(said).values()] == fields
    for text, timid, shares in (
            ("#####\n##@##\n##$##\n##.##\n#####", 1.0, [1 / 4] * 4),   # there is no such move
            ("#####\n#$ @#\n# . #\n#####", 0.0, [0, 1, 0, 0]),         # all is lost
            (room, 0.5, [0, 1 / 2, 1 / 2, 0])):                        # no push, far from boxes
        level = parse_level(text)
        probs = move_probs(level, level.player, level.boxes, distances(level), timid)
        assert probs == pytest.approx([0.05 / 4 + 0.95 * share for share in shares])
    assert sokoban_env.fits(level, level.boxes, {"left", "right"})     # of the room
    assert not sokoban_env.fits(level, level.boxes, {"left"})
    given = dict(n=200, seed=2, boxes=1, max_moves=8, max_turns=6, timid=0.5)
    taken, seen = [], set()                    # of demonstrations, in rooms that are not excluded
    for level, states, moves, probs, notes in sokoban_env.demonstrations(**given):
        assert len(states) - 1 == len(moves) == len(probs) <= 6
        assert states[-1][1] == level.goals or len(moves) == 6
        taken.append(level)
        for state, p in zip(states, probs):
            shy, bold = (move_probs(level, *state, distances(level), timid) for timid in (0.5, 0.0))
            seen.add((notes and bool(notes["golden_workflow"]), p == shy, p == bold))
    assert seen >= {(None, 1, 0), (True, 1, 0), (True, 0, 1), (False, 1, 0)}   # notes, if they fit
    assert seen.isdisjoint({(None, 0, 1), (False, 0, 1)})
    others = [game[0] for game in sokoban_env.demonstrations(**given, exclude=taken)]
    assert not {(x.walls, x.goals) for x in taken} & {(x.walls, x.goals) for x in others}


def test_files_of_levels_as_people_have_them_are_read_and_played(tmp_path, monkeypatch, capsys):
    """By the terminal, with arrows and without a solver that gives up; errors are one line."""
    path, room = tmp_path / "levels.txt", "#####\n#@$.#\n#####"
    def played(text, typed="", end=EOFError, encoding="utf-8", words=("--file", str(path))):
        path.write_text(text, encoding)
        monkeypatch.setattr(sys, "argv", ["sokoban_env.py", *words])
        monkeypatch.setattr("builtins.input", Mock(side_effect=[*typed.split(), end]))
        try:
            sokoban_env.main()
            return capsys.readouterr().out
        except SystemExit as stop:
            return f"{stop.code}"
    for text, n in (
            (f"Title: x\n{room}\nAuthor: y\n{room}", 2), (f"{room}\r\r{room}   \r\n", 2),
            (f"# 1\n\n{room}\n-----\nend of #1", 1), ("caf\u00e9\n  #####\n--#@$.#\n--#####", 1)):
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "latin-1"):
            assert f"level 1 of {n}" in played(text, encoding=encoding)
    assert "level 2 of 2" in played(f"{room}\n\n{room}", "n", KeyboardInterrupt)
    assert "1 moves made" in (out := played(room, "\x1b[C")) and "solved" in out
    assert "1 moves made" not in played(room, "\x1bOH \x1b[3~ \x1bd q")
    monkeypatch.setattr(sokoban_env, "solve", Mock(side_effect=RuntimeError))
    assert "optimal: unknown, 1 moves made" in played(room, "d o")
    for text, message in ((f"{room}\n\n;x\n#####\n#@x.#\n#####", "level 2: line 7, column 3"),
                          ("prose alone", "no level"), ("#" * 27 + "\n#" * 2, "no level")):
        assert re.match(f"error: .*{message}", played(text))
    for words, message in (("--size", "3"), "size=3"), (("--file", "/no/such"), "No such file"):
        assert re.match(f"error: .*{message}", played(room, words=words))


@pytest.mark.parametrize("parse, valid", [
    (parse_skill, [SAID, SAID.replace("}", ', "more": [{"a": [1e9, null]}]}')]),
    (parse_level, [MICROBAN, sokoban_env.render(parse_level(MICROBAN)), "#####\n#+$*#\n#####"]),
    (parse_action, ["I go LEFT", "no. <ANSWER> Down! </answer> not up <answer>up"])])
def test_parsers_survive_hostile_text(parse, valid):
    hostile = [
        *"#_ $.@*+\n\t\r{}[]\"\\,:\x00\x85\u0131\u2028\U0001f600\ud800", "\n#", "$.", "NaN",
        "9" * 5000, "<answer>", "</answer>", "<ANSWER", "up", "LEFT", "r\u0131ght", "R\u0130GHT",
        "\udcffup", '{"a":', '{"a":[', "[],", '"\\ud800"', '"golden_workflow": 1e999']
    long = [piece * ((1 << 20) // len(piece)) for piece in hostile] + [
        "#" * 500_000 + "\n#" * 250_000, "# " * 500_000 + "x",         # one wide row, many rows
        "#" * 26 + ("\n#" + "$." * 12 + "#") * 26 + "\n#@".ljust(26) + "#\n" + "#" * 26]   # boxes
    texts, taken = long + [text.replace(old, new, 1) for text in valid for new in ["", *hostile]
                           for old in sorted({*text, *re.findall(r'"[^"]*"|\w+', text)})], 0
    for text in texts:
        try:
            got = parse(text)
        except ValueError as error:                            # of those that say why
            assert parse != parse_action and str(error).encode()
            continue
        taken += got is not None
        if parse == parse_level:
            assert parse_level(to_xsb(got)) == got == sokoban_env.room_in(SokobanEnv(got).reset())
        assert parse != parse_skill or "".join(dataclasses.astuple(got)).encode()
        assert parse != parse_action or got is None or MOVES[got] in text.lower()
    assert 10 < taken < len(texts)


# ---- AppWorld ------------------------------------------------------------------------------------
STAND_IN = """#!/usr/bin/env python3
import http.server, json, os, time
class Engine(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "experiment_name" in body:
            os.makedirs(f"experiments/outputs/{body['experiment_name']}/tasks", exist_ok=True)
        person = dict.fromkeys(["first_name", "last_name", "email", "phone_number"])
        world = dict(supervisor=person, datetime=0, instruction=0, passes=passes, num_tests=2)
        output = eval(body.get("code", "self.path != '/task_completed' and world"))
        self.wfile.write(b"HTTP/1.0 200 OK\\r\\n\\r\\n" + json.dumps({"output": output}).encode())
passes = [1]
server = http.server.HTTPServer(("127.0.0.1", 0), Engine)
print(server.server_port, flush=True)
server.serve_forever()
"""
ANSWER = "Let me see.\n```python\n{}\n```\nDone."


@pytest.fixture
def env(tmp_path, monkeypatch):
    """One task, of a turn, with an APPWORLD_PYTHON that serves expressions, not the engine."""
    for folder in ("datasets", "tasks/abc_1"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    (tmp_path / "data/datasets/train.txt").write_text("abc_1:tag\n\n")
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("APPWORLD_ROOT", str(tmp_path))
    monkeypatch.setenv("APPWORLD_PYTHON", str(tmp_path / "python"))
    yield appworld_adapter.AppWorldEnv("abc_1", max_turns=1, timeout_s=1)
    appworld_adapter.stop_servers()


def gone(pid):
    """True once no process of that process group is left: no server, no watcher."""
    for _ in range(100):
        rows = subprocess.check_output(["ps", "-A", "-o", "pgid=,stat="], text=True)
        if not re.search(rf"^ *{pid} +[^Z]", rows, re.MULTILINE):
            return True
        threading.Event().wait(0.1)


def test_appworld_finds_the_blocks_and_cuts_the_output():
    for text, blocks in (
            ("```python\n```", [""]), ("```\nprint(1)\n```", []), ("```python print(1) ```", []),
            ("so:\n```python \r\na\n```  \nthen\n```python\nb\n```", ["a\n", "b\n"]),
            ("```python\nprint(1)\n", []), ("```python\nx = '```\n'\n```", ["x = '```\n'\n"]),
            ("```python\na\n``` Done.", ["a\n"]),
            ("1. so\n   ```python\n   a\n     b\n   ```", ["a\n  b\n"])):
        assert appworld_adapter.code_blocks(text) == blocks
    assert appworld_adapter.cut("abcdefg", 7) == "abcdefg"
    assert appworld_adapter.cut("abcdefghij", 5) == "abc\n[... 5 characters cut here ...]\nij"


@pytest.mark.parametrize("call, given, message", [
    ("task_ids('tra')", {}, r"split='tra' must be one of \['train'\]"),
    ("task_ids('train')", {"ROOT": "/"}, "APPWORLD_ROOT='/'.*download data"),
    ("task_ids('train')", {"VERSION": "0.9"}, "version '0.9', not 0.1.0.*download data"),
    ("AppWorldEnv('..')", {}, "task_id='..' is not in"),
    ("AppWorldEnv('abc_1', timeout_s=0)", {}, "timeout_s=0 must be"),
    ("AppWorldEnv('abc_1').completion()", {}, "call reset"),
    *[("AppWorldEnv('abc_1').reset()", given, message) for given, message in (
        ({"PYTHON": "/no/such"}, "APPWORLD_PYTHON='/no/such'.*pip install appworld=="),
        ({"RUN": "echo \"No module named 'appworld'\" >&2"}, "pip install appworld=="),
        ({"RUN": "echo \"No module named 'appworld.apps.x'\" >&2"}, "appworld.cli install"),
        ({"RUN": "echo fire >&2; echo no port"}, "no AppWorld server came up .*: fire; see"),
        ({"RUN": "echo 1; sleep 60"}, "AppWorld lost: /initialize on abc_1: the server died"),
        ({"RUN": "sleep 60 >&2; echo 1"}, "START_SECONDS=1"))]])
def test_appworld_errors_name_the_remedy(env, tmp_path, monkeypatch, call, given, message):
    (tmp_path / "python").write_text(f"#!/bin/sh\n{given.get('RUN')}\n")
    (tmp_path / "data/version.txt").write_text(given.get("VERSION", "0.1.0"))
    for name, value in given.items():
        monkeypatch.setenv(f"APPWORLD_{name}", value)
    monkeypatch.setattr(appworld_adapter, "START_SECONDS", 1)
    told = pytest.raises((OSError, ValueError, RuntimeError), eval, call, vars(appworld_adapter))
    assert re.search(message, str(told.value)) and "\n" not in str(told.value)


def test_appworld_servers_are_reused_recycled_and_replaced(env, monkeypatch):
    env.reset()
    server = env._server
    env.reset()
    assert env._server is server and env.step("no code")[1]
    server.process.kill()                          # after its episode, which keeps its score
    env.close()
    assert env.completion() == 1 / 2 and not env.counts["lost"]
    env.reset()
    env.close()
    appworld_adapter._idle[-1].process.kill()      # and while it has none
    env.reset()
    assert env.completion() == 1 / 2 and not env.counts["lost"]
    server = env._server
    assert (server.folder / "tasks").exists()
    monkeypatch.setattr(appworld_adapter, "RESETS_PER_SERVER", 1)
    subprocess.run(["pkill", "-KILL", "-P", str(server.process.pid)])     # without its watcher too
    env.close()
    assert gone(server.process.pid) and server not in appworld_adapter._idle
    assert server.log.exists() and not (server.folder / "tasks").exists()


@pytest.mark.parametrize("target, value, code, told, how", [
    ("RESETS_PER_SERVER", 9, "os.kill(os.getpid(), 9)", "/execute .*died", "killed"),
    ("RESETS_PER_SERVER", 9, "1", "/execute .*died", "dead"),
    ("ANSWER_BYTES", 3, "", "/evaluate .*HTTP 200, .*at most 3", "lost"),
    ("ANSWER_BYTES", 3, None, None, "lost"),
    ("json.loads", Mock(return_value={}), "", "nonsense", "lost"),
    ("json.loads", Mock(side_effect=KeyboardInterrupt), "", "never told", "lost"),
    ("GRACE_SECONDS", 1, "time.sleep(60)", "no answer in 2 s", "killed")])
def test_appworld_server_lost_in_mid_episode(env, monkeypatch, target, value, code, told, how):
    """What a block has done is scored as after the block before it; else there is no score."""
    env.reset()
    server = env._server
    if how == "dead":                          # before the block came
        server.stop()
    with monkeypatch.context() as broken, contextlib.suppress(KeyboardInterrupt):
        broken.setattr(f"appworld_adapter.{target}", value)
        if told:
            text, done = env.step(code and ANSWER.format(code))
            assert re.search(told, text) and "\n" not in text and done
        env.completion()
    assert str(env.completion()) == ("0.0" if how == "killed" else "nan")
    assert (env.counts["killed"], env.counts["lost"]) == ((1, 0) if how == "killed" else (0, 1))
    assert gone(server.process.pid)
    pytest.raises(RuntimeError, env.step, "hello").match("call reset")
    env.reset()
    assert env.step(ANSWER.format("'7'")) == ("7", True) and env.counts["lost"] == 0


@pytest.mark.parametrize("end", ["'end'", "os.kill(os.getppid(), 9)"])
def test_appworld_command_line_and_no_server_outlives_it(env, end):
    command = [sys.executable, "-u", appworld_adapter.__file__]
    assert subprocess.check_output(command, text=True) == "train: abc_1\n"
    code = f"str(passes.append(1) or os.getpid())\n\n{end}\n\n"
    told = subprocess.run([*command, "abc_1"], input=code, stdout=subprocess.PIPE, text=True).stdout
    assert gone(re.search(r"^\d+$", told, re.MULTILINE)[0])
    assert "kill" in end or "completion 1.00, doing nothing 0.50" in told
