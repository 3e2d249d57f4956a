"""Public benchmarks: as their authors lay them out, as a collection does, and what can go wrong.

No text of a benchmark stands here: the files that these tests write have upstream's shape and neutral words.
Where the public data itself is at hand (MECHGUARD_DATA), its row counts are those of its manifest.
"""

import csv
import json
import os
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image

import mechguard as mg
from mechguard import cli
from mechguard.datasets import (
    BENCHMARKS,
    ROLES,
    TEMPLATES,
    DataWarning,
    apply_templates,
    find_overlaps,
    list_benchmarks,
    load_templates,
)
from mechguard.prompts import FIGSTEP_TEXT

PUBLIC = Path(os.environ.get("MECHGUARD_DATA", "no public data here"))
needs_manifest = pytest.mark.skipif(
    not (PUBLIC / "manifest.csv").is_file(), reason="no public data with a manifest; set MECHGUARD_DATA"
)


def table(columns: str, *rows: str) -> str:
    return "\n".join([columns, *rows]) + "\n"


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


ADVBENCH = "advbench/harmful_behaviors.csv"
TWO = "How do I fold a map?\nHow do I fold a shirt?\n"
BEHAVIOURS = table(
    "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID",
    "Fold the map,standard,paper,,,map",
    'Fold it,contextual,cloth,context,"A shirt, blue.",shirt',
)
SPLIT = json.dumps(
    [{"instruction": "Fold a map", "category": None}, {"instruction": "Fold it", "category": "x"}]
)
SAFEBENCH = table(
    "dataset,category_id,task_id,category_name,question,instruction",
    "ForbidQI,1,1,Paper,How do I fold a map?,Steps to fold a map.",
    "ForbidQI,1,2,Paper,How do I fold a hat?,Steps to fold a hat.",
)
FORBIDDEN = table("category,source,forbidden_prompt", "Paper,custom,Fold a map", "Cloth,custom,Fold a shirt")
QUESTION = {"Question": "{}?", "Rephrased Question": "See below: {}.", "Rephrased Question(SD)": "See: {}."}


def scenario(*words: str) -> dict:
    return {str(i): {k: v.format(word) for k, v in QUESTION.items()} for i, word in enumerate(words)}


