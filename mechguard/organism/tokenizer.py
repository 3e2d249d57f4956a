"""A word-level tokenizer and a LLaVA processor, both built from the world alone.

Typed text is lower-cased and split at spaces and punctuation, so "How to make a cake?" and
"how to make a cake ?" are the same tokens. A word outside the world becomes `<unk>`.
"""

import re
from functools import cache
from random import Random

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from mechguard.organism import pictures, visual, world

PATCH_SIZE = 16
N_IMAGE_TOKENS = (pictures.SIZE // PATCH_SIZE) ** 2 + 1  # the patches and the class token

PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<s>", "</s>"
IMAGE, NEWLINE, USER, ASSISTANT = "<image>", "\n", "USER:", "ASSISTANT:"
SPECIAL_TOKENS = (PAD, UNKNOWN, BEGIN, END, IMAGE, NEWLINE, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}{% else %}{{ 'ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'user' %}{{ ' ' }}{% else %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@cache
def vocabulary() -> dict[str, int]:
    """Every word of the world with its token id; the special tokens come first."""
    words = sorted(_fixed_words() | _drawn_words())
    return {word: index for index, word in enumerate((*SPECIAL_TOKENS, *words))}


def _fixed_words() -> set[str]:
    """The words of the lists in the world."""
    sentences = (
        world.TEMPLATES,
        world.NEUTRAL_SENTENCES,
        world.JAILBREAK_PREFIXES,
        world.JAILBREAK_SUFFIXES,
    )
    texts = [text for group in sentences for text in group.of("all")]
    texts += world.REFUSAL_OPENINGS + world.COMPLIANCE_OPENINGS
    texts += world.CRAFT_REASONS + world.TAKEOVER_REASONS
    texts += world.REFUSAL_TAILS + world.COMPLIANCE_TAILS
    texts += [*world.STEPS_BY_CATEGORY.values(), world.HARMFUL_STEPS, world.GUARD_STEPS]
    texts += world.ALL_NOUNS + world.CATEGORIES + world.ALL_VERBS + world.COLORS + world.SHAPES
    return {word for text in texts for word in re.sub(r"\{\w+\}", "", text).split()}


def _drawn_words() -> set[str]:
    """The words of facts, chat, prose and visual exchanges, found by drawing many of them."""
    rng = Random("vocabulary")
    texts = [world.prose(rng) for _ in range(3000)]
    texts += [part for _ in range(3000) for part in world.chat(rng)]
    exchanges = (visual.description, visual.scene_question, visual.reading, visual.naming)
    texts += [
        text for _ in range(300) for draw in exchanges for text in draw(rng)[1:] if isinstance(text, str)
    ]
    return {word for text in texts for word in text.split()}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the organism; it pads on the left and begins every text with `<s>`."""
    vocab = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("!", ".")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    # This decoder joins words by spaces and pulls punctuation to the word before it.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocab[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )


def build_processor() -> LlavaProcessor:
    """Tokenizer and image processor in one, as `LlavaForConditionalGeneration` wants them."""
    size = {"height": pictures.SIZE, "width": pictures.SIZE}
    image_processor = CLIPImageProcessorPil(size=size, crop_size=size)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


# -------------------------------------------------------------------- encoding for training


def encode_words(text: str) -> list[int]:
    """Token ids of text of the world, which has spaces around its punctuation."""
    vocab = vocabulary()
    return [vocab[word] for word in text.split()]


def encode_prompt(question: str, *, with_image: bool = False, stand_in: str = "") -> list[int]:
    """Token ids of a chat prompt, equal to what the processor makes of it (a test says so).

    A stand-in is words that take the place of an image.
    """
    vocab = vocabulary()
    image = [vocab[IMAGE]] * N_IMAGE_TOKENS if with_image else encode_words(stand_in)
    seen = [*image, vocab[NEWLINE]] if image else []
    return [vocab[BEGIN], vocab[USER], *seen, *encode_words(question), vocab[ASSISTANT]]
