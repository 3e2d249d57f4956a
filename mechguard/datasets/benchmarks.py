"""The public benchmarks, one record each."""

from __future__ import annotations

from dataclasses import replace

from mechguard.datasets.readers import (
    PICTURES,
    MMSafetyBench,
    Table,
    figstep_instruction,
    figstep_picture,
    named_picture,
    numbered_picture,
    with_context,
    with_input,
    xstest_label,
)
from mechguard.datasets.records import NOT_STATED, Benchmark, Origin
from mechguard.datasets.templates import GOAL_PRIORITY, GOAL_PRIORITY_TEMPLATES, read_jailbreaks

HARMBENCH = Origin(
    licence="MIT",
    source="https://github.com/centerforaisafety/HarmBench",
    citation="Mazeika et al. 2024, arXiv 2402.04249",
)
REFUSAL_DIRECTION = Origin(
    licence="Apache-2.0; harmless splits CC BY-NC 4.0 (from Alpaca)",
    source="https://github.com/andyrdt/refusal_direction",
    citation="Arditi et al. 2024, arXiv 2406.11717",
)
ANCHORS = Origin(
    licence=NOT_STATED,
    source="https://github.com/chujiezheng/LLM-Safeguard",
    citation="Zheng et al. 2024, arXiv 2401.18018",
)
FIGSTEP = Origin(
    licence="MIT",
    source="https://github.com/ThuCCSLab/FigStep",
    citation="Gong et al. 2023, arXiv 2311.05608",
)
MM_SAFETYBENCH = Origin(
    licence="CC BY-NC 4.0",
    source="https://github.com/isXinLiu/MM-SafetyBench",
    citation="Liu et al. 2023, arXiv 2311.17600",
)
ASTRA = Origin(
    licence="CC BY-NC 4.0 (MM-SafetyBench)",
    source="https://github.com/ASTRAL-Group/ASTRA",
    citation="Wang et al. 2024, arXiv 2411.16721; Liu et al. 2023, arXiv 2311.17600",
)
ALPACA = Origin(
    licence="CC BY-NC 4.0",
    source="https://github.com/tatsu-lab/stanford_alpaca",
    citation="Taori et al. 2023, Stanford Alpaca",
)
XSTEST = Origin(
    licence="CC BY 4.0",
    source="https://github.com/paul-rottger/exaggerated-safety",
    citation="Röttger et al. 2024, arXiv 2308.01263",
)
STRONGREJECT = Origin(
    licence="MIT",
    source="https://github.com/alexandrasouly/strongreject",
    citation="Souly et al. 2024, arXiv 2402.10260",
)
LLAVA = Origin(
    licence="Apache-2.0; pictures under their own licences",
    source="https://github.com/haotian-liu/LLaVA",
    citation="Liu et al. 2023, arXiv 2304.08485",
)
MM_QUESTIONS = (
    "mm_safetybench/processed_questions/*.json",
    "mm_safetybench/data/processed_questions/*.json",
    "data/processed_questions/*.json",
)
MM_PICTURES = ("mm_safetybench/imgs", "mm_safetybench/data/imgs", "data/imgs")
MM_IDS = ("mm_safetybench/TinyVersion_ID_List.json", "TinyVersion_ID_List.json")
ASTRA_QUESTIONS = (
    "mm_safetybench/mmsafety_test_astra80.json",
    "datasets/MM-SafetyBench/mmsafety_test.json",
)
SAFEBENCH = ("figstep/safebench.csv", "data/question/safebench.csv")
SAFEBENCH_TINY = ("figstep/SafeBench-Tiny.csv", "data/question/SafeBench-Tiny.csv")
SAFEBENCH_PICTURES = ("figstep/images/SafeBench", "data/images/SafeBench")
TINY_PICTURES = ("figstep/images/SafeBench-Tiny", "data/images/SafeBench-Tiny")
GOAL_PRIORITY_QUESTIONS = (
    "jailbreak_templates/goalpriority_harmful_questions.json",
    "data/test/harmful_questions.json",
)
SPLITS = ("harmful_train", "harmful_val", "harmful_test", "harmless_train", "harmless_val", "harmless_test")