SCENARIOS = {
    "data/processed_questions/01-Paper.json": json.dumps(scenario("map", "hat", "kite")),
    "data/processed_questions/02-Cloth.json": json.dumps(scenario("shirt")),
}
IDS = {
    "TinyVersion_ID_List.json": json.dumps(
        [
            {"Scenario": "01-Paper", "Sampled_ID_List": [0, 2]},
            {"Scenario": "02-Cloth", "Sampled_ID_List": [0]},
        ]
    )
}
ASTRA = {
    "datasets/MM-SafetyBench/mmsafety_test.json": json.dumps(
        {"01-Paper#2": scenario("kite")["0"], "02-Cloth#0": scenario("shirt")["0"]}
    )
}
ALPACA = json.dumps(
    [
        {"instruction": "Fold it", "input": "a map", "output": "."},
        {"instruction": "Sing", "input": "", "output": "."},
    ]
)
SEED_TASK = {"id": "seed_task_0", "name": "folding", "instruction": "Fold it", "is_classification": False}
SEED_TASK["instances"] = [{"input": "a map", "output": "."}]
VISUAL = {"question_id": 0, "image": "001.jpg", "text": "What is this?", "category": "conv"}
QUESTIONS = {"data/test/harmful_questions.json": json.dumps([{"id": 7, "question": "How do I fold a map?"}])}
MARK = "[INSERT PROMPT HERE]"
FAMILIES = ("one", "two", "three", "four", "five", "six")
JAILBREAKS = {
    "data/test/jailbreak_templates.json": json.dumps(
        {family: [{"id": 0, "prompt": f"{family}: {MARK}"}, {"id": 1, "prompt": MARK}] for family in FAMILIES}
        | {"coded": [{"id": 0, "base64": True, "replace": 0, "prompt": MARK}]}
    )
}
# name -> (files as upstream lays them out, harmful, harmless)
UPSTREAM: dict[str, tuple[dict[str, str], int, int]] = {
    "anchors_howto": ({"code/data/custom.txt": TWO, "code/data_harmless/custom.txt": TWO.lower()}, 2, 2),
    "anchors_howto_testset": ({"code/data_harmless/testset.txt": TWO}, 0, 2),
    "malicious_instruct": ({"data/MaliciousInstruct.txt": TWO.rstrip()}, 2, 0),
    "jailbreakbench": (
        {
            "data/harmful-behaviors.csv": table(
                "Index,Goal,Target,Behavior,Category,Source", "0,Fold,S,B,C,O"
            ),
            "data/benign-behaviors.csv": table(
                "Index,Goal,Target,Behavior,Category,Source", "0,Iron,S,B,C,O"
            ),
        },
        1,
        1,
    ),
    "advbench": (
        {"data/advbench/harmful_behaviors.csv": table("goal,target", 'Fold a map,"Sure, so"')},
        1,
        0,
    ),
    "harmbench": ({"data/behavior_datasets/harmbench_behaviors_text_all.csv": BEHAVIOURS}, 2, 0),
    "harmbench_test": ({"data/behavior_datasets/harmbench_behaviors_text_test.csv": BEHAVIOURS}, 2, 0),
    "harmbench_val": ({"data/behavior_datasets/harmbench_behaviors_text_val.csv": BEHAVIOURS}, 2, 0),
    **{
        f"refusal_direction_{kind}_{part}": (
            {f"dataset/splits/{kind}_{part}.json": SPLIT},
            2 * (kind == "harmful"),
            2 * (kind == "harmless"),
        )
        for kind in ("harmful", "harmless")
        for part in ("train", "val", "test")
    },
    "strongreject": ({"strongreject_dataset/strongreject_dataset.csv": FORBIDDEN}, 2, 0),
    "strongreject_small": ({"strongreject_dataset/strongreject_small_dataset.csv": FORBIDDEN}, 2, 0),
    "xstest": (
        {
            "xstest_prompts.csv": table(
                "id,prompt,type,label,focus,note",
                "1,How do I fold a map?,homonyms,safe,fold,",
                "2,How do I fold a hat?,homonyms,safe,fold,",
                "3,How do I fold a kite?,contrast_homonyms,unsafe,fold,",
            )
        },
        1,
        2,
    ),
    "figstep": ({"data/question/safebench.csv": SAFEBENCH.rstrip()}, 2, 0),
    "figstep_text": ({"data/question/safebench.csv": SAFEBENCH}, 2, 0),
    "figstep_tiny": ({"data/question/SafeBench-Tiny.csv": SAFEBENCH}, 2, 0),
    "figstep_tiny_text": ({"data/question/SafeBench-Tiny.csv": SAFEBENCH.replace("\n", "\r\n")}, 2, 0),
    "figstep_benign": (
        {
            "data/question/benign_sentences_without_harmful_phase.csv": table(
                "sentence", "Fold *.", "Map, *, fold."
            )
        },
        0,
        2,
    ),
    "mm_safetybench": (SCENARIOS, 4, 0),
    "mm_safetybench_typo": (SCENARIOS, 4, 0),
    "mm_safetybench_sd": (SCENARIOS, 4, 0),
    "mm_safetybench_text": (SCENARIOS, 4, 0),
    "mm_safetybench_tiny": (SCENARIOS | IDS, 3, 0),
    "mm_safetybench_tiny_text": (SCENARIOS | IDS, 3, 0),
    "mm_safetybench_astra": (ASTRA, 2, 0),
    "mm_safetybench_astra_text": (ASTRA, 2, 0),
    "mm_harmful_bench": (
        {
            "MM-HarmfulBench/questions.jsonl": lines(
                {"image_url": "http://there/map.jpg?size=2", "question": "How do I fold this?"},
                {"image_url": "http://there/hat.jpg", "question": "How do I wear this?"},
            )
        },
        2,
        0,
    ),
    "goal_priority_questions": (QUESTIONS, 1, 0),
    "jailbreak_instructions": (QUESTIONS | JAILBREAKS, 5, 0),
    "alpaca": ({"alpaca_data.json": ALPACA}, 0, 2),
    "alpaca_seed_tasks": ({"seed_tasks.jsonl": lines(SEED_TASK)}, 0, 1),
    "llava_bench_coco": ({"playground/data/coco2014_val_qa_eval/qa90_questions.jsonl": lines(VISUAL)}, 0, 1),
    "llava_bench_wild": ({"llava-bench-in-the-wild/questions.jsonl": lines(VISUAL)}, 0, 1),
    "vicuna80": (
        {"llava/eval/table/question.jsonl": lines({"question_id": 1, "text": "Why?", "category": "generic"})},
        0,
        1,
    ),
}


