# SPDX-License-Identifier: MIT
"""Every causal model type of the transformers library, built small: is it refused, or right?

    python .ci/sweep.py [TYPE ...]

A model that load_model accepts then plays ragged games that are longer than its windows; what it
sampled is scored as the update scores it, with layers computed twice. One line for each type."""
import collections
import re
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd
import sokoban_env
from test_skill_sd import one_step, world

SMALL = {                                      # values, and what is set to them
    0: "(pad|bos|eos)_token_id", 16: "(q|kv)_lora_rank", 400: "vocab_size",
    1: "num_experts_per_tok|top_k_experts|moe_k|n_group|topk_group",
    2: "num_hidden_layers|n_layers?|num_layers|(de|en)coder_layers|num_(key_value|kv)_heads",
    4: "(num|decoder|encoder)_attention_heads|n_heads?|(num|num_local|n_routed|moe_num)_experts",
    8: "head_dim|qk_(nope|rope)_head_dim|v_head_dim|rotary_dim",
    32: "hidden_size|d_model|n_embd|embed_dim|word_embed_proj_dim|embedding_size",
    48: "sliding_window|window_size|keep_window_size|attention_chunk_size",
    64: "intermediate_size|ffn_dim|d_ff|n_inner|moe_intermediate_size|ffn_hidden_size",
    2048: "max_position_embeddings|n_positions|max_seq_len"}


def shrink(config):
    """Make a config and its parts small and noisy; lists that go with the layers are cut."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value)
        for small, names in SMALL.items():
            if re.fullmatch(names, name) and type(value) is int:
                setattr(config, name, small)
        if name in ("layer_types", "mlp_layer_types") and value:
            setattr(config, name, [*dict.fromkeys(value), *value][:2])
        noise = re.search("dropout|_pdrop$|jitter|layerdrop", name) and isinstance(value, float)
        if noise and config.model_type != "diffllama":         # that only training has
            setattr(config, name, 0.1)
    if config.model_type == "gpt_neo":
        config.attention_types = [[["global", "local"], 1]]
        config.attention_layers = ["global", "local"]


def gap(model, tokenizer, cfg):
    """The largest difference between what is sampled and what the update scores."""
    games = [world([" up" * n for n in lengths]) for lengths in (
        (90, 3, 9, 5, 0), (7, 70, 0), (40, 2, 33, 0), (1, 1, 1, 60, 0))]       # 0: the end
    metrics, _ = one_step(model, skill_sd.rollout(model, tokenizer, games, cfg), cfg)
    return metrics["rollout_gap"]


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = collections.Counter()
    for kind in sys.argv[1:] or TYPES:
        with tempfile.TemporaryDirectory() as folder:
            end = "not built"
            try:
                config = transformers.CONFIG_MAPPING[kind]()
                shrink(config)
                torch.manual_seed(0)
                with torch.device("meta"):
                    n = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
                assert n < 2e8, f"{n} parameters"
                model = transformers.AutoModelForCausalLM.from_config(config)
                for p in model.parameters():
                    p.data.mul_(5 if p.dim() > 1 else 1)       # else all is nearly uniform
                model.save_pretrained(folder)
                sokoban_env.tiny_tokenizer(6).save_pretrained(folder)
                end = "CRASHED"
                cfg = skill_sd.Config(model=folder, max_new_tokens=3, gradient_checkpointing=1)
                far = gap(*skill_sd.load_model(cfg, None), cfg)
                end, told = "right" if far < 1e-3 else "WRONG", f"gap {far:.1e}"
            except Exception as error:
                told = f"{type(error).__name__}: {error}".replace(folder, "")
                end = "refused" if "UserError: " in told and "model=''" in told else end
        found[end] += 1
        print(f"{kind:<28} {end:<10} {told:.200}".replace("\n", " "), flush=True)
    print(dict(found))


if __name__ == "__main__":
    main()
