"""The plan at full size counts what torch counts, and the document holds what the plan says."""

from pathlib import Path

import bench_gpu
import pytest
import scale_plan
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"


def test_the_plan_counts_the_weights_of_the_real_shape():
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **bench_gpu.VISION},
        text_config={"model_type": "llama", **bench_gpu.TEXT},
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    real = sum(parameter.numel() for parameter in model.parameters())
    assert scale_plan.SHAPES["7B"].weights == pytest.approx(real, rel=0.01)


def test_the_plan_counts_the_flops_that_torch_counts():
    text = LlamaConfig(**{**bench_gpu.SMALL_TEXT, "hidden_size": 128, "intermediate_size": 320})
    text.num_key_value_heads = 2
    text._attn_implementation = "eager"  # torch counts matrix products, not fused attention
    model = LlamaForCausalLM(text).eval()
    shape = scale_plan.Shape("", 3, 128, 320, 4, 2, text.vocab_size)
    ids = torch.randint(5, 60, (1, 96))
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(ids, use_cache=False)
    ours = shape.prompt_flops(96, picture=False, head=96)
    assert ours == pytest.approx(counted.get_total_flops(), rel=0.03)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with FlopCounterMode(display=False) as step:
            model(ids[:, :1], past_key_values=cache)
    assert shape.step_flops(97) == pytest.approx(step.get_total_flops(), rel=0.03)


def test_twice_the_prompts_cost_twice_and_more_cards_no_less():
    shape, card, study = scale_plan.SHAPES["7B"], scale_plan.Card(), scale_plan.Study()
    once = scale_plan.plan(shape, study, card, 1)
    twice = scale_plan.plan(shape, scale_plan.replace(study, prompts=2000), card, 1)
    torch.testing.assert_close(torch.tensor(twice["hours"]), 2 * torch.tensor(once["hours"]))
    with pytest.raises(SystemExit, match="does not fit"):
        scale_plan.plan(scale_plan.SHAPES["70B"], study, card, 1)


def test_numbers_of_a_toy_run_do_not_become_a_plan(tmp_path):
    (tmp_path / "gpu.json").write_text('{"small": true}')
    with pytest.raises(SystemExit, match="toy size"):
        scale_plan.with_measured(scale_plan.Card(), tmp_path / "gpu.json")


def test_the_document_holds_the_tables_of_the_plan():
    assert scale_plan.render(scale_plan.Study(), scale_plan.Card()) in DOCUMENT.read_text()


def test_the_script_for_a_card_runs_at_toy_size(tmp_path, monkeypatch, capsys):
    words = f"bench_gpu --small --prompts 8 --batch 8 --tokens 2 --rounds 1 --out {tmp_path / 'gpu.json'}"
    monkeypatch.setattr("sys.argv", words.split())
    bench_gpu.main()
    found = capsys.readouterr().out
    assert "collect, last token of all layers / decoder alone" in found
    assert '"small": true' in (tmp_path / "gpu.json").read_text()
