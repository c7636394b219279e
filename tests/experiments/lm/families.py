"""A tiny random model of every family that the documentation lists, built from its configuration."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

VOCAB = 37
N_TOKENS = 6

WIDTHS: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 16},
}
LLAMA = {**WIDTHS, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
SLIDING = {**LLAMA, "sliding_window": 4}
GPT = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16}
ROTARY_GPT = {**GPT, "rotary_dim": 4}
GROUPED = {k: v for k, v in LLAMA.items() if k != "head_dim"}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
DEEPSEEK = {
    **{**WIDTHS, "num_key_value_heads": 4, "moe_intermediate_size": 12, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4},
    **{"v_head_dim": 4, "head_dim": 4},
}
TWO_KINDS = ["sliding_attention", "full_attention"]
SHARING = {
    **{**SLIDING, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": 2 * TWO_KINDS},
    **{"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 4},
}
MAMBA = {"vocab_size": VOCAB, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
BOTH_ENDS = {
    **{"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2},
    **{"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 2},
}

SETTINGS: dict[str, dict[str, Any]] = {
    "GPT-2": GPT,
    "GPT": GPT,
    "GPT-BigCode": GPT,
    "GPT-Neo": {
        **{"vocab_size": VOCAB, "hidden_size": 16, "num_layers": 2, "num_heads": 4},
        **{"attention_types": [[["global", "local"], 1]], "window_size": 4},
        "max_position_embeddings": 16,
    },
    "GPT-NeoX, Pythia": WIDTHS,
    "GPT-J": ROTARY_GPT,
    "CodeGen": ROTARY_GPT,
    "Llama": LLAMA,
    "Mistral": SLIDING,
    "Ministral": SLIDING,
    "Qwen2": LLAMA,
    "Qwen3": LLAMA,
    "Gemma": LLAMA,
    "Gemma 2": SLIDING,
    "Gemma 3": SLIDING,
    "Gemma 3n": {
        **{**SHARING, "intermediate_size": [24] * 4, "laurel_rank": 4},
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "Gemma 4": {**SHARING, "global_head_dim": 8},
    "Gemma 4, experts": {
        **{**SLIDING, "num_kv_shared_layers": 0, "layer_types": TWO_KINDS, "global_head_dim": 8},
        **{"vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 0},
        **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2},
        "moe_intermediate_size": 12,
    },
    "VaultGemma": SLIDING,
    "Phi": WIDTHS,
    "Phi-3": {**LLAMA, "original_max_position_embeddings": 16},
    "OPT": {
        **{"vocab_size": VOCAB, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16},
    },
    "XGLM": {
        **{"vocab_size": VOCAB, "d_model": 16, "ffn_dim": 24, "num_layers": 2},
        **{"attention_heads": 4, "max_position_embeddings": 16},
    },
    "BLOOM": {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 4},
    "Falcon": {k: v for k, v in WIDTHS.items() if k != "intermediate_size"},
    "MPT": {
        **{"vocab_size": VOCAB, "d_model": 16, "n_heads": 4, "n_layers": 2},
        **{"expansion_ratio": 2, "max_seq_len": 16},
    },
    "OLMo": GROUPED,
    "OLMo 2": GROUPED,
    "OLMo 3": {**GROUPED, "sliding_window": 4},
    "StableLM": GROUPED,
    "StarCoder2": GROUPED,
    "Cohere": LLAMA,
    "Cohere 2": SLIDING,
    "Granite": LLAMA,
    "GLM": LLAMA,
    "GLM-4": LLAMA,
    "SmolLM3": LLAMA,
    "EXAONE 4": SLIDING,
    "Nemotron": LLAMA,
    "Helium": {**LLAMA, "head_dim": 4},
    "Persimmon": WIDTHS,
    "ERNIE 4.5": LLAMA,
    "LFM2": {**LLAMA, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "Mixtral": {**LLAMA, **EXPERTS},
    "Qwen2-MoE": {**LLAMA, **QWEN_EXPERTS, "shared_expert_intermediate_size": 12},
    "Qwen3-MoE": {**LLAMA, **QWEN_EXPERTS},
    "Qwen3-Next": {
        **{**LLAMA, **QWEN_EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
        **{"linear_key_head_dim": 4, "linear_value_head_dim": 4, "linear_num_key_heads": 2},
        **{"linear_num_value_heads": 4, "shared_expert_intermediate_size": 12},
    },
    "OLMoE": {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "GPT-OSS": {**SLIDING, **EXPERTS},
    "Llama 4": {**LLAMA, **EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 24},
    "Phi-3.5-MoE": {**LLAMA, **EXPERTS},
    "GraniteMoe": {**GROUPED, **EXPERTS},
    "DeepSeek V2": DEEPSEEK,
    "DeepSeek V3": DEEPSEEK,
    "JetMoe": {
        **{**LLAMA, **EXPERTS, "kv_channels": 8},
    },
    "Mamba": {**MAMBA, "time_step_rank": 2},
    "Mamba 2": {**MAMBA, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "FalconMamba": {**MAMBA, "time_step_rank": 2},
    "RWKV": {
        **{"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "context_length": 16},
    },
    "RecurrentGemma": {
        **{**LLAMA, "num_hidden_layers": 3, "lru_width": 16, "attention_window_size": 4},
    },
    "Bamba": {
        **{**LLAMA, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8},
        **{"mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 4},
    },
    "Jamba": {
        **{**LLAMA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
        **{"expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2},
        **{"mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False},
    },
    "BERT": WIDTHS,
    "RoBERTa": {**WIDTHS, "max_position_embeddings": 18},
    "ALBERT": {**WIDTHS, "embedding_size": 8},
    "DistilBERT": {
        **{"vocab_size": VOCAB, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4},
        "max_position_embeddings": 16,
    },
    "ELECTRA": {**WIDTHS, "embedding_size": 8},
    "DeBERTa v2": WIDTHS,
    "ModernBERT": {**WIDTHS, "num_hidden_layers": 3, "local_attention": 4, "pad_token_id": 0},
    "XLNet": {"vocab_size": VOCAB, "d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24},
    "BART": {**BOTH_ENDS, "max_position_embeddings": 16, "forced_eos_token_id": 2},
    "T5": {
        **{"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2},
        **{"num_heads": 4, "decoder_start_token_id": 0},
    },
    "Whisper": {
        **{**BOTH_ENDS, "num_mel_bins": 4, "max_source_positions": 8},
        **{"max_target_positions": 16, "begin_suppress_tokens": None},
    },
    "ViT": {
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"intermediate_size": 24, "image_size": 8, "patch_size": 4, "num_labels": 5},
    },
}


class Tiny(NamedTuple):
    """A model and what makes batches for it."""

    inner: transformers.PreTrainedModel
    batch: Callable[[], Tensor | dict[str, Tensor]]


def tiny(family: str, class_name: str) -> Tiny:
    """Every matrix of its own is random, also where a fresh model has zeros."""
    cls = getattr(transformers, class_name)
    torch.manual_seed(0)
    inner = cls(cls.config_class(**SETTINGS[family])).eval()
    with torch.no_grad():
        for parameter in inner.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    inner.config.use_cache = False
    return Tiny(inner, BATCHES.get(family, ids))


def ids(n: int = N_TOKENS) -> Tensor:
    return torch.randint(3, VOCAB, (2, n))


BATCHES: dict[str, Callable[[], Tensor | dict[str, Tensor]]] = {
    "T5": lambda: {"input_ids": ids(), "decoder_input_ids": ids(4)},
    "Whisper": lambda: {"input_features": torch.randn(2, 4, 16), "decoder_input_ids": ids(4)},
    "ViT": lambda: {"pixel_values": torch.randn(2, 3, 8, 8)},
}
"""of those that cannot be called with ids alone"""
