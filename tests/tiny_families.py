"""Every family of models at toy size: its real configuration, model and processor classes, random weights.

Nothing here is shared with the package, so that a mistake in how the package reads a family cannot hide
in how the family was built.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.smolvlm import processing_smolvlm
from transformers.utils import is_torchvision_available

from mechguard import processors

SIZE, PATCH = 32, 16
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
    "initializer_range": 0.2,
}
Built = tuple[Any, Any]


def chat_template(image: str) -> str:
    """A template like those of the hub, with the picture where the family wants it."""
    return (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] }} : "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + image
        + " {% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        "{% endif %} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
    )


def tokenizer(*special: str, names: dict[str, str] | None = None) -> hf.PreTrainedTokenizerFast:
    """A word-level tokenizer with the special tokens of a family, some of them under a name."""
    words = ["<pad>", "<unk>", "<s>", "</s>", *special, *(names or {}).values(), *tiny.WORDS]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Fuse()
    plain = [word for word in vocabulary if word not in tiny.WORDS]
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in plain])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=names or {},
        padding_side="left",
    )


def images(family: str, **options: Any) -> Any:
    """The family's own image processor, in the version that needs no torchvision."""
    name = IMAGE_PROCESSOR_MAPPING_NAMES[family]["pil"]
    return getattr(hf, name)(**options)


def read_class(family: str) -> Any:
    """The family's own processor class; without torchvision, without its video part."""
    found = processors.processor_class(family)
    return processors.without_video(found) if "video_processor" in found.get_attributes() else found


def ids(words: hf.PreTrainedTokenizerFast) -> dict[str, int]:
    """The token ids that every text configuration wants."""
    return {
        "vocab_size": len(words) + 8,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }


