"""Models small enough for the tests."""

from typing import Any

import torch


def tiny_wan(seed: int = 0, **changes: int) -> Any:
    """Return diffusers' Wan with two layers of two heads, 16 wide, for latents of 4 channels."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 32}
    sizes |= {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32}
    return WanTransformer3DModel(**{**sizes, "rope_max_seq_len": 32, **changes}).eval()


def tiny_pipeline() -> Any:
    """Return a whole WanPipeline of random weights, made offline."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(number), -3.0) for number in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)
    torch.manual_seed(0)
    words = {"vocab_size": len(fast), "relative_attention_num_buckets": 8}
    return WanPipeline(
        tokenizer=fast,
        text_encoder=UMT5EncoderModel(
            UMT5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, **words)
        ).eval(),
        vae=AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ).eval(),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=64,
        ).eval(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
