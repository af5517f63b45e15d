"""Hashed words against their definition; the pipeline encoder against WanPipeline itself."""

import hashlib
from pathlib import Path

import pytest
import torch

from gossamer.train.refusal import Refusal
from gossamer.train.text import HashedWords, PipelineText


def test_each_word_is_the_unit_vector_of_its_hash_in_order() -> None:
    out = HashedWords(dim=32, length=4).encode(["Red, ball", ""])
    for place, word in enumerate(("red", "ball")):
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8]) >> 1
        vector = torch.randn(32, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(out[0, place], vector / vector.square().sum().sqrt())
    assert out.shape == (2, 4, 32)
    assert not out[0, 2:].any() and not out[1].any()


def test_words_past_the_length_are_dropped_and_case_does_not_matter() -> None:
    text = HashedWords(dim=8, length=2)
    assert torch.equal(text.encode(["A B c d"]), text.encode(["a b"]))


def test_fingerprints_differ_by_what_changes_the_embedding() -> None:
    assert HashedWords(dim=8).fingerprint != HashedWords(dim=16).fingerprint
    with pytest.raises(Refusal, match=r"text\.dim"):
        HashedWords(dim=0)


@pytest.fixture(scope="module")
def wan_pipeline(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    from diffusers import UniPCMultistepScheduler, WanPipeline
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(character, -3.0) for character in map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=len(fast),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
    )
    pipeline = WanPipeline(
        tokenizer=fast,
        text_encoder=UMT5EncoderModel(config).eval(),
        vae=None,
        transformer=None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline.tokenizer.save_pretrained(str(folder / "tokenizer"))
    pipeline.text_encoder.save_pretrained(str(folder / "text_encoder"))
    return pipeline, folder


def test_pipeline_text_equals_wan_pipeline(wan_pipeline) -> None:  # type: ignore[no-untyped-def]
    pipeline, folder = wan_pipeline
    prompts = ["a  red ball &amp; a cat", "", "x" * 100]
    text = PipelineText(path=folder, max_length=24)
    with torch.no_grad():
        expected = pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=24)
    out = text.encode(prompts)
    torch.testing.assert_close(out, expected)
    assert out.shape == (3, text.length, text.dim)
    assert not out[0, -1].any()
    assert text.fingerprint == PipelineText(path=folder, max_length=24).fingerprint
    assert text.fingerprint != PipelineText(path=folder, max_length=16).fingerprint


def test_pipeline_text_refuses_a_folder_without_a_text_encoder(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="tokenizer/"):
        PipelineText(path=tmp_path)