def write(folder: Path, files: dict[str, str]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8", newline="")
    return folder


def draw(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def quietly(name: str, data: Path) -> mg.Prompts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        return mg.load_prompts(name, data=data)


def counts(prompts: mg.Prompts) -> tuple[int, int]:
    return prompts.labels.count("harmful"), prompts.labels.count("harmless")


def test_there_is_an_upstream_layout_for_every_benchmark():
    assert set(UPSTREAM) == set(BENCHMARKS)


@pytest.mark.parametrize("checkout", [".", "checkout-main"])
@pytest.mark.parametrize("name", UPSTREAM)
def test_a_checkout_is_read_as_its_authors_lay_it_out(name, checkout, tmp_path):
    files, harmful, harmless = UPSTREAM[name]
    write(tmp_path / checkout, files)
    prompts = quietly(name, tmp_path)
    assert counts(prompts) == (harmful, harmless)
    assert prompts.name == name
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert all(prompt.text.strip() == prompt.text for prompt in prompts)


@pytest.mark.parametrize(
    ("name", "text", "category"),
    [
        ("jailbreakbench", "Fold", "C"),
        ("advbench", "Fold a map", None),
        ("strongreject", "Fold a map", "Paper"),
        ("refusal_direction_harmful_val", "Fold a map", None),
        ("xstest", "How do I fold a map?", "homonyms"),
        ("vicuna80", "Why?", "generic"),
        ("llava_bench_wild", "What is this?", "conv"),
    ],
)
def test_text_and_category_come_from_the_right_columns(name, text, category, tmp_path):
    first = quietly(name, write(tmp_path, UPSTREAM[name][0]))[0]
    assert (first.text, first.category) == (text, category)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_collection_is_read_like_a_checkout(name, tmp_path):
    """The same content under the first path of each record's own list."""
    files, harmful, harmless = UPSTREAM[name]
    record = BENCHMARKS[name]
    moved = {}
    for path, content in files.items():
        places = next(paths for paths in record.files.values() if any(Path(path).match(p) for p in paths))
        moved[places[0].replace("*", Path(path).stem)] = content
    assert set(moved) != set(files) or name in ("alpaca", "llava_bench_wild")
    assert counts(quietly(name, write(tmp_path, moved))) == (harmful, harmless)


def test_a_folder_that_is_itself_the_benchmark_is_read(tmp_path):
    files, _, harmless = UPSTREAM["llava_bench_wild"]
    write(tmp_path, files)
    assert len(quietly("llava_bench_wild", tmp_path / "llava-bench-in-the-wild")) == harmless


def test_the_first_of_several_places_is_read(tmp_path):
    write(
        tmp_path,
        {"malicious_instruct/MaliciousInstruct.txt": "first\n", "other/data/MaliciousInstruct.txt": TWO},
    )
    assert [p.text for p in mg.load_prompts("malicious", data=tmp_path)] == ["first"]


def test_columns_are_found_in_any_case(tmp_path):
    write(tmp_path, {"data/advbench/harmful_behaviors.csv": table("Target, GOAL ", "Sure,Fold a map")})
    assert [p.text for p in mg.load_prompts("advbench", data=tmp_path)] == ["Fold a map"]


@pytest.mark.parametrize(
    ("name", "path", "content", "message"),
    [
        ("advbench", ADVBENCH, "behaviour,target\na,b\n", "its columns are behaviour, target"),
        ("advbench", ADVBENCH, "goal,target\na,b\n,c\n", "row 2 of .* no text in its column 'goal'"),
        ("advbench", ADVBENCH, "", "holds no prompts"),
        ("mm_harmful_bench", "MM-HarmfulBench/questions.jsonl", "{}\n{oops", "line 2 is not JSON"),
        ("alpaca", "alpaca_data.json", "[1", "not readable JSON"),
    ],
)
def test_a_broken_benchmark_is_one_sentence(name, path, content, message, tmp_path):
    write(tmp_path, {path: content})
    with pytest.raises(mg.MechguardError, match=message) as error:
        mg.load_prompts(name, data=tmp_path)
    assert Path(path).name in str(error.value)
    assert "\n" not in str(error.value)


def test_pairs_of_unequal_number_are_refused(tmp_path):
    write(tmp_path, {"anchors_howto/harmful_custom.txt": TWO, "anchors_howto/harmless_custom.txt": "One?\n"})
    with pytest.raises(ValueError, match="there are 2 and 1 of them"):
        mg.load_prompts("anchors", data=tmp_path)


def test_a_benchmark_that_is_not_there_says_where_to_get_it(tmp_path):
    write(tmp_path, UPSTREAM["vicuna80"][0])
    with pytest.raises(ValueError, match=r"strongreject_dataset.csv, from https://.*found there: vicuna80"):
        mg.load_prompts("strongreject", data=tmp_path)
    with pytest.raises(ValueError, match="use load_templates"):
        mg.load_prompts("gptfuzzer", data=tmp_path)


def test_repeated_rows_are_kept_counted_and_told_apart_by_id(tmp_path):
    write(
        tmp_path,
        {"malicious_instruct/MaliciousInstruct.txt": "Fold a map?\nfold a MAP!\nIron it?\nFold  a map\n"},
    )
    with pytest.warns(DataWarning, match="2 of the 4 prompts .* repeat an earlier one") as said:
        prompts = mg.load_prompts("malicious", data=tmp_path)
    assert len(said) == 1
    assert said[0].filename == __file__
    assert len({prompt.id for prompt in prompts}) == 4


# The pictures


def test_figstep_prompts_carry_their_own_picture_and_its_instruction(tmp_path):
    write(tmp_path, UPSTREAM["figstep_tiny"][0])
    folder = tmp_path / "data/images/SafeBench-Tiny"
    for number, colour in ((1, "red"), (2, "blue")):
        draw(folder / f"query_ForbidQI_1_{number}_6.png", colour)
    prompts = mg.load_prompts("figstep_tiny", data=tmp_path).with_image("image")
    assert {prompt.text for prompt in prompts} == {FIGSTEP_TEXT}
    assert [prompt.own_image.name for prompt in prompts] == [f"query_ForbidQI_1_{n}_6.png" for n in (1, 2)]
    assert prompts[1].category == "Paper"
    assert [p.text for p in mg.load_prompts("figstep_tiny_text", data=tmp_path)] == [
        "How do I fold a map?",
        "How do I fold a hat?",
    ]


def test_mm_safetybench_takes_text_and_picture_of_one_kind(tmp_path):
    write(tmp_path, SCENARIOS | IDS)
    for kind in ("SD", "TYPO", "SD_TYPO"):
        for place in ("01-Paper/{}/0", "01-Paper/{}/1", "01-Paper/{}/2", "02-Cloth/{}/0"):
            draw(tmp_path / f"data/imgs/{place.format(kind)}.jpg")
    for name, kind, text in (
        ("mm_safetybench", "SD_TYPO", "See below: kite."),
        ("mm_safetybench_typo", "TYPO", "See below: kite."),
        ("mm_safetybench_sd", "SD", "See: kite."),
    ):
        prompts = mg.load_prompts(name, data=tmp_path).with_image("image")
        assert prompts[2].own_image == tmp_path / f"data/imgs/01-Paper/{kind}/2.jpg"
        assert (prompts[2].text, prompts[2].category) == (text, "01-Paper")
        assert prompts[3].own_image == tmp_path / f"data/imgs/02-Cloth/{kind}/0.jpg"
    assert mg.load_prompts("mm_safetybench_text", data=tmp_path)[2].text == "kite?"
    tiny = mg.load_prompts("mm_safetybench_tiny", data=tmp_path)
    assert [prompt.text for prompt in tiny] == ["See below: map.", "See below: kite.", "See below: shirt."]
    write(tmp_path, ASTRA)
    astra = mg.load_prompts("mm_safetybench_astra", data=tmp_path)
    assert [p.own_image.relative_to(tmp_path / "data/imgs").as_posix() for p in astra] == [
        "01-Paper/SD_TYPO/2.jpg",
        "02-Cloth/SD_TYPO/0.jpg",
    ]


def test_a_sample_that_names_questions_that_are_not_there_is_refused(tmp_path):
    first = dict([next(iter(SCENARIOS.items()))])
    with pytest.raises(ValueError, match="names 3 questions, but 2 of them are in"):
        mg.load_prompts("mm_safetybench_tiny_text", data=write(tmp_path, first | IDS))


def test_pictures_may_lie_in_a_checkout_of_their_own(tmp_path):
    write(tmp_path / "ASTRA", ASTRA)
    for place in ("01-Paper/SD_TYPO/2", "02-Cloth/SD_TYPO/0"):
        draw(tmp_path / f"MM-SafetyBench/data/imgs/{place}.jpg")
    prompts = mg.load_prompts("mm_safetybench_astra", data=tmp_path)
    assert prompts[1].own_image == tmp_path / "MM-SafetyBench/data/imgs/02-Cloth/SD_TYPO/0.jpg"


@pytest.mark.parametrize(
    "names", [("1.jpg", "2.jpg"), ("0.png", "1.png"), ("map.jpg", "hat.jpg"), ("001.jpg", "002.jpg")]
)
def test_pictures_are_found_by_number_from_either_end_and_by_name(names, tmp_path):
    write(tmp_path, UPSTREAM["mm_harmful_bench"][0])
    for name in names:
        draw(tmp_path / "MM-HarmfulBench/images" / name)
    prompts = mg.load_prompts("mm_harmful_bench", data=tmp_path)
    assert [prompt.own_image.name for prompt in prompts] == list(names)


def test_coco_pictures_are_found_under_either_name(tmp_path):
    write(tmp_path, UPSTREAM["llava_bench_coco"][0])
    draw(tmp_path / "coco/val2014/COCO_val2014_001.jpg")
    assert mg.load_prompts("llava_bench_coco", data=tmp_path)[0].own_image.name == "COCO_val2014_001.jpg"


def test_missing_pictures_are_one_warning_and_the_prompts_stay(tmp_path):
    write(tmp_path, UPSTREAM["mm_harmful_bench"][0])
    draw(tmp_path / "MM-HarmfulBench/images/2.jpg")
    with pytest.warns(
        DataWarning, match="1 of the 2 prompts .* have no picture .*MM-HarmfulBench/images"
    ) as said:
        prompts = mg.load_prompts("mm_harmful_bench", data=tmp_path)
    assert len(said) == 1
    assert [prompt.own_image is None for prompt in prompts] == [True, False]


# What is special to one benchmark


def test_a_harmbench_context_goes_before_its_behaviour(tmp_path):
    prompts = mg.load_prompts("harmbench", data=write(tmp_path, UPSTREAM["harmbench"][0]))
    assert [p.text for p in prompts] == ["Fold the map", "A shirt, blue.\n\n---\n\nFold it"]
    assert [p.category for p in prompts] == ["paper", "cloth"]


def test_an_alpaca_instruction_takes_its_input_along(tmp_path):
    write(tmp_path, UPSTREAM["alpaca"][0] | UPSTREAM["alpaca_seed_tasks"][0])
    assert [p.text for p in mg.load_prompts("alpaca", data=tmp_path)] == ["Fold it\n\na map", "Sing"]
    assert mg.load_prompts("alpaca_seed_tasks", data=tmp_path)[0].text == "Fold it\n\na map"


def test_xstest_contrasts_are_harmful_with_and_without_a_column_of_labels(tmp_path):
    old = table(
        "id_v1,id_v2,type,prompt,focus,note",
        "v1-1,v2-1,homonyms,Fold?,fold,",
        ",v2-2,contrast_homonyms,Iron?,,",
    )
    prompts = mg.load_prompts("xstest", data=write(tmp_path / "old", {"xstest_v2_prompts.csv": old}))
    assert [(p.text, p.label) for p in prompts] == [("Fold?", "harmless"), ("Iron?", "harmful")]
    new = mg.load_prompts("xstest", data=write(tmp_path / "new", UPSTREAM["xstest"][0]))
    assert [p.label for p in new] == ["harmless", "harmless", "harmful"]


def test_the_benign_role_is_the_first_hundred(tmp_path):
    rows = json.dumps([{"instruction": f"Say {number}"} for number in range(130)])
    write(tmp_path, {"alpaca_data.json": rows})
    assert len(mg.load_prompts("alpaca", data=tmp_path)) == 130
    benign = mg.load_prompts("benign", data=tmp_path)
    assert (len(benign), benign.name, benign[99].text) == (100, "benign", "Say 99")


def test_a_file_named_after_a_role_goes_before_the_benchmark(tmp_path):
    write(tmp_path, UPSTREAM["malicious_instruct"][0] | {"malicious.txt": "mine\n"})
    assert [p.text for p in mg.load_prompts("malicious", data=tmp_path)] == ["mine"]


# Templates


def test_templates_take_the_query_in_place_of_upstreams_mark_or_at_their_end(tmp_path):
    rows = [f"0,plain,Say: {MARK}!", f"1,twice,{MARK} and {MARK.lower()}", '2,none,"Say {this}, please"']
    write(tmp_path, {"data/jailbreak_prompts.csv": table(",name,prompt", *rows)})
    templates = load_templates("self_reminder", data=tmp_path)
    assert templates == ["Say: {query}!", "{query} and {query}", "Say {this}, please\n\n{query}"]
    asked = mg.Prompts([mg.Prompt("0", "why {x}?")])
    assert [asked.with_template(template)[0].text for template in templates] == [
        "Say: why {x}?!",
        "why {x}? and why {x}?",
        "Say {this}, please\n\nwhy {x}?",
    ]


def test_templates_that_want_a_code_are_left_out(tmp_path):
    templates = load_templates("goal_priority", data=write(tmp_path, JAILBREAKS))
    assert len(templates) == 2 * len(FAMILIES)


@pytest.mark.parametrize(
    ("name", "path", "columns"),
    [
        ("gptfuzzer", "datasets/prompts/GPTFuzzer.csv", "id,text"),
        ("gptfuzzer_short", "datasets/prompts/seed_short_25.csv", "text"),
        ("self_reminder_itw", "data/jailbreak_prompts_itw.csv", ",name,prompt"),
    ],
)
def test_every_set_of_templates_is_read_from_a_checkout(name, path, columns, tmp_path):
    row = ",".join(["x"] * columns.count(",") + [f"Do {MARK}"])
    write(tmp_path / "checkout", {path: table(columns, row)})
    assert load_templates(name, data=tmp_path) == ["Do {query}"]


def test_templates_that_are_unknown_or_missing_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("MECHGUARD_DATA", raising=False)
    with pytest.raises(ValueError, match="there are gptfuzzer, gptfuzzer_short"):
        load_templates("nothing", data=tmp_path)
    with pytest.raises(ValueError, match="holds no templates 'gptfuzzer'; wanted .* from https"):
        load_templates("gptfuzzer", data=tmp_path)
    with pytest.raises(ValueError, match="there is no data folder"):
        load_templates("gptfuzzer", data=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="give data=FOLDER"):
        load_templates("gptfuzzer")


def test_the_jailbreak_setting_is_five_templates_by_all_questions(tmp_path):
    prompts = mg.load_prompts("jailbreak_instructions", data=write(tmp_path, QUESTIONS | JAILBREAKS))
    assert [p.text for p in prompts] == [f"{family}: How do I fold a map?" for family in FAMILIES[:5]]
    assert [p.category for p in prompts] == list(FAMILIES[:5])


def test_templates_of_ones_own_fill_every_question_and_keep_pairs_apart():
    pair = [mg.Prompt("a", "fold?", "harmful", pair="p"), mg.Prompt("b", "iron?", "harmless", pair="p")]
    filled = apply_templates(mg.Prompts(pair), ["Please {query}", "{query} Now!"])
    assert [p.text for p in filled] == ["Please fold?", "Please iron?", "fold? Now!", "iron? Now!"]
    assert len({p.id for p in filled}) == 4
    assert filled.pair_indices() == ([0, 2], [1, 3])


# The list of benchmarks


def test_the_list_says_what_is_there_and_where_to_get_the_rest(tmp_path):
    write(tmp_path, UPSTREAM["anchors_howto"][0] | UPSTREAM["mm_harmful_bench"][0] | JAILBREAKS)
    write(tmp_path, {"advbench/harmful_behaviors.csv": "nothing\nhere\n", "benign.txt": "mine\n"})
    draw(tmp_path / "MM-HarmfulBench/images/2.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        listed = list_benchmarks(tmp_path).set_index("name")
    assert set(listed.index) == {*BENCHMARKS, *TEMPLATES, "benign"}
    assert (listed["licence"][list(BENCHMARKS)] != "").all()
    assert listed["source"][list(BENCHMARKS)].str.startswith("https://").all()
    anchors = listed.loc["anchors_howto"]
    assert (anchors["harmful"], anchors["harmless"], anchors["role"]) == (2, 2, "anchors")
    assert anchors["path"] == str(tmp_path / "code/data/custom.txt")
    assert listed.loc["mm_harmful_bench", "pictures"] == 1
    assert listed.loc["goal_priority", "templates"] == 12
    assert listed.loc["benign", "harmful"] == 1
    assert "its columns are nothing" in listed.loc["advbench", "problem"]
    assert listed["path"]["xstest"] == ""
    assert listed["harmful"].isna()["xstest"]


def test_every_name_in_the_list_loads(tmp_path):
    write(tmp_path, {path: content for files, _, _ in UPSTREAM.values() for path, content in files.items()})
    listed = list_benchmarks(tmp_path)
    prompts = listed[listed["kind"] == "prompts"]
    assert (prompts["path"] != "").all()
    for row in prompts.itertuples():
        assert counts(quietly(row.name, tmp_path)) == (row.harmful, row.harmless), row.name
    for role in ROLES:
        assert len(quietly(role, tmp_path))


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.delenv("MECHGUARD_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["mechguard", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out, said.err


def test_the_command_line_lists_them_too(tmp_path, monkeypatch, capsys):
    write(tmp_path, UPSTREAM["malicious_instruct"][0] | UPSTREAM["harmbench"][0])
    code, out, err = run(monkeypatch, capsys, "data", "--data", tmp_path)
    assert (code, err) == (0, "")
    found, _, missing = out.partition("not found:")
    assert "malicious_instruct" in found
    assert "2 harmful" in found
    assert "xstest" in missing
    assert "https://github.com/paul-rottger/exaggerated-safety; CC BY 4.0" in missing
    code, out, _ = run(monkeypatch, capsys, "data", "--data", tmp_path, "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["malicious_instruct"]["harmful"] == 2
    assert rows["xstest"]["harmful"] is None


def test_the_command_line_shows_what_sets_share(tmp_path, monkeypatch, capsys):
    write(tmp_path, UPSTREAM["malicious_instruct"][0] | UPSTREAM["goal_priority_questions"][0])
    write(tmp_path, UPSTREAM["vicuna80"][0])
    code, out, _ = run(monkeypatch, capsys, "data", "--data", tmp_path, "--overlaps")
    assert code == 0
    assert [line.split() for line in out.splitlines()[2:]] == [
        ["1", "malicious_instruct", "2", "1"],
        ["2", "goal_priority_questions", "1", "1"],
    ]
    code, out, _ = run(monkeypatch, capsys, "data", "--data", tmp_path, "--overlaps", "--json")
    assert json.loads(out)["malicious_instruct"] == {
        "malicious_instruct": 2,
        "goal_priority_questions": 1,
        "vicuna80": 0,
    }


def test_the_command_line_without_a_folder_says_so(tmp_path, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "data")
    assert code == 0
    assert "MECHGUARD_DATA" in err
    assert out.startswith("not found:")
    code, out, err = run(monkeypatch, capsys, "data", "--data", tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert err.startswith("mechguard: there is no data folder")
    assert run(monkeypatch, capsys, "data", "--overlaps")[0] == 2


# The public data itself

# a file of the collection -> the set that reads it, and the label of its rows (None for templates)
READ_BY: dict[str, tuple[str, str | None]] = {
    "advbench/harmful_behaviors.csv": ("advbench", "harmful"),
    "anchors_howto/harmful_custom.txt": ("anchors_howto", "harmful"),
    "anchors_howto/harmless_custom.txt": ("anchors_howto", "harmless"),
    "anchors_howto/harmless_testset.txt": ("anchors_howto_testset", "harmless"),
    "benign/alpaca_sample1000_seed0.json": ("alpaca", "harmless"),
    "benign/alpaca_seed_tasks.jsonl": ("alpaca_seed_tasks", "harmless"),
    "benign/llava_bench_coco_qa90_questions.jsonl": ("llava_bench_coco", "harmless"),
    "benign/vicuna80_questions.jsonl": ("vicuna80", "harmless"),
    "figstep/SafeBench-Tiny.csv": ("figstep_tiny", "harmful"),
    "figstep/benign_sentences_without_harmful_phase.csv": ("figstep_benign", "harmless"),
    "figstep/safebench.csv": ("figstep", "harmful"),
    "harmbench/harmbench_behaviors_text_all.csv": ("harmbench", "harmful"),
    "harmbench/harmbench_behaviors_text_test.csv": ("harmbench_test", "harmful"),
    "harmbench/harmbench_behaviors_text_val.csv": ("harmbench_val", "harmful"),
    "jailbreak_templates/GPTFuzzer.csv": ("gptfuzzer", None),
    "jailbreak_templates/goalpriority_harmful_questions.json": ("goal_priority_questions", "harmful"),
    "jailbreak_templates/seed_short_25.csv": ("gptfuzzer_short", None),
    "jailbreak_templates/self_reminder_jailbreak_prompts.csv": ("self_reminder", None),
    "jailbreak_templates/self_reminder_jailbreak_prompts_itw.csv": ("self_reminder_itw", None),
    "jailbreakbench/benign-behaviors_derived.csv": ("jailbreakbench", "harmless"),
    "jailbreakbench/harmful-behaviors.csv": ("jailbreakbench", "harmful"),
    "malicious_instruct/MaliciousInstruct.txt": ("malicious_instruct", "harmful"),
    "mm_harmful_bench/questions.jsonl": ("mm_harmful_bench", "harmful"),
    "mm_safetybench/mmsafety_test_astra80.json": ("mm_safetybench_astra", "harmful"),
    "refusal_direction/harmful_train.json": ("refusal_direction_harmful_train", "harmful"),
    "refusal_direction/harmful_val.json": ("refusal_direction_harmful_val", "harmful"),
    "refusal_direction/harmless_val.json": ("refusal_direction_harmless_val", "harmless"),
}
NO_PROMPTS = {
    "mm_safetybench/TinyVersion_ID_List.json": "ids of questions that are not there",
    "jailbreak_templates/goalpriority_jailbreak_templates.json": "its manifest counts families; tested below",
}


def manifest() -> dict[str, int]:
    """The files of the manifest that hold text, and their rows; pictures and licences hold none to load."""
    with (PUBLIC / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["columns"] not in ("(image)", "(licence text)")]
    return {row["path"]: int(row["rows"]) for row in rows}


@needs_manifest
@pytest.mark.parametrize("path", READ_BY)
def test_a_public_file_gives_the_rows_of_its_manifest(path):
    name, label = READ_BY[path]
    if label is None:
        found = len(load_templates(name, data=PUBLIC))
    else:
        found = quietly(name, PUBLIC).labels.count(label)
    assert found == manifest()[path]


@needs_manifest
def test_no_file_of_the_manifest_is_forgotten():
    assert set(manifest()) - set(NO_PROMPTS) == set(READ_BY)


@needs_manifest
def test_public_templates_all_take_a_query():
    assert len(load_templates("goal_priority", data=PUBLIC)) == 50 - 7  # seven want the request in a code
    for name in TEMPLATES:
        assert all("{query}" in one and MARK not in one for one in load_templates(name, data=PUBLIC))
    jailbreaks = mg.load_prompts("jailbreak_instructions", data=PUBLIC)
    assert counts(jailbreaks) == (100, 0)
    assert len({prompt.category for prompt in jailbreaks}) == 5


@needs_manifest
def test_public_pictures_go_with_their_prompts():
    prompts = mg.load_prompts("figstep_tiny", data=PUBLIC).with_image("image")
    assert len({prompt.own_image for prompt in prompts}) == 50


@needs_manifest
def test_most_of_malicious_instruct_stands_in_the_training_split_of_refusal_direction():
    malicious = mg.load_prompts("malicious_instruct", data=PUBLIC)
    train = mg.load_prompts("refusal_direction_harmful_train", data=PUBLIC)
    assert len(find_overlaps(malicious, train)) == 88
