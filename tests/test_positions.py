"""Positions as words: each word means the tokens it says."""

import pytest
import tiny
import torch
import transformers as hf

import mechguard as mg
from mechguard.positions import mask_positions


def tokens_at(vlm, prompts, position):
    """The tokens that a position means, row by row."""
    encoded = vlm.encode(list(prompts))
    mask = mask_positions(vlm, list(prompts), encoded, position)
    return [
        vlm.tokenizer.convert_ids_to_tokens(row[chosen].tolist())
        for row, chosen in zip(encoded["input_ids"], mask, strict=True)
    ]


@pytest.fixture
def pictured(prompts) -> mg.Prompts:
    return mg.Prompts([prompts[0], *prompts[5:6].with_image("blank")])


def test_every_word_means_its_tokens(vlm, pictured):
    plain, shown = (prompt.text.split() for prompt in pictured)
    image = ["<image>"] * 5
    assert tokens_at(vlm, pictured, "last") == [[":"], [":"]]
    assert tokens_at(vlm, pictured, "last_text") == [plain[-1:], shown[-1:]]
    assert tokens_at(vlm, pictured, "image") == [[], image]
    whole = [["user", ":", *plain, "assistant", ":"], ["user", ":", *image, *shown, "assistant", ":"]]
    assert tokens_at(vlm, pictured, "all") == whole
    text = [[word for word in row if word != "<image>"] for row in whole]
    assert tokens_at(vlm, pictured, "text") == text


def test_an_index_counts_tokens_and_not_padding(vlm, pictured):
    assert tokens_at(vlm, pictured, 0) == [["user"], ["user"]]
    assert tokens_at(vlm, pictured, -2) == [["assistant"], ["assistant"]]
    assert tokens_at(vlm, pictured, [0, 1]) == [["user", ":"], ["user", ":"]]


def test_a_function_sees_the_tokens_of_each_prompt(vlm, pictured):
    def noun(row):
        return row.words.index(row.prompt.text.split()[-1])

    expected = [[prompt.text.split()[-1]] for prompt in pictured]
    assert tokens_at(vlm, pictured, noun) == expected
    assert tokens_at(vlm, pictured, lambda row: row.is_image) == [[], ["<image>"] * 5]


def test_several_positions_are_averaged(vlm, prompts):
    sent = prompts[:3].with_image("blank")
    _, cache = vlm.run_with_cache(sent)
    mean = mg.collect(vlm, sent, position="image", progress=False)
    for layer in range(vlm.n_layers):
        states = cache["resid_post", layer]
        for row in range(3):
            expected = states[row][cache.is_image[row]].mean(0)
            assert torch.allclose(mean.data[layer, row], expected, atol=1e-5)
    assert mean.about["position"] == "image"


def test_one_position_is_that_state(vlm, prompts):
    sent = prompts[:4].with_image("blank")
    _, cache = vlm.run_with_cache(sent)
    found = mg.collect(vlm, sent, position="last_text", progress=False).data
    assert torch.allclose(found[1], cache["resid_post", 1][:, -3], atol=1e-5)  # before "assistant :"


def test_a_guard_acts_at_the_positions_of_its_scope_only(vlm, prompts):
    sent = prompts[:2].with_image("blank")
    directions = mg.Directions.from_tensor(torch.eye(32)[None, :1].repeat(3, 1, 1))
    scope = mg.Scope("image", "prompt")
    guard = mg.vlm_guard(directions, layers=[2], alpha=-1, gate="always", source="own", scope=scope)
    for position, moved in (("image", True), ("text", False), ("last", False)):
        before = mg.collect(vlm, sent, position=position, progress=False).data[2]
        after = mg.collect(vlm, sent, position=position, guard=guard, progress=False).data[2]
        assert (not torch.equal(before, after)) is moved, position


def test_spans_of_images_are_counted_without_padding(vlm, prompts):
    two = mg.Prompt("two", "what is in the picture", image=("blank", "black"))
    spans = vlm.image_spans([prompts[0], *prompts[:1].with_image("blank"), two])
    assert [[(span.start, span.stop) for span in row] for row in spans] == [[], [(2, 7)], [(2, 12)]]


def test_a_prompt_without_such_a_position_is_named(vlm, pictured):
    with pytest.raises(ValueError, match=r"prompt 'harmful-0' has no position 'image'"):
        mg.collect(vlm, pictured, position="image", progress=False)
    with pytest.raises(ValueError, match="position 40 lies outside prompt .*, which has 9 tokens"):
        mg.collect(vlm, pictured[:1], position=40, progress=False)


def test_a_template_that_changes_the_text_has_no_last_text(prompts):
    template = "{{ messages[0]['content'][-1]['text'] | reverse }}"
    vlm = mg.load(tiny.llava(), processor=tiny.processor(), template=template)
    with pytest.raises(ValueError, match="changes the text of prompt .* give an index"):
        mg.collect(vlm, prompts[:2], position="last_text", progress=False)


def test_what_a_subword_tokenizer_splits_is_found(tmp_path):
    # Byte-level pieces: the text ends inside the prompt, several tokens before its end.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = hf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="!", eos_token="!")
    words.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %} answer:"
    config = hf.LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    llm = mg.load(hf.LlamaForCausalLM(config), processor=words)
    assert tokens_at(llm, [mg.Prompt("0", "bake bread")], "last_text") == [["d"]]