def built(model_class: Any, config: Any, processor: Any) -> Built:
    """The model with random weights, and its processor."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if not parameter.any():  # some projections and gates start at zero, which would hide pictures
            torch.nn.init.normal_(parameter, std=0.2)
    words = getattr(processor, "tokenizer", processor)
    for name in ("pad", "bos", "eos"):
        setattr(model.generation_config, f"{name}_token_id", getattr(words, f"{name}_token_id"))
    return model, processor


def llava() -> Built:
    words = tokenizer(names={"image_token": "<image>"})
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION).to_dict(),
        text_config=hf.LlamaConfig(**TEXT, **ids(words)).to_dict(),
        image_token_index=words.image_token_id,
        image_seq_length=5,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = hf.LlavaProcessor(
        images("llava", size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return built(hf.LlavaForConditionalGeneration, config, processor)


def llava_next() -> Built:
    words = tokenizer(names={"image_token": "<image>"})
    pinpoints = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION).to_dict(),
        text_config=hf.LlamaConfig(**TEXT, **ids(words)).to_dict(),
        image_token_index=words.image_token_id,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = hf.LlavaNextProcessor(
        images(
            "llava_next",
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_grid_pinpoints=pinpoints,
        ),
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    return built(hf.LlavaNextForConditionalGeneration, config, processor)


def llava_onevision() -> Built:
    words = tokenizer("<video>", names={"image_token": "<image>"})
    pinpoints = [[SIZE, SIZE], [SIZE, 2 * SIZE], [2 * SIZE, SIZE]]
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
        text_config=hf.Qwen2Config(**TEXT, **ids(words)).to_dict(),
        image_token_index=words.image_token_id,
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = read_class("llava_onevision")(
        images("llava_onevision", size={"height": SIZE, "width": SIZE}, image_grid_pinpoints=pinpoints),
        words,
        num_image_tokens=(SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>"),
    )
    return built(hf.LlavaOnevisionForConditionalGeneration, config, processor)


QWEN = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "video": "<|video_pad|>"}
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen_words() -> tuple[hf.PreTrainedTokenizerFast, dict[str, int]]:
    words = tokenizer(*QWEN.values(), names={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"})
    tokens = {f"{name}_token_id": words.convert_tokens_to_ids(word) for name, word in QWEN.items()}
    return words, {**tokens, "image_token_id": words.image_token_id}


def _qwen_images(patch: int) -> Any:
    return images("qwen2_vl", patch_size=patch, min_pixels=32 * 32, max_pixels=64 * 64)


def qwen2_vl() -> Built:
    words, tokens = _qwen_words()
    rope = {"rope_parameters": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, **ids(words), **rope},
        vision_config={"depth": 2, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "patch_size": 8},
        **tokens,
    )
    processor = read_class("qwen2_vl")(_qwen_images(8), words, chat_template=chat_template(QWEN_PICTURE))
    return built(hf.Qwen2VLForConditionalGeneration, config, processor)


def qwen2_5_vl() -> Built:
    words, tokens = _qwen_words()
    rope = {"rope_parameters": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 32,
    }
    config = hf.Qwen2_5_VLConfig(text_config={**TEXT, **ids(words), **rope}, vision_config=vision, **tokens)
    processor = read_class("qwen2_5_vl")(_qwen_images(8), words, chat_template=chat_template(QWEN_PICTURE))
    return built(hf.Qwen2_5_VLForConditionalGeneration, config, processor)


def qwen3_vl() -> Built:
    words, tokens = _qwen_words()
    rope = {
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
        "head_dim": 8,
    }
    vision = {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = hf.Qwen3VLConfig(text_config={**TEXT, **ids(words), **rope}, vision_config=vision, **tokens)
    processor = read_class("qwen3_vl")(_qwen_images(8), words, chat_template=chat_template(QWEN_PICTURE))
    return built(hf.Qwen3VLForConditionalGeneration, config, processor)


def glm4v() -> Built:
    marks = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
    words = tokenizer(*marks, names={"image_token": "<|image|>", "video_token": "<|video|>"})
    start, end, video_start, video_end = words.convert_tokens_to_ids(list(marks))
    rope = {
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        }
    }
    vision = {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 32,
        "image_size": 64,
    }
    config = hf.Glm4vConfig(
        text_config={**TEXT, **ids(words), **rope},
        vision_config=vision,
        image_token_id=words.image_token_id,
        video_token_id=words.video_token_id,
        image_start_token_id=start,
        image_end_token_id=end,
        video_start_token_id=video_start,
        video_end_token_id=video_end,
    )
    pictures = images("glm4v", patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64 * 2})
    template = chat_template("<|begin_of_image|><|image|><|end_of_image|>")
    processor = read_class("glm4v")(pictures, words, chat_template=template)
    return built(hf.Glm4vForConditionalGeneration, config, processor)


def gemma3() -> Built:
    names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image_soft_token>"}
    words = tokenizer(names=names)
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(
            **TEXT, **ids(words), head_dim=8, sliding_window=16, query_pre_attn_scalar=8
        ).to_dict(),
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
        mm_tokens_per_image=4,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
    )
    processor = hf.Gemma3Processor(
        images("gemma3", size={"height": SIZE, "width": SIZE}),
        words,
        image_seq_length=4,
        chat_template=chat_template("<boi>"),
    )
    return built(hf.Gemma3ForConditionalGeneration, config, processor)


def paligemma() -> Built:
    words = tokenizer(names={"image_token": "<image>"})
    pictures = images("paligemma", size={"height": SIZE, "width": SIZE})
    pictures.image_seq_length = (SIZE // PATCH) ** 2
    processor = hf.PaliGemmaProcessor(pictures, words)
    config = hf.PaliGemmaConfig(
        text_config=hf.GemmaConfig(**TEXT, **ids(words), head_dim=8).to_dict(),
        vision_config=hf.SiglipVisionConfig(**VISION, projection_dim=32, vision_use_head=False).to_dict(),
        image_token_index=words.image_token_id,
        projection_dim=32,
    )
    return built(hf.PaliGemmaForConditionalGeneration, config, processor)


IDEFICS_MARKS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def _idefics_words() -> hf.PreTrainedTokenizerFast:
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    return tokenizer(*IDEFICS_MARKS, *tiles, names={"image_token": "<image>"})


def idefics3() -> Built:
    words = _idefics_words()
    config = hf.Idefics3Config(
        text_config=hf.LlamaConfig(**TEXT, **ids(words)).to_dict(),
        vision_config={**VISION},
        image_token_id=words.image_token_id,
        scale_factor=2,
    )
    pictures = images("idefics3", size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE})
    processor = hf.Idefics3Processor(pictures, words, image_seq_len=1, chat_template=chat_template("<image>"))
    return built(hf.Idefics3ForConditionalGeneration, config, processor)


def smolvlm() -> Built:
    # A package for the number of a video's frames in words; the processor will not start without it.
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    words = _idefics_words()
    config = hf.SmolVLMConfig(
        text_config=hf.LlamaConfig(**TEXT, **ids(words)).to_dict(),
        vision_config={**VISION},
        image_token_id=words.image_token_id,
        scale_factor=2,
    )
    pictures = images("smolvlm", size={"longest_edge": 2 * SIZE}, max_image_size={"longest_edge": SIZE})
    processor = read_class("smolvlm")(
        pictures, words, None, image_seq_len=1, chat_template=chat_template("<image>")
    )
    return built(hf.SmolVLMForConditionalGeneration, config, processor)


def internvl() -> Built:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(names=names)
    vision = {**VISION, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH]}
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**TEXT, **ids(words)).to_dict(),
        vision_config=vision,
        image_token_id=words.context_image_token_id,
        image_seq_length=1,
        downsample_ratio=0.5,
    )
    pictures = images("internvl", size={"height": SIZE, "width": SIZE}, crop_to_patches=True, max_patches=2)
    processor = read_class("internvl")(
        pictures, words, image_seq_length=1, chat_template=chat_template("<IMG_CONTEXT>\n")
    )
    return built(hf.InternVLForConditionalGeneration, config, processor)


def aya_vision() -> Built:
    marks = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL")
    tiles = [f"TILE_{number}" for number in range(1, 13)]
    words = tokenizer(*marks, *tiles, "<image>", names={"image_token": "<|IMG_PATCH|>"})
    config = hf.AyaVisionConfig(
        text_config=hf.Cohere2Config(**TEXT, **ids(words), sliding_window=16, head_dim=8).to_dict(),
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
        image_token_index=words.image_token_id,
        downsample_factor=2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    pictures = images("aya_vision", size={"height": SIZE, "width": SIZE}, crop_to_patches=True, max_patches=2)
    processor = hf.AyaVisionProcessor(
        pictures,
        words,
        patch_size=PATCH,
        img_size=SIZE,
        downsample_factor=2,
        chat_template=chat_template("<image>"),
    )
    return built(hf.AyaVisionForConditionalGeneration, config, processor)


def _pixtral_processor() -> Any:
    """The processor class of Mistral 3; the module it takes a function from asks for torchvision."""
    if not is_torchvision_available():
        name = "transformers.models.pixtral.image_processing_pixtral"
        sys.modules.setdefault(name, image_processing_pil_pixtral)
    return processors.processor_class("mistral3")


def mistral3() -> Built:
    words = tokenizer("[IMG_BREAK]", "[IMG_END]", names={"image_token": "[IMG]"})
    vision = {key: value for key, value in VISION.items() if key != "image_size"}
    config = hf.Mistral3Config(
        text_config=hf.MistralConfig(**TEXT, **ids(words), head_dim=8).to_dict(),
        vision_config=hf.PixtralVisionConfig(**vision, image_size=64, head_dim=12).to_dict(),
        image_token_index=words.image_token_id,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    pictures = images("mistral3", size={"longest_edge": 64}, patch_size=PATCH)
    processor = _pixtral_processor()(
        pictures, words, patch_size=PATCH, spatial_merge_size=2, chat_template=chat_template("[IMG]")
    )
    return built(hf.Mistral3ForConditionalGeneration, config, processor)


def mllama() -> Built:
    words = tokenizer("<|python_tag|>", names={"image_token": "<|image|>"})
    text = {
        **TEXT,
        **ids(words),
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "image_size": SIZE,
        "patch_size": PATCH,
        "vision_output_dim": 72,
        "intermediate_layers_indices": [0, 1],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        "max_num_tiles": 2,
    }
    config = hf.MllamaConfig(
        text_config=hf.models.mllama.MllamaTextConfig(**text).to_dict(),
        vision_config=hf.models.mllama.MllamaVisionConfig(**vision).to_dict(),
        image_token_index=words.image_token_id,
    )
    pictures = images("mllama", size={"height": SIZE, "width": SIZE}, max_image_tiles=2)
    processor = hf.MllamaProcessor(pictures, words, chat_template=chat_template("<|image|>"))
    return built(hf.MllamaForConditionalGeneration, config, processor)


def phi4_multimodal() -> Built:
    """Text only: the family's image processor exists for torchvision alone."""
    words = tokenizer("<image>", "<audio>")
    image, audio = words.convert_tokens_to_ids(["<image>", "<audio>"])
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
        "image_token_id": image,
        "crop_size": SIZE,
        "feature_layer": -1,
    }
    hearing = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "nemo_conv_channels": 16,
        "audio_token_id": audio,
    }
    config = hf.Phi4MultimodalConfig(
        **TEXT,
        **ids(words),
        vision_config=hf.Phi4MultimodalVisionConfig(**vision),
        audio_config=hf.Phi4MultimodalAudioConfig(**hearing),
    )
    return built(hf.Phi4MultimodalForCausalLM, config, words)