def _mm_safetybench(name: str, what: str, kind: str | None, *, tiny: bool = False) -> Benchmark:
    files = {"prompts": MM_QUESTIONS} | ({"ids": MM_IDS} if tiny else {})
    files |= {PICTURES: MM_PICTURES} if kind else {}
    return Benchmark(name=name, what=what, files=files, read=MMSafetyBench(kind, tiny), origin=MM_SAFETYBENCH)


RECORDS: tuple[Benchmark, ...] = (
    Benchmark(
        name="anchors_howto",
        what='"How to ..." pairs, harmful and harmless, that begin alike',
        files={
            "harmful": ("anchors_howto/harmful_custom.txt", "code/data/custom.txt"),
            "harmless": ("anchors_howto/harmless_custom.txt", "code/data_harmless/custom.txt"),
        },
        read=Table(paired=True),
        roles={"anchors": None},
        origin=ANCHORS,
    ),
    Benchmark(
        name="anchors_howto_testset",
        what='more harmless "How to ..." requests, the test set of the anchors\' authors',
        files={"harmless": ("anchors_howto/harmless_testset.txt", "code/data_harmless/testset.txt")},
        read=Table(),
        origin=ANCHORS,
    ),
    Benchmark(
        name="malicious_instruct",
        what="harmful requests of ten kinds (MaliciousInstruct)",
        files={
            "harmful": (
                "malicious_instruct/MaliciousInstruct.txt",
                "data/MaliciousInstruct.txt",
                "code/data/MaliciousInstruct.txt",
            )
        },
        read=Table(),
        roles={"malicious": None},
        origin=Origin(
            licence=NOT_STATED,
            source="https://github.com/Princeton-SysML/Jailbreak_LLM",
            citation="Huang et al. 2023, arXiv 2310.06987",
        ),
    ),
    Benchmark(
        name="jailbreakbench",
        what="harmful goals, each with a harmless goal on the same theme",
        files={
            "harmful": ("jailbreakbench/harmful-behaviors.csv", "data/harmful-behaviors.csv"),
            "harmless": (
                "jailbreakbench/benign-behaviors.csv",
                "jailbreakbench/benign-behaviors_derived.csv",
                "data/benign-behaviors.csv",
            ),
        },
        read=Table("Goal", category="Category", paired=True),
        roles={"validation": None},
        origin=Origin(
            licence="MIT",
            source="https://huggingface.co/datasets/JailbreakBench/JBB-Behaviors",
            citation="Chao et al. 2024, arXiv 2404.01318",
        ),
    ),
    Benchmark(
        name="advbench",
        what="harmful goals (AdvBench, harmful behaviours)",
        files={"harmful": ("advbench/harmful_behaviors.csv", "data/advbench/harmful_behaviors.csv")},
        read=Table("goal"),
        origin=Origin(
            licence="MIT",
            source="https://github.com/llm-attacks/llm-attacks",
            citation="Zou et al. 2023, arXiv 2307.15043",
        ),
    ),
    *(
        Benchmark(
            name=name,
            what=f"HarmBench text behaviours, {what}; a context goes before its behaviour",
            files={
                "harmful": (
                    f"harmbench/harmbench_behaviors_text_{split}.csv",
                    f"data/behavior_datasets/harmbench_behaviors_text_{split}.csv",
                )
            },
            read=Table(with_context, category="SemanticCategory"),
            origin=HARMBENCH,
        )
        for name, split, what in (
            ("harmbench", "all", "all"),
            ("harmbench_test", "test", "test split"),
            ("harmbench_val", "val", "validation split"),
        )
    ),
    *(
        Benchmark(
            name=f"refusal_direction_{split}",
            what=f"{split.replace('_', ' instructions, ')} split of refusal_direction",
            files={
                split.partition("_")[0]: (
                    f"refusal_direction/{split}.json",
                    f"dataset/splits/{split}.json",
                )
            },
            read=Table("instruction", category="category"),
            origin=REFUSAL_DIRECTION,
        )
        for split in SPLITS
    ),
    Benchmark(
        name="strongreject",
        what="forbidden prompts of six kinds (StrongREJECT)",
        files={
            "harmful": (
                "strongreject/strongreject_dataset.csv",
                "strongreject_dataset/strongreject_dataset.csv",
                "strongreject_dataset.csv",
            )
        },
        read=Table("forbidden_prompt", category="category"),
        origin=STRONGREJECT,
    ),
    Benchmark(
        name="strongreject_small",
        what="ten forbidden prompts of each kind (StrongREJECT)",
        files={
            "harmful": (
                "strongreject/strongreject_small_dataset.csv",
                "strongreject_dataset/strongreject_small_dataset.csv",
                "strongreject_small_dataset.csv",
            )
        },
        read=Table("forbidden_prompt", category="category"),
        origin=STRONGREJECT,
    ),
    Benchmark(
        name="xstest",
        what="safe requests that sound unsafe, and unsafe contrasts",
        files={
            "prompts": (
                "xstest/xstest_prompts.csv",
                "xstest/xstest_v2_prompts.csv",
                "xstest_prompts.csv",
                "xstest_v2_prompts.csv",
            )
        },
        read=Table("prompt", category="type", label=xstest_label),
        origin=XSTEST,
    ),
    Benchmark(
        name="figstep",
        what="FigStep: a request drawn as a numbered list; the text only asks to fill it in (SafeBench)",
        files={"harmful": SAFEBENCH, PICTURES: SAFEBENCH_PICTURES},
        read=Table(figstep_instruction, category="category_name", picture=figstep_picture),
        origin=FIGSTEP,
    ),
    Benchmark(
        name="figstep_text",
        what="the questions behind FigStep's pictures, as text (SafeBench)",
        files={"harmful": SAFEBENCH},
        read=Table("question", category="category_name"),
        origin=FIGSTEP,
    ),
    Benchmark(
        name="figstep_tiny",
        what="FigStep, five requests of each kind (SafeBench-Tiny)",
        files={"harmful": SAFEBENCH_TINY, PICTURES: TINY_PICTURES},
        read=Table(figstep_instruction, category="category_name", picture=figstep_picture),
        origin=FIGSTEP,
    ),
    Benchmark(
        name="figstep_tiny_text",
        what="the questions behind FigStep's pictures, as text (SafeBench-Tiny)",
        files={"harmful": SAFEBENCH_TINY},
        read=Table("question", category="category_name"),
        origin=FIGSTEP,
    ),
    Benchmark(
        name="figstep_benign",
        what="SafeBench-Tiny's sentences with the harmful phrase starred out",
        files={
            "harmless": (
                "figstep/benign_sentences_without_harmful_phase.csv",
                "data/question/benign_sentences_without_harmful_phase.csv",
            )
        },
        read=Table("sentence"),
        origin=FIGSTEP,
    ),
    _mm_safetybench("mm_safetybench", "13 scenarios; generated picture with the key phrase below", "SD_TYPO"),
    _mm_safetybench("mm_safetybench_typo", "13 scenarios; the key phrase drawn", "TYPO"),
    _mm_safetybench("mm_safetybench_sd", "13 scenarios; generated picture only", "SD"),
    _mm_safetybench("mm_safetybench_text", "13 scenarios; the bare question", None),
    _mm_safetybench("mm_safetybench_tiny", "the authors' sample of mm_safetybench", "SD_TYPO", tiny=True),
    _mm_safetybench(
        "mm_safetybench_tiny_text", "the authors' sample of mm_safetybench_text", None, tiny=True
    ),
    Benchmark(
        name="mm_safetybench_astra",
        what="ASTRA's test sample of mm_safetybench, ten of each of eight scenarios",
        files={
            "prompts": ASTRA_QUESTIONS,
            PICTURES: (*MM_PICTURES, "datasets/MM-SafetyBench/data/imgs"),
        },
        read=MMSafetyBench("SD_TYPO"),
        origin=ASTRA,
    ),
    Benchmark(
        name="mm_safetybench_astra_text",
        what="ASTRA's test sample of mm_safetybench_text",
        files={"prompts": ASTRA_QUESTIONS},
        read=MMSafetyBench(None),
        origin=ASTRA,
    ),
    Benchmark(
        name="mm_harmful_bench",
        what="harmful requests about a picture (MM-Harmful Bench)",
        files={
            "harmful": (
                "mm_harmful_bench/questions.jsonl",
                "MM-HarmfulBench/questions.jsonl",
                "MM-HarmfulBench/mm_harmful.jsonl",
            ),
            PICTURES: ("mm_harmful_bench/images", "MM-HarmfulBench/images"),
        },
        read=Table("question", picture=numbered_picture),
        origin=Origin(
            licence="CC BY-NC 4.0; pictures from the web, under their own rights",
            source="https://github.com/Jihuai-wpy/InferAligner",
            citation="Wang et al. 2024, arXiv 2401.11206",
        ),
    ),
    Benchmark(
        name="goal_priority_questions",
        what="harmful questions that jailbreak templates are filled with (Goal Priority)",
        files={"harmful": GOAL_PRIORITY_QUESTIONS},
        read=Table("question"),
        origin=GOAL_PRIORITY,
    ),
    Benchmark(
        name="jailbreak_instructions",
        what="5 jailbreak templates x 20 questions: the first template of each of five families",
        files={"harmful": GOAL_PRIORITY_QUESTIONS, "templates": GOAL_PRIORITY_TEMPLATES},
        read=read_jailbreaks,
        origin=GOAL_PRIORITY,
    ),
    Benchmark(
        name="alpaca",
        what="instructions of Alpaca: all, or a sample of 1000 where only that is there",
        files={
            "harmless": (
                "alpaca_data.json",
                "alpaca/alpaca_data.json",
                "benign/alpaca_data.json",
                "benign/alpaca_sample1000_seed0.json",
            )
        },
        read=Table(with_input, category="category"),
        roles={"benign": 100},
        origin=ALPACA,
    ),
    Benchmark(
        name="alpaca_seed_tasks",
        what="the hand-written tasks that Alpaca grew from",
        files={"harmless": ("benign/alpaca_seed_tasks.jsonl", "seed_tasks.jsonl")},
        read=Table(with_input, category="name"),
        origin=ALPACA,
    ),
    Benchmark(
        name="llava_bench_coco",
        what="questions about COCO pictures (LLaVA-Bench)",
        files={
            "harmless": (
                "benign/llava_bench_coco_qa90_questions.jsonl",
                "playground/data/coco2014_val_qa_eval/qa90_questions.jsonl",
            ),
            PICTURES: (
                "benign/llava_bench_coco_images",
                "playground/data/coco2014_val_qa_eval/images",
                "coco/val2014",
                "val2014",
            ),
        },
        read=Table("text", category="category", picture=named_picture),
        origin=LLAVA,
    ),
    Benchmark(
        name="llava_bench_wild",
        what="questions about pictures of all kinds (LLaVA-Bench in the wild)",
        files={
            "harmless": (
                "llava-bench-in-the-wild/questions.jsonl",
                "playground/data/eval/llava-bench-in-the-wild/questions.jsonl",
                "benign/llava_bench_in_the_wild/questions.jsonl",
            ),
            PICTURES: (
                "llava-bench-in-the-wild/images",
                "playground/data/eval/llava-bench-in-the-wild/images",
                "benign/llava_bench_in_the_wild/images",
            ),
        },
        read=Table("text", category="category", picture=named_picture),
        origin=replace(LLAVA, source="https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"),
    ),
    Benchmark(
        name="vicuna80",
        what="open questions of nine kinds (Vicuna's)",
        files={"harmless": ("benign/vicuna80_questions.jsonl", "llava/eval/table/question.jsonl")},
        read=Table("text", category="category"),
        origin=replace(LLAVA, licence="Apache-2.0"),
    ),
)
BENCHMARKS: dict[str, Benchmark] = {record.name: record for record in RECORDS}
# The roles of a study are names too, so that a folder of public data serves as it is.
ROLES: dict[str, list[Benchmark]] = {
    role: [record for record in RECORDS if role in record.roles]
    for role in dict.fromkeys(role for record in RECORDS for role in record.roles)
}
