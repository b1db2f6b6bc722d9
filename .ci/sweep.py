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
from types import SimpleNamespace

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

sys.path.insert(0, str(Path(__file__).parent.parent))
import skill_sd
import sokoban_env

SMALL = {
    r"(hidden_size|d_model|n_embd|embed_dim|word_embed_proj_dim|embedding_size)": 32,
    r"(intermediate_size|ffn_dim|d_ff|n_inner|moe_intermediate_size|ffn_hidden_size)": 64,
    r"(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers)": 2,
    r"(num_attention_heads|n_heads?|decoder_attention_heads|encoder_attention_heads)": 4,
    r"(num_key_value_heads|num_kv_heads)": 2, r"vocab_size": 400,
    r"(head_dim|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|rotary_dim)": 8,
    r"(pad|bos|eos)_token_id": 0, r"(q_lora_rank|kv_lora_rank)": 16,
    r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)": 4,
    r"(num_experts_per_tok|top_k_experts|moe_k|n_group|topk_group)": 1,
    r"(sliding_window|window_size|keep_window_size|attention_chunk_size)": 48,
    r"(max_position_embeddings|n_positions|max_seq_len)": 2048}


def shrink(config):
    """Make a config and its parts small; lists that go with the layers are cut."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value)
        for pattern, small in SMALL.items():
            if re.fullmatch(pattern, name) and type(value) is int:
                setattr(config, name, small)
        if name in ("layer_types", "mlp_layer_types") and value:
            setattr(config, name, [*dict.fromkeys(value), *value][:2])
    if config.model_type == "gpt_neo":
        config.attention_types, config.attention_layers = [[["global", "local"], 1]], [
            "global", "local"]
    for name, value in list(vars(config).items()):             # noise that only training has
        if re.search("dropout|_pdrop$|jitter|layerdrop", name) and isinstance(value, float):
            if config.model_type != "diffllama":
                setattr(config, name, 0.1)


def gap(model, tokenizer, cfg):
    """The largest difference between what is sampled and what the update scores."""
    def world(lengths):
        texts = iter([" up" * n for n in lengths])
        return SimpleNamespace(
            task_id="", system_prompt="", reset=lambda: next(texts), completion=lambda: 1.0,
            step=lambda answer: (text := next(texts, ""), not text), close=lambda: None)
    games = [world(lengths) for lengths in ((90, 3, 9, 5), (7, 70), (40, 2, 33), (1, 1, 1, 60))]
    played = skill_sd.rollout(model, tokenizer, games, cfg)
    skill_sd.update_mode(model, cfg)
    with torch.no_grad():
        logp, mask = skill_sd.response_logps(model, played, cfg)
    return (logp[mask] - torch.tensor([x for t in played for x in t.logps])).abs().max().item()


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = collections.Counter()
    for kind in sys.argv[1:] or TYPES:
        with tempfile.TemporaryDirectory() as folder:
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
            except Exception as error:
                said = "not built", f"{type(error).__name__}: {error}"
            else:
                try:
                    cfg = skill_sd.Config(model=folder, max_new_tokens=3, gradient_checkpointing=1)
                    loaded = skill_sd.load_model(cfg, None)
                    far = gap(*loaded, cfg)
                    said = "right" if far < 1e-3 else "WRONG", f"gap {far:.1e}"
                except sokoban_env.UserError as error:
                    said = "refused", str(error).replace(folder, "")
                except Exception as error:
                    said = "CRASHED", f"{type(error).__name__}: {error}"
        found[said[0]] += 1
        print(f"{kind:<28} {said[0]:<10} {said[1]:.200}".replace("\n", " "), flush=True)
    print(dict(found))


if __name__ == "__main__":
    main()
