"""Families: the committed table is what a run gives, and the exact shape of LLaVA-1.5-7B is read right."""

import families_table
import pandas as pd
import pytest
import tiny_families
import torch
import transformers as hf
from transformers.utils import is_torchvision_available

import mechguard as mg
from mechguard.families import FAMILIES, read_parts, tested_families


@pytest.mark.parametrize("family", list(tiny_families.BUILDERS))
def test_the_table_of_families_is_what_a_run_gives(family, tmp_path):
    committed = tested_families().set_index("family").loc[family]
    found = pd.Series(families_table.try_family(family, tmp_path)).drop("family")
    if is_torchvision_available() and family in families_table.NEEDS_TORCHVISION:
        pytest.skip("the table was made without torchvision")
    assert found.to_dict() == committed.to_dict()


def test_the_table_has_every_family_that_was_built():
    assert list(tested_families()["family"]) == list(tiny_families.BUILDERS)


@pytest.mark.parametrize("family", ["llava", "gemma3", "glm4v", "qwen2_5_vl", "gpt2", "idefics3"])
def test_attention_and_mlp_add_up_to_what_a_layer_does(family):
    model, processor = tiny_families.BUILDERS[family]()
    vlm = mg.load(model, processor=processor)
    _, cache = vlm.run_with_cache(["how to make a cake", "show me a kite please"])
    for layer in range(vlm.n_layers):
        change = cache["resid_post", layer] - cache["resid_pre", layer]
        added = cache["attn_out", layer] + cache["mlp_out", layer]
        assert torch.allclose(change[cache.present], added[cache.present], atol=1e-4), layer


def llava_7b() -> hf.LlavaForConditionalGeneration:
    """The shape of llava-hf/llava-1.5-7b-hf, without its weights."""
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
            vocab_size=32000,
        ).to_dict(),
        text_config=hf.LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            vocab_size=32064,
            max_position_embeddings=4096,
        ).to_dict(),
        image_token_index=32000,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    with torch.device("meta"):
        return hf.LlavaForConditionalGeneration(config).eval()


def llava_7b_processor() -> hf.LlavaProcessor:
    """Its processor settings, with a toy vocabulary whose image token has the right number."""
    words = tiny_families.tokenizer(
        *(f"<filler{number}>" for number in range(32000 - 4)), names={"image_token": "<image>"}
    )
    assert words.image_token_id == 32000
    return hf.LlavaProcessor(
        tiny_families.images("llava", size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tiny_families.chat_template("<image>"),
    )


def test_the_shape_of_llava_7b_is_read_right():
    vlm = mg.load(llava_7b(), processor=llava_7b_processor())
    assert (vlm.n_layers, vlm.d_model, vlm.family) == (32, 4096, "llava")
    assert vlm.picture_size == (336, 336)
    assert (vlm.llm.n_layers, vlm.llm.d_model) == (32, 4096)
    assert vlm.parts.vision_layers == "model.vision_tower.encoder.layers"
    prompts = mg.Prompts([mg.Prompt("0", "how to make a cake")]).with_image("blank")
    (spans,) = vlm.image_spans(list(prompts))
    assert [(span.start, span.stop) for span in spans] == [(3, 579)]  # behind "<s>", "user", ":"
    encoded = vlm.encode(list(prompts))
    assert vlm.image_positions(encoded).sum() == 576
    assert len([name for name in vlm.hook_names() if name.endswith("hook_resid_post")]) == 32 + 24


def test_a_model_without_decoder_layers_is_refused():
    with pytest.raises(ValueError, match=r"no decoder layers were found in Linear; wanted a Hugging Face"):
        read_parts(torch.nn.Linear(2, 2))


def test_only_this_room_knows_the_names_of_families():
    package = FAMILIES.keys()
    rooms = [path for path in families_table.TESTED.parent.glob("*.py") if path.stem != "families"]
    for path in rooms:
        code = path.read_text()
        assert not [name for name in package if f'"{name}"' in code], path
