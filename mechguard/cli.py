"""The command line: the same verbs and defaults as in Python.

Results go to stdout or the named file, progress to stderr. A user's mistake is one sentence and exit code 2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mechguard import __version__
from mechguard.errors import MechguardError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended
Model = Annotated[str, typer.Argument(help="organism, a Hugging Face name, or a folder")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="no progress bars", callback=lambda quiet: _hush(quiet))
]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="leave out prompts whose picture cannot be read")
]
Several = Annotated[
    int, typer.Option("--processes", min=1, help="share the work among so many processes of this machine")
]
Data = Annotated[Path | None, typer.Option(help="folder of prompt sets; MECHGUARD_DATA by default")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """See where a vision-language model loses the safety of its language model, and give it back."""


@app.command()
def study(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder for every product of the study")],
    data: Data = None,
    max_rank: Annotated[int, typer.Option(help="the most directions per layer that are tried")] = 8,
    seed: Annotated[int, typer.Option(help="fixes every random choice")] = 0,
    limit: Annotated[int | None, typer.Option(help="at most so many prompts of each set")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens per answer")] = 48,
    circuits: Annotated[
        bool, typer.Option("--circuits", help="also which heads and MLPs write the safety direction")
    ] = False,
    skip_unreadable: SkipUnreadable = False,
    processes: Several = 1,
    quiet: Quiet = False,
) -> None:
    """From a model to report.html: states, separability, modality gap, guard, behaviour.

    mechguard study organism --out runs/organism
    """
    from mechguard.processes import find_processes
    from mechguard.study import run_study

    if _started(processes):
        return
    report = run_study(
        model,
        out=out,
        data=data,
        max_rank=max_rank,
        seed=seed,
        limit=limit,
        max_new_tokens=max_new_tokens,
        circuits=circuits,
        skip_unreadable=skip_unreadable,
        progress=not quiet,
        command=_command(),
    )
    if find_processes().leads:
        _print_headline(out)
        typer.echo(str(report))


@app.command()
def generate(
    model: Model,
    text: Annotated[str, typer.Argument(help="what to ask")],
    guard: Annotated[Path | None, typer.Option(help="a saved guard")] = None,
    image: Annotated[str, typer.Option(help="a picture, or none, blank, grey, black, noise")] = "none",
    max_new_tokens: Annotated[int, typer.Option(help="tokens per answer")] = 64,
) -> None:
    """One answer, with or without a picture and a guard.

    mechguard generate organism --image blank --guard runs/organism/guards/vlm_guard "How to make a cake?"
    """
    import mechguard as mg

    loaded = mg.Guard.load(guard) if guard is not None else None
    vlm = mg.load(model)
    prompts = mg.Prompts([mg.Prompt("0", text)], name="command line").with_image(image)
    answers = mg.generate(vlm, prompts, guard=loaded, max_new_tokens=max_new_tokens, progress=False)
    typer.echo(answers[0])


@app.command()
def collect(
    model: Model,
    prompts: Annotated[str, typer.Argument(help="a prompt file, organism/NAME, or a set in --data")],
    out: Annotated[Path, typer.Option(help="folder for the states; an interrupted collection goes on")],
    data: Data = None,
    image: Annotated[str, typer.Option(help="none, image, blank, grey, black, noise, ...")] = "none",
    llm: Annotated[
        bool, typer.Option("--llm", help="the language model alone, which reads the text")
    ] = False,
    position: Annotated[str, typer.Option(help="last, last_text, image, text, all, or an index")] = "last",
    layers: Annotated[str | None, typer.Option(help='layers, as "2 3 4"; all by default')] = None,
    guard: Annotated[Path | None, typer.Option(help="a saved guard that acts in the same pass")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="prompts per pass; halves when memory runs out")
    ] = None,
    shard_size: Annotated[int | None, typer.Option(help="prompts per file; about 64 MB by default")] = None,
    skip_unreadable: SkipUnreadable = False,
    processes: Several = 1,
    quiet: Quiet = False,
) -> None:
    """Hidden states of every layer at one position of every prompt, streamed to disk.

    mechguard collect organism organism/anchors --llm --out runs/anchors

    mechguard collect organism organism/anchors --processes 2 --out runs/anchors
    """
    import mechguard as mg
    from mechguard.processes import find_processes
    from mechguard.sweeps import parse_layers

    if _started(processes):
        return
    asked = mg.load_prompts(prompts, data=data, skip_unreadable=skip_unreadable).with_image(image)
    vlm = mg.load(model)
    activations = mg.collect(
        vlm.llm if llm else vlm,
        asked,
        layers=parse_layers(layers) if layers else "all",
        position=int(position) if position.lstrip("-").isdigit() else position,  # type: ignore[arg-type]
        guard=mg.Guard.load(guard) if guard is not None else None,
        batch_size=batch_size or "auto",
        shard_size=shard_size or "auto",
        out=out,
        progress=not quiet,
    )
    if find_processes().leads:
        typer.echo(repr(activations))


@app.command()
def fit(
    activations: Annotated[Path, typer.Argument(help="saved activations")],
    out: Annotated[Path, typer.Option(help="where to save the directions")],
    method: Annotated[str, typer.Option(help="svd, mean_difference, pca, lda or logistic")] = "svd",
    rank: Annotated[int, typer.Option(help="directions per layer")] = 1,
) -> None:
    """Directions that separate harmful from harmless, from saved activations.

    mechguard fit runs/anchors --out runs/ssd
    """
    import mechguard as mg

    directions = mg.fit_directions(mg.Activations.load(activations), method=method, rank=rank)  # type: ignore[arg-type]
    directions.save(out)
    typer.echo(repr(directions))


@app.command()
def doctor(
    model: Model,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
    quiet: Quiet = False,
) -> None:
    """Whether mechguard reads this model right, measured on it. Exit code 1 if a check fails.

    mechguard doctor organism
    """
    import mechguard as mg
    from mechguard.doctor import is_healthy

    vlm = mg.load(model)
    diagnosis = mg.diagnose(vlm, progress=not quiet)
    if as_json:
        rows = json.loads(diagnosis.table.to_json(orient="records"))
        typer.echo(json.dumps({"about": diagnosis.about, "checks": rows}, indent=1))
    else:
        shown = diagnosis.table.copy()
        shown["difference"] = [f"{value:.2g}" for value in shown["difference"]]
        _print_table(shown[["check", "verdict", "difference", "tolerance", "unit", "note"]], repr(vlm))
    raise typer.Exit(0 if is_healthy(diagnosis) else 1)


@app.command()
def models(as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False) -> None:
    """The families of models that were tried, and what of them works.

    Every cell was filled by running a tiny model of that family.
    """
    from mechguard.families import tested_families

    table = tested_families()
    if as_json:
        typer.echo(table.to_json(orient="records", indent=1))
    else:
        _print_table(table, "families tried at toy size, from their real classes")


@app.command()
def evaluate(
    model: Model,
    prompts: Annotated[str, typer.Argument(help="a prompt file, organism/NAME, or a set in --data")],
    out: Annotated[Path, typer.Option(help="where to save the table")],
    guard: Annotated[list[Path] | None, typer.Option(help="a saved guard; may be given again")] = None,
    data: Data = None,
    condition: Annotated[
        list[str] | None, typer.Option(help="an image condition; may be given again")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens per answer")] = 64,
    skip_unreadable: SkipUnreadable = False,
    processes: Several = 1,
    quiet: Quiet = False,
) -> None:
    """Refusals and compliances, unguarded and under saved guards.

    Responses are kept beside the table, in NAME.responses.jsonl; an evaluation that was interrupted goes on.

    mechguard evaluate organism organism/malicious --guard runs/organism/guards/vlm_guard --out runs/table.csv
    """
    import mechguard as mg
    from mechguard.processes import find_processes

    if _started(processes):
        return
    asked = mg.load_prompts(prompts, data=data, skip_unreadable=skip_unreadable)
    guards = [None, *map(mg.Guard.load, guard or [])]
    result = mg.evaluate(
        mg.load(model),
        asked,
        guards=guards,
        conditions=condition or None,
        max_new_tokens=max_new_tokens,
        responses=out.with_name(f"{out.stem}.responses.jsonl"),
        progress=not quiet,
    )
    if find_processes().leads:
        typer.echo(str(result.save(out)))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="the folder of a study")],
    png: Annotated[bool, typer.Option("--png", help="also pictures; needs kaleido and a Chromium")] = False,
) -> None:
    """Draw the figures and the report of a finished study again.

    mechguard report runs/organism
    """
    from mechguard.report import StudyFolder, write_figures, write_report

    study = StudyFolder.read(folder)
    write_figures(study, png=png)
    typer.echo(str(write_report(study)))


@app.command()
def compare(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder for the table; an interrupted comparison goes on")],
    data: Data = None,
    method: Annotated[list[str] | None, typer.Option(help="one of them; may be given again")] = None,
    limit: Annotated[int, typer.Option(help="validation prompts of each label")] = 25,
    limit_tests: Annotated[
        int | None, typer.Option(help="test prompts of each label and set; all by default")
    ] = None,
    seed: Annotated[int, typer.Option(help="fixes every random choice")] = 0,
    skip_unreadable: SkipUnreadable = False,
    quiet: Quiet = False,
) -> None:
    """VLM-Guard and its neighbours on one table, each beside random directions and shuffled labels.

    mechguard compare organism --out runs/defences
    """
    import mechguard as mg
    from mechguard.study import ONLY_WITH_PICTURE, find_study_prompts, find_test_sets

    vlm = mg.load(model)
    prompts = find_study_prompts(vlm, data, skip_unreadable=skip_unreadable)
    tests = {"test": prompts.test, **find_test_sets(vlm, data, skip_unreadable=skip_unreadable)}
    result = mg.compare_guards(
        vlm,
        anchors=prompts.anchors,
        validation=prompts.validation,
        tests=tests,
        out=out,
        methods=method,
        only={name: ["image"] for name in ONLY_WITH_PICTURE},
        limit=limit,
        limit_tests=limit_tests,
        seed=seed,
        progress=not quiet,
    )
    mg.plots.save(mg.plots.defences(result), out / "defences")
    _print_rates(result.table, ["setting", "condition", "guard"])


@app.command()
def protocol(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder of the run; an interrupted run goes on")],
    data: Data = None,
    judge: Annotated[
        list[str] | None, typer.Option(help="see `mechguard judge --help`; may be given again")
    ] = None,
    guard: Annotated[
        list[str] | None, typer.Option(help="a method of the comparison; may be given again")
    ] = None,
    condition: Annotated[
        list[str] | None, typer.Option(help="an image condition; may be given again")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="at most so many prompts of each setting; 100, of the organism 50")
    ] = None,
    validation_limit: Annotated[int, typer.Option(help="validation prompts of each label")] = 25,
    controls: Annotated[int, typer.Option(help="random directions beside every guard")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="tokens per answer")] = 48,
    reference: Annotated[str | None, typer.Option(help="the model that perplexities are taken under")] = None,
    seed: Annotated[int, typer.Option(help="fixes every random choice")] = 0,
    skip_unreadable: SkipUnreadable = False,
    quiet: Quiet = False,
) -> None:
    """The paper's protocol: malicious, jailbreak, multimodal and benign prompts x conditions x guards.

    mechguard protocol organism --out runs/protocol
    """
    from dataclasses import replace

    import mechguard as mg
    from mechguard.protocol import JUDGES, default_options, run_protocol

    vlm = mg.load(model)
    options = replace(
        default_options(vlm),
        validation_limit=validation_limit,
        controls=controls,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    options = replace(options, limit=limit) if limit is not None else options
    options = replace(options, guards=tuple(guard)) if guard else options
    options = replace(options, conditions=tuple(condition)) if condition else options
    run_protocol(
        vlm,
        out=out,
        data=data,
        judges=judge or JUDGES,
        reference=None if reference is None else mg.load(reference),
        options=options,
        skip_unreadable=skip_unreadable,
        progress=not quiet,
    )
    _print_headline(out, ["setting", "condition", "guard"])
    typer.echo(str(out / "results"))


@app.command("judge")
def judge_responses(
    folder: Annotated[Path, typer.Argument(help="a run, or any folder with a responses.jsonl")],
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="refusal, keywords, arditi, qi, coherence, refusal_odds, llama_guard:MODEL, "
            "strongreject:MODEL, strongreject:URL#MODEL; may be given again"
        ),
    ] = None,
    sample: Annotated[
        Path | None, typer.Option(help="write responses to label by hand there (.csv or .jsonl), and stop")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="how many responses the sample holds")] = 100,
    labels: Annotated[Path | None, typer.Option(help="a labelled sample, to compare the judges with")] = None,
    seed: Annotated[int, typer.Option(help="fixes the sample")] = 0,
    quiet: Quiet = False,
) -> None:
    """Judge stored responses again, without the model that gave them, and compare the judges.

    mechguard judge runs/protocol --judge qi --judge llama_guard:meta-llama/LlamaGuard-7b
    """
    import mechguard as mg
    from mechguard.judging import RESPONSES, judge_run
    from mechguard.responses import read_responses

    if sample is not None:
        typer.echo(str(mg.export_sample(read_responses(folder / RESPONSES), sample, n=n, seed=seed)))
        return
    result = judge_run(folder, judge or [], labels=labels, progress=not quiet)
    _print_rates(result.table, ["judge", "setting", "condition", "guard"])
    if (folder / "results" / "agreement.csv").is_file():
        table = mg.Result.load(folder / "results" / "agreement").table.round(3)
        _print_table(table, "agreement of judges on compliance, 95% bootstrap intervals over prompts")


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="a run, or any folder with a responses.jsonl")],
    out: Annotated[Path, typer.Option(help="the log: .eval or .json")],
) -> None:
    """Write a run as a log for the viewer of Inspect (needs mechguard[inspect]).

    mechguard export runs/protocol --out logs/protocol.eval
    """
    from mechguard.inspect_logs import export_inspect_log

    typer.echo(str(export_inspect_log(folder, out)))


@app.command()
def sweep(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder for the table; an interrupted sweep goes on")],
    data: Data = None,
    alternatives: Annotated[
        bool, typer.Option("--alternatives", help="the default with one option changed, not the readings")
    ] = False,
    layers: Annotated[
        list[str] | None, typer.Option(help='layers, as "2 3 4"; may be given again; by default three sets')
    ] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="a strength; may be given again")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="a rank; may be given again")] = None,
    condition: Annotated[
        list[str] | None, typer.Option(help="an image condition; may be given again")
    ] = None,
    objective: Annotated[str, typer.Option(help="what to maximise; with a minus before it, minimise")] = (
        "complete_refusal"
    ),
    limit: Annotated[int, typer.Option(help="validation prompts of each label")] = 50,
    skip_unreadable: SkipUnreadable = False,
    processes: Several = 1,
    quiet: Quiet = False,
) -> None:
    """VLM-Guard in many settings on validation prompts, and the best one by a written rule.

    mechguard sweep organism --alternatives --layers "3 4 5" --alpha 2 --out runs/alternatives
    """
    import mechguard as mg
    from mechguard.processes import find_processes
    from mechguard.study import find_study_prompts
    from mechguard.sweeps import ALTERNATIVES, VARIANTS, layer_sets, parse_layers

    if _started(processes):
        return
    vlm = mg.load(model)
    prompts = find_study_prompts(vlm, data, skip_unreadable=skip_unreadable)
    ranks = rank or [1]
    text = mg.collect(vlm.llm, prompts.anchors, progress=not quiet)
    ssd = mg.fit_directions(text, rank=max(ranks))
    chosen = [parse_layers(words) for words in layers or []]
    if not chosen:
        validation = mg.collect(vlm.llm, prompts.validation, progress=not quiet)
        chosen = layer_sets(mg.measure_separability(validation, ssd, resamples=50), vlm.n_layers)
    result = mg.sweep(
        vlm,
        prompts.validation.first(limit),
        ssd,
        layers=chosen,
        alphas=alpha or (0.5, 1.0, 2.0),
        ranks=ranks,
        variants=ALTERNATIVES if alternatives else VARIANTS,
        conditions=condition or None,
        max_new_tokens=48,
        out=out / "cells.jsonl",
        progress=not quiet,
    )
    if not find_processes().leads:
        return
    result.save(out / "sweep")
    figures = {
        out / f"sweep_{metric}": mg.plots.sweep_heatmap(result, metric=metric)
        for metric in ("attack_success", "complete_refusal", "benign_compliance")
    }
    mg.plots.save_all(figures)
    _print_rates(result.table, ["condition", "variant", "rank", "layers", "alpha"])
    best = mg.choose(result, objective=objective)
    setting = ", ".join(f"{name} {best[name]}" for name in ("variant", "rank", "layers", "alpha"))
    typer.echo(f"best for {objective}: {setting}")


@app.command("data")
def list_data(
    data: Data = None,
    overlaps: Annotated[
        bool, typer.Option("--overlaps", help="how many prompts the sets found share with each other")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """The public benchmarks that can be loaded: names, counts, licences, and where to get them.

    mechguard data --data DIR --overlaps
    """
    from mechguard.datasets import catalogue

    if catalogue.data_folder(data) is None:
        typer.echo("no data folder was given: use --data DIR, or set MECHGUARD_DATA", err=True)
    table = catalogue.measure_overlaps(data) if overlaps else catalogue.list_benchmarks(data)
    if as_json:
        rows = json.loads(table.to_json(orient="index" if overlaps else "records"))
        typer.echo(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        typer.echo((catalogue.format_overlaps if overlaps else catalogue.format_benchmarks)(table))


def main() -> None:
    """Run the command line: one sentence and exit code 2 for a user's mistake, 130 for Ctrl-C."""
    try:
        app()
    except MechguardError as error:
        typer.echo(f"mechguard: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as end:  # typer has made a code of Ctrl-C by then
        if isinstance(end, SystemExit) and end.code != INTERRUPTED:
            raise
        typer.echo(
            "mechguard: interrupted; what was done is kept, and the same command goes on from there", err=True
        )
        sys.exit(INTERRUPTED)


def _started(processes: int) -> bool:
    """Run this very command in several processes; False where it is to run in this one."""
    from mechguard.processes import launch, launched

    if processes == 1 or launched():
        return False
    import mechguard.tracing  # noqa: F401 - imported once, for all of them

    if code := launch(processes, _again, sys.argv[1:]):
        raise typer.Exit(code)
    return True


def _again(arguments: list[str]) -> None:
    """The command in a process of its own."""
    sys.argv = ["mechguard", *arguments]
    app(arguments, standalone_mode=False)


def _hush(quiet: bool) -> bool:
    """Also keep transformers from drawing the bar of loading weights."""
    if quiet:
        from transformers.utils import logging

        logging.disable_progress_bar()
    return quiet


def _command() -> str:
    import shlex

    return shlex.join(["mechguard", *sys.argv[1:]])


def _print_headline(folder: Path, index: list[str] | None = None) -> None:
    from mechguard.result import Result

    _print_rates(Result.load(folder / "results" / "behaviour").table, index or ["condition", "guard"])


def _print_rates(table: Any, index: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    metrics = ["attack_success", "complete_refusal", "benign_compliance"]
    rows = table[table["metric"].isin(metrics)].copy()
    rows["shown"] = [f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in rows.itertuples()]
    wide = rows.pivot_table(index=index, columns="metric", values="shown", aggfunc="first", sort=False)
    title = f"{'/'.join(table['split'].unique())} split, n = {_counts(rows)} per cell, 95% Wilson intervals"
    shown = Table(*index, *metrics, title=title)
    for names, row in wide.iterrows():
        cells = [row.get(metric) for metric in metrics]
        words = [*map(str, names), *(cell if isinstance(cell, str) else "" for cell in cells)]
        shown.add_row(*map(Text, words))  # not read for markup
    Console(width=max(Console().width, 110)).print(shown)


def _print_table(frame: Any, title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*map(str, frame.columns), title=title)
    for row in frame.itertuples(index=False):
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    Console(width=max(Console().width, 150)).print(table)


def _counts(rows: Any) -> str:
    return " or ".join(str(n) for n in sorted(set(rows["n"])))


if __name__ == "__main__":
    main()
