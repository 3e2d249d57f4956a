"""The models and prompts of the benchmark: real architectures with random weights, made here.

Imports torch and transformers only, so that other libraries can be timed in an environment of their own.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

D_MODEL, N_LAYERS, VOCABULARY = 512, 12, 8192
PROMPTS, SHORTEST, LONGEST, BATCH = 200, 20, 60, 16
IMAGE_SIZE, PATCH_SIZE = 224, 14  # 257 image tokens
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words "w0", "w1", ...: one token each."""
    words = [*SPECIAL, *(f"w{number}" for number in range(VOCABULARY - len(SPECIAL)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def texts(count: int = PROMPTS, *, seed: int = 0) -> list[str]:
    """Texts of 20 to 60 tokens, whose number of letters does not tell their number of tokens."""
    draw = random.Random(seed)
    lengths = [draw.randint(SHORTEST, LONGEST) for _ in range(count)]
    return [
        " ".join(f"w{draw.randrange(VOCABULARY - len(SPECIAL))}" for _ in range(size)) for size in lengths
    ]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return _ready(LlamaForCausalLM(_text_config()))


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=_text_config().to_dict(),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2 + 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return _ready(LlavaForConditionalGeneration(config))


def processor() -> LlavaProcessor:
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _text_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=1376,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )


def _ready(model: Any) -> Any:
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 3
    return model.eval().requires_grad_(False)
