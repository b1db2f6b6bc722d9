# SPDX-License-Identifier: MIT
"""The rollout's speed against one generate() call per turn and against continuous batching.

    python .ci/bench.py MODEL [--games 4] [--turns 20]      MODEL: a Hugging Face name or folder
"""
import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd
from sokoban_env import SokobanEnv, generate_levels


def rollout(model, tokenizer, envs, cfg):
    """This project's. Returns each game's ids after the prompt, and the number of sampled ones."""
    played = skill_sd.rollout(model, tokenizer, envs, cfg, greedy=True)
    assert not any(t.counts["truncated"] for t in played), "more turns than max_context can hold"
    return [t.ids for t in played], sum(sum(t.mask) for t in played)


@torch.no_grad()
def by_turns(answers, model, tokenizer, envs, cfg):
    """The same by asking for answers to whole conversations. answers: (model, rows, eos, cfg)."""
    chat, ends = skill_sd.Chat(tokenizer, cfg.prefill), model.generation_config.eos_token_id
    eos = list(chat.eos_ids.union(ends if isinstance(ends, list) else [ends]))
    prompts = [chat.prompt(env.system_prompt, env.reset()) for env in envs]
    ids, sampled, playing = [[] for _ in envs], 0, range(len(envs))
    while playing:
        found, still = answers(model, [prompts[i] + ids[i] for i in playing], eos, cfg), []
        for i, answer in zip(playing, found):
            text = cfg.prefill + tokenizer.decode(answer, skip_special_tokens=True)
            observation, done = envs[i].step(text)
            ids[i] += answer if done else answer + chat.next_turn(observation, answer[-1])
            sampled += len(answer)
            still += [] if done else [i]
        playing = still
    return ids, sampled


def generate(model, rows, eos, cfg):
    """One generate() call on left-padded rows."""
    longest = max(map(len, rows))
    ids, seen = (torch.tensor(part, device=model.device) for part in (
        [[0] * (longest - len(row)) + row for row in rows],
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows]))
    new = model.generate(input_ids=ids, attention_mask=seen, do_sample=False, eos_token_id=eos,
                         pad_token_id=eos[0], max_new_tokens=cfg.max_new_tokens)[:, longest:]
    ends = [next((i for i, y in enumerate(row) if y in eos), len(row)) for row in new.tolist()]
    return [row[:end + 1] for row, end in zip(new.tolist(), ends)]


def continuous(model, rows, eos, cfg, blocks):
    """transformers' continuous batching. The manager is kept, and with it its cache of prefixes."""
    manager = model.init_continuous_batching(
        generation_config=transformers.GenerationConfig(do_sample=False, eos_token_id=-1),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            page_size=16, num_blocks=blocks, max_batch_tokens=1024, auto_switch_to_flash=False))
    manager.start()
    try:
        asked, done = [manager.add_request(row, max_new_tokens=cfg.max_new_tokens,
                                           eos_token_id=eos) for row in rows], {}
        while len(done) < len(rows):
            if found := manager.get_result(timeout=1):
                done[found.request_id] = found.generated_tokens
            elif not manager.is_running():
                raise RuntimeError("continuous batching has died")
        return [done[name] for name in asked]
    finally:
        manager.stop(block=True, keep_for_next_session=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--games", type=int, default=4)
    parser.add_argument("--turns", type=int, default=20)
    args = parser.parse_args()
    cfg = skill_sd.Config(model=args.model, prefill="<answer>", max_new_tokens=12, max_context=4096)
    model, tokenizer = skill_sd.load_model(cfg, world=None)
    ways, read, first = {"generate()": partial(by_turns, generate), "rollout": rollout}, [], None
    if hasattr(transformers, "ContinuousBatchingConfig"):      # since transformers 5
        ways["continuous batching"] = partial(
            by_turns, partial(continuous, blocks=256 * args.games))
    levels = generate_levels(args.games, seed=5, boxes=2, min_moves=8)
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    print(f"{args.model}: {args.games} games of {args.turns} turns at most, greedy, {model.device},"
          f" {torch.get_num_threads()} threads, torch {torch.__version__}, transformers "
          f"{transformers.__version__}\n{'':<21}seconds  action tokens  a second   ratio  "
          "prefilled tokens  same games")
    rollout(model, tokenizer, [SokobanEnv(level, 1) for level in levels], cfg)       # warm up
    for name, way in ways.items():
        read.clear()
        envs, started = [SokobanEnv(level, args.turns) for level in levels], time.perf_counter()
        ids, sampled = way(model, tokenizer, envs, cfg)
        seconds = time.perf_counter() - started
        wanted, slowest = first = first or (ids, seconds)
        print(f"{name:<20} {seconds:8.1f} {sampled:14d} {sampled / seconds:9.1f} "
              f"{slowest / seconds:7.2f} {sum(ids.numel() for ids in read) - sampled:17d} "
              f"{sum(map(list.__eq__, ids, wanted)):6d} of {args.games}", flush=True)
        assert name != "rollout" or ids == wanted, "the greedy games differ"


if __name__ == "__main__":
    main()
