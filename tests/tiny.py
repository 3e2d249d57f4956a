"""Real architectures at toy size, with random weights and a real processor, for tests without a network."""

from __future__ import annotations

from pathlib import Path

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

from mechguard.prompts import Prompt, Prompts

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<image>"]
WORDS = [
    *"how to make build a an the cake bomb kite poison please show me what is in picture sorry".split(),
    *"i cannot help with that sure here user assistant : . , ? !".split(),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image> {% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)
IMAGE_SIZE, PATCH_SIZE = 32, 16


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows a few dozen words and the image token."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
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


def processor() -> LlavaProcessor:
    """The real LLaVA processor over the toy tokenizer and a 32-pixel CLIP image processor."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def llava(*, seed: int = 0, d_model: int = 32, n_layers: int = 3) -> LlavaForConditionalGeneration:
    """A LLaVA (CLIP tower, projector, Llama) with random weights large enough to tell layers apart."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    text = llama_config(d_model=d_model, n_layers=n_layers)
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=SPECIAL.index("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2 + 1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 3
    return model


def llama_config(*, d_model: int = 32, n_layers: int = 2) -> LlamaConfig:
    """A Llama of a few layers over the toy vocabulary."""
    return LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        initializer_range=0.2,
    )


def llama(*, seed: int = 0) -> LlamaForCausalLM:
    """A text-only language model with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config()).eval()


def save_llava(folder: Path, *, seed: int = 0, with_processor: bool = True) -> Path:
    """Write a checkpoint folder as a user would find one on disk."""
    llava(seed=seed).save_pretrained(folder)
    if with_processor:
        processor().save_pretrained(folder)
    return folder


def prompts(*, pairs: int) -> Prompts:
    """Pairs of harmful and harmless requests of unequal length in the toy vocabulary."""
    wrappers = ["how to {} ?", "please show me how to {}", "{} please", "show me what is in a {} ."]
    verbs = ["make", "build", "make a", "build the"]
    rows = []
    for index in range(pairs):
        for label, noun in (("harmful", ["bomb", "poison"]), ("harmless", ["cake", "kite"])):
            what = f"{verbs[index // 2 % 4]} {noun[index % 2]}"
            text = wrappers[index % 4].format(what)
            rows.append(Prompt(f"{label}-{index}", text, label, pair=f"pair-{index}"))
    return Prompts(rows, name="toy")


def write_study_data(folder: Path, *, pairs: int = 8) -> Path:
    """A small folder of prompt sets, as a user would lay one out."""
    folder.mkdir(parents=True, exist_ok=True)
    both = prompts(pairs=pairs)
    both.save(folder / "anchors.jsonl")
    both.save(folder / "validation.jsonl")
    both.with_label("harmful").save(folder / "malicious.jsonl")
    both.with_label("harmless").save(folder / "benign.jsonl")
    return folder