VLMS: dict[str, Callable[[], Built]] = {
    build.__name__: build
    for build in (
        *(llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, gemma3, paligemma),
        *(idefics3, smolvlm, internvl, mistral3, aya_vision, glm4v, mllama, phi4_multimodal),
    )
}


def _text_only(name: str, config_class: Any, model_class: Any, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        words = tokenizer()
        config = config_class(**{**TEXT, **ids(words), **options})
        return built(model_class, config, words)

    build.__name__ = name
    return build


def gpt2() -> Built:
    words = tokenizer()
    config = hf.GPT2Config(
        n_embd=32, n_layer=3, n_head=4, n_positions=512, initializer_range=0.2, **ids(words)
    )
    return built(hf.GPT2LMHeadModel, config, words)


LLMS: dict[str, Callable[[], Built]] = {
    "llama": _text_only("llama", hf.LlamaConfig, hf.LlamaForCausalLM),
    "qwen3": _text_only("qwen3", hf.Qwen3Config, hf.Qwen3ForCausalLM, head_dim=8),
    "gemma3_text": _text_only(
        "gemma3_text", hf.Gemma3TextConfig, hf.Gemma3ForCausalLM, head_dim=8, sliding_window=16
    ),
    "mistral": _text_only("mistral", hf.MistralConfig, hf.MistralForCausalLM, head_dim=8),
    "gpt2": gpt2,
}
BUILDERS = {**VLMS, **LLMS}


def save(family: str, folder: Path) -> Path:
    """Write one family as a checkpoint folder, as a user would find it on disk."""
    model, processor = BUILDERS[family]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
