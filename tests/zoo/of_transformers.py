"""Models of transformers from tiny configurations."""

import torch
import transformers as hf

from tests.zoo.case import ZooCase

VOCABULARY = 96
_TEXT = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}


def _tokens(batch, length=12):
    return torch.randint(3, VOCABULARY, (batch, length))


def _text(batch):
    """As a tokenizer returns it, the last sentence padded on the right."""
    mask = torch.ones(batch, 12, dtype=torch.long)
    mask[-1, 9:] = 0
    return hf.BatchEncoding({"input_ids": _tokens(batch) * mask, "attention_mask": mask})


def _pixels(size):
    return lambda batch: hf.BatchFeature({"pixel_values": torch.randn(batch, 3, size, size)})


def _eager(model):
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")


def _case(kind, config, inputs, **options):
    return ZooCase(lambda: kind(config), inputs, _eager, **options)


def _clip(batch):
    return hf.BatchEncoding({**_text(batch), **_pixels(32)(batch)})


_CLIP = {
    "text_config": {**_TEXT, **_WIDE},
    "vision_config": {**_WIDE, "image_size": 32, "patch_size": 8},
}


def _blip2():
    """Learned queries look at an image, and a language model reads what they have seen."""
    vision = {**_WIDE, "image_size": 32, "patch_size": 8}
    queries = {**_WIDE, "encoder_hidden_size": 64, "cross_attention_frequency": 1}
    text = {
        **_TEXT,
        **_WIDE,
        "ffn_dim": 96,
        "use_cache": False,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 64,
    }
    return hf.Blip2Config(
        vision_config=vision,
        qformer_config=queries,
        text_config={"model_type": "opt", **text},
        num_query_tokens=4,
        image_text_hidden_size=64,
        image_token_index=VOCABULARY - 1,
    )


def _described(batch):
    """Images, and texts that begin with a place for each query."""
    places = torch.full((batch, 4), VOCABULARY - 1)
    tokens = torch.randint(3, VOCABULARY - 1, (batch, 8))
    text = {"input_ids": torch.cat([places, tokens], dim=1)}
    return hf.BatchFeature({**text, **_pixels(32)(batch)})


MODELS = {
    "bert": _case(
        hf.BertForSequenceClassification, hf.BertConfig(**_WIDE, **_TEXT, num_labels=5), _text
    ),
    "gpt2": _case(
        hf.GPT2LMHeadModel,
        hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **_TEXT),
        _text,
    ),
    "llama": _case(
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**_WIDE, **_TEXT, num_key_value_heads=2, tie_word_embeddings=True),
        _text,
    ),
    "qwen2": _case(
        hf.Qwen2ForCausalLM, hf.Qwen2Config(**_WIDE, **_TEXT, num_key_value_heads=2), _text
    ),
    "mixtral": _case(
        hf.MixtralForCausalLM,
        hf.MixtralConfig(**_WIDE, **_TEXT, num_key_value_heads=2, num_local_experts=4),
        _text,
    ),
    "qwen2_moe": _case(
        hf.Qwen2MoeForCausalLM,
        hf.Qwen2MoeConfig(
            **_WIDE,
            **_TEXT,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        _text,
    ),
    "blip2": _case(hf.Blip2ForConditionalGeneration, _blip2(), _described),
    "t5": _case(
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            d_model=64,
            d_kv=16,
            d_ff=96,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            **_TEXT,
        ),
        lambda batch: {**_text(batch), "labels": _tokens(batch, 7)},
    ),
    "whisper": _case(
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=96,
            decoder_ffn_dim=96,
            num_mel_bins=16,
            max_source_positions=25,
            max_target_positions=32,
            decoder_start_token_id=1,
            **_TEXT,
        ),
        lambda batch: {
            "input_features": torch.randn(batch, 16, 50),
            "decoder_input_ids": _tokens(batch, 7),
        },
    ),
    "clip": _case(hf.CLIPModel, hf.CLIPConfig(**_CLIP, projection_dim=32), _clip),
    "vit": _case(
        hf.ViTForImageClassification,
        hf.ViTConfig(**_WIDE, image_size=32, patch_size=8, num_labels=10),
        _pixels(32),
    ),
    "vit_1024": _case(
        hf.ViTForImageClassification,
        hf.ViTConfig(
            hidden_size=192,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=1024,
            image_size=64,
            patch_size=2,
            num_labels=10,
        ),
        _pixels(64),
    ),
    "swin": _case(
        hf.SwinForImageClassification,
        hf.SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=32,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_labels=10,
        ),
        _pixels(32),
    ),
    "wav2vec2": _case(
        hf.Wav2Vec2ForCTC,
        hf.Wav2Vec2Config(
            **_WIDE,
            **_TEXT,
            conv_dim=(32, 32, 32),
            conv_kernel=(10, 3, 3),
            conv_stride=(5, 2, 2),
            num_feat_extract_layers=3,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            layerdrop=0.0,
            apply_spec_augment=False,
        ),
        lambda batch: {"input_values": torch.randn(batch, 800)},
    ),
    "mamba": _case(
        hf.MambaForCausalLM,
        hf.MambaConfig(hidden_size=48, num_hidden_layers=2, state_size=8, **_TEXT),
        _tokens,
    ),
}
