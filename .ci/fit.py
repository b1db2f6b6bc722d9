# SPDX-License-Identifier: MIT
"""The memory that models of common sizes need by a formula, held against a measured peak.

    python .ci/fit.py                the table
    python .ci/fit.py --measure      and on Linux, in a minute, six settings of a small CPU model
    python .ci/fit.py --measure 2    the first two of the six
"""
import argparse
import copy
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd

SHAPES = {                     # width, MLP, layers, heads, key heads, head width, vocabulary
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49152),
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 64, 151936),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 128, 151936),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 128, 151936),
    "Qwen3-4B": (2560, 9728, 36, 32, 8, 128, 151936)}
SMALL = (320, 960, 6, 8, 4, 40, 16384)
SETTINGS = [("play", "bfloat16", 0), ("update", "bfloat16", 0.5), ("update", "bfloat16", 0.05),
            ("play", "float32", 0), ("update", "float32", 0.5), ("update", "float32", 0.05)]


def llama(shape):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "vocab_size")
    return LlamaForCausalLM(LlamaConfig(**dict(zip(names, shape)), tie_word_embeddings=True))


def memory(shape, parameters, rows, slots, tokens, actions, precision):
    """Bytes while playing and while updating (gradient checkpointing on). rows, slots:
    conversations played at once and their length; tokens, actions: of a micro-batch."""
    width, mlp, layers, heads, key_heads, head_width, vocabulary = shape
    size = 2 if precision == "bfloat16" else 4
    cast = 2 * parameters * (size == 2)
    layer_cache = 2 * rows * slots * key_heads * head_width * size
    # At work in one layer: keys and values repeated for every head, or a copy with room for more.
    cache = layer_cache * (layers + max(1, heads // key_heads))
    layer = tokens * (8 * width + 6 * mlp) * size
    inputs = 4 * layers * tokens * width
    return dict(play=16 * parameters + cast + cache,           # student, teacher, Adam's two
                update=20 * parameters + cast + inputs + max(layer, 12 * actions * vocabulary))


def status(field):
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().split("\n")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def conversations(rows, length, share):
    """A batch of rows of `length` tokens, of which a share are actions."""
    mask = [i % 100 < 100 * share for i in range(length)]
    return [skill_sd.Trajectory("t", None, [10], [10], [], [10] * length, mask, [0.0] * sum(mask),
                                adv=row - 1.5) for row in range(rows)]


def learn(model, teacher, optimizer, batch, cfg):
    """What an iteration does with a micro-batch."""
    teacher_logps = [skill_sd.score(teacher, batch, cfg)]
    skill_sd.update(model, optimizer, [batch], teacher_logps, cfg)


def measure(phase, precision, share):
    """In a process of its own: peak and formula in bytes."""
    torch.set_num_threads(1)
    cfg = skill_sd.Config(precision=precision, gradient_checkpointing=1, micro_batch_tokens=10**9)
    for shape in ((64, 64, 1, 1, 1, 64, 64), SMALL):           # the first: what the libraries take
        before = status("VmRSS")
        model = llama(shape)
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
        teacher = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters())
        learn(model, teacher, optimizer, conversations(1, 64, 0.5), cfg)       # Adam has its state
    Path("/proc/self/clear_refs").write_text("5")              # the peak is counted anew
    rows, slots = 16 if phase == "play" else 4, 768
    if phase == "play":
        decoder = skill_sd.Decoder(model.eval(), cfg, rows)
        with torch.no_grad():
            for _ in range(slots // 64):
                decoder.read([[10] * 64] * rows)
    else:
        learn(model, teacher, optimizer, conversations(rows, slots, share), cfg)
    formula = memory(SMALL, sum(p.numel() for p in model.parameters()), rows, slots, rows * slots,
                     int(rows * slots * share), precision)
    print(status("VmHWM") - before, formula[phase])


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measure", nargs="?", type=int, const=len(SETTINGS), default=0)
    args = parser.parse_args()
    print("model         parameters   play  update   update with one copy       (GB)")
    for name, shape in SHAPES.items():
        with torch.device("meta"):
            n = sum(p.numel() for p in llama(shape).parameters())
        need = memory(shape, n, rows=64, slots=4096, tokens=16384, actions=4096,
                      precision="bfloat16")
        print(f"{name:<14}{n / 1e6:8.0f} M {need['play'] / 1e9:6.0f} {need['update'] / 1e9:7.0f}"
              f"{(need['update'] - 4 * n) / 1e9:23.0f}")
    # In the child every tensor has pages of its own, which are given back at once.
    env = os.environ | dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_MMAP_MAX_="1000000")
    for phase, precision, share in SETTINGS[:args.measure]:
        peak, formula = map(int, subprocess.check_output(
            [sys.executable, "-W", "ignore", "-c",
             f"import fit; fit.measure({phase!r}, {precision!r}, {share})"],
            env=env, cwd=Path(__file__).parent).split())
        print(f"{phase}, {precision}, {100 * share:.0f} % actions: measured {peak / 1e6:.0f} MB, "
              f"formula {formula / 1e6:.0f} MB")
        assert abs(formula / peak - 1) < 0.15, "the formula is off by more than 15 %"


if __name__ == "__main__":
    main()
