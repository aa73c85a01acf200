"""The command `mtl-dist`. Heavy modules are imported by the commands that need them, so that --help answers at once.

Whatever the user got wrong is one line on standard error and exit code 2.
"""

import argparse
import importlib.util
import io
import json
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtl_dist.config import CONFIG_FILE, UserError, load, refusing, schema

if TYPE_CHECKING:
    from mtl_dist.experiment import Experiment


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have letters that the screen has not
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives up on positional arguments behind an option; overrides may stand there all the same.
    if rest and ("overrides" not in arguments or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    arguments.words = sys.argv[1:] if argv is None else argv  # as a study writes them down
    try:
        arguments.run(arguments)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the others of this node have the same to say
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        pass
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "mtl-dist",
        description="Multi-task training of one encoder. "
        "Start several processes with `accelerate launch -m mtl_dist train CONFIG`.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    def config(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("config", metavar="CONFIG", type=Path, help="the experiment's YAML file")
        overrides(sub)

    def run_folder(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("run_folder", metavar="RUN", type=Path, help="a run folder")

    def overrides(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "overrides", metavar="KEY=VALUE", nargs="*", help="such as tasks.sst.weight=2; tasks.sst=null drops it"
        )

    def as_json(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print one JSON document")

    sub = command("train", _train, "train an experiment")
    config(sub)
    sub.add_argument("--overwrite", action="store_true", help="replace the run that is in output_dir")
    sub.add_argument(
        "--resume",
        metavar="auto|never|PATH",
        default="never",
        help="go on from a checkpoint: the last one in output_dir if there is any (auto), or the one at PATH",
    )
    sub.add_argument("--allow-changes", action="store_true", help="go on with other tasks or other train rows as well")
    sub.add_argument(
        "--profile",
        type=int,
        metavar="N",
        default=0,
        help="say where the time of N early steps goes, and write a trace",
    )

    sub = command("sweep", _sweep, "find the best values of some keys by training an experiment again and again")
    config(sub)
    sub.add_argument(
        "--space", metavar="FILE", type=Path, required=True, help="YAML: what the values of which keys are drawn from"
    )
    sub.add_argument("--trials", metavar="N", type=int, required=True, help="in all; the same command goes on")
    sub.add_argument("--jobs", metavar="N", type=int, default=1, help="trials at a time")
    sub.add_argument("--out", metavar="DIR", type=Path, help="by default the experiment's output_dir, with -sweep")
    sub.add_argument(
        "--storage",
        choices=("sqlite", "journal"),
        help="journal: several processes share the sweep, as the tasks of a SLURM array do",
    )
    sub.add_argument("--seed", metavar="N", type=int, default=0, help="of what is drawn")

    sub = command("verify", _verify, "check that a run's checkpoints and its best model are whole")
    sub.add_argument(
        "folder", metavar="PATH", type=Path, help="a run folder, its checkpoints, one of them, or its best"
    )

    sub = command("plan", _plan, "say what training will draw, send and keep, and how long it takes, before it starts")
    config(sub)
    sub.add_argument("--ranks", type=int, metavar="W", help="processes to plan for; by default the ones launched")
    sub.add_argument(
        "--engine",
        choices=("ddp", "zero1", "zero2", "zero3", "fsdp2"),
        help="what trains there; by default what is launched, else ddp",
    )
    sub.add_argument("--measure", action="store_true", help="time a few steps of each stage, on the processes launched")
    as_json(sub)

    sub = command("eval", _eval, "score a run's best model")
    run_folder(sub)
    overrides(sub)
    sub.add_argument("--split", choices=("dev", "test"), default="dev")
    as_json(sub)

    sub = command("predict", _predict, "predict the labels of a file with a run's best model")
    run_folder(sub)
    sub.add_argument("file", metavar="FILE", type=Path, help="rows with the task's sentences, labelled or not")
    sub.add_argument("--task", required=True)
    sub.add_argument("--out", type=Path, required=True, help="where to write")
    overrides(sub)
    sub.add_argument("--overwrite", action="store_true", help="replace a file that is at --out")
    sub.add_argument(
        "--format", choices=("csv", "tsv", "jsonl", "parquet"), help="of FILE; by default as the task's own files"
    )
    sub.add_argument(
        "--out-format",
        choices=("csv", "tsv", "jsonl", "cs224n"),
        help="of --out, whose suffix tells by default; cs224n: `id, Predicted_Label`, with the blanks",
    )
    sub.add_argument(
        "--probabilities", action="store_true", help="of the classes as well, as columns; JSON lines have them always"
    )

    sub = command("errors", _errors, "say where a run's best model is wrong: which rows, and which kinds of rows")
    run_folder(sub)
    overrides(sub)
    sub.add_argument("--task", required=True)
    sub.add_argument("--split", choices=("dev", "test"), default="dev")
    sub.add_argument("--most", type=int, metavar="N", default=50, help="rows on the page; all are in errors.jsonl")
    sub.add_argument("--out", type=Path, metavar="DIR", help="where to write; by default RUN/errors/TASK-SPLIT")
    as_json(sub)

    sub = command("study", _study, "train many configs with several seeds, and put what came of them into one table")
    sub.add_argument(
        "overrides", metavar="FOLDER|FILE|KEY=VALUE", nargs="*", help="configs, and what is overridden in all of them"
    )
    sub.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder of the runs and of the table")
    sub.add_argument("--seeds", type=int, metavar="N", default=1, help="runs of each config, its own seed first")
    sub.add_argument("--scale", type=float, metavar="X", default=1.0, help="multiplies every length of every stage")
    sub.add_argument(
        "--lr-scale", type=float, metavar="X", default=1.0, help="multiplies learning rates, but of heads alone"
    )
    sub.add_argument("--only", metavar="PATTERN", action="append", default=[], help="such as '003-*'; can be repeated")
    sub.add_argument("--jobs", type=int, metavar="N", help="runs at a time; by default 1, on SLURM as many as fit")
    sub.add_argument("--slurm", action="store_true", help="submit the runs as a job array instead")

    sub = command("compare", _compare, "print finished runs side by side, and where their configs differ")
    sub.add_argument("run_folders", metavar="RUN", type=Path, nargs="+", help="run folders, or those of studies")
    as_json(sub)

    config(command("prepare", _prepare, "check and tokenise an experiment's data, so that training starts at once"))

    sub = command("validate", _validate, "check a config and its data without training")
    config(sub)
    as_json(sub)

    as_json(command("doctor", _doctor, "say what this machine can run, and what is missing"))

    command("schema", _schema, "print the JSON schema of configs, for editors")

    sub = command("corpus", _corpus, "write the demo corpus: three small tasks, generated")
    sub.add_argument("folder", metavar="FOLDER", type=Path)
    sub.add_argument("--rows", type=int, default=20_000, help="train rows of all tasks together, 100 to 1,000,000")
    sub.add_argument("--shares", type=_share, nargs="+", metavar="TASK=SHARE", help="such as sentiment=1 paraphrase=9")
    sub.add_argument("--dev-rows", type=int, default=500, help="dev rows, and test rows, of each task")
    sub.add_argument("--seed", type=int, default=0)
    return parser


def _experiment(path: Path, overrides: Sequence[str]) -> "Experiment":
    from mtl_dist.experiment import Experiment

    return load(Experiment, path, overrides)


def _train(arguments: argparse.Namespace) -> None:
    config = _experiment(arguments.config, arguments.overrides)
    if arguments.profile < 0:
        raise UserError(f"--profile is {arguments.profile}; give the number of steps to profile")
    from mtl_dist.training.loop import train

    train(config, arguments.overwrite, arguments.resume, arguments.allow_changes, arguments.profile)


def _sweep(arguments: argparse.Namespace) -> None:
    if not importlib.util.find_spec("optuna"):
        raise UserError("a sweep needs Optuna: pip install 'mtl_dist[sweep]'")
    _refuse_launcher("a sweep")
    for option, least in (("trials", 1), ("jobs", 1), ("seed", 0)):
        if (given := getattr(arguments, option)) < least:
            raise UserError(f"--{option} is {given}; give {least} or more")
    from mtl_dist.studies.sweep import sweep
    from mtl_dist.watch.screen import make_console

    sweep(
        arguments.config,
        arguments.overrides,
        arguments.space,
        arguments.trials,
        arguments.jobs,
        arguments.out,
        arguments.storage,
        arguments.seed,
        make_console(True),
    )


def _verify(arguments: argparse.Namespace) -> None:
    from mtl_dist import files
    from mtl_dist.checkpoint import CHECKPOINTS, COVERED, all_in, faults
    from mtl_dist.model.multitask import BEST, HEADS, MODEL_FILES

    folder = arguments.folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    checkpoints = all_in(folder / CHECKPOINTS) or all_in(folder)
    models = [folder / BEST] if (folder / BEST).exists() else []
    name = folder.resolve().name
    if not (checkpoints or models or (folder / CHECKPOINTS).exists()):  # then it is none of these, but may be in one
        if name.startswith("step-") or any((folder / part).exists() for part in COVERED):
            checkpoints = [folder]
        elif name == BEST or (folder / HEADS).exists():
            models = [folder]
    if not (checkpoints or models):
        raise UserError(f"{folder}: no checkpoints and no best model here")
    found = {path: faults(path) for path in checkpoints}
    for path in models:
        if (path / files.SUMS).exists():
            found[path] = files.faults(path, MODEL_FILES)
        else:  # whoever changes a file takes it away
            found[path] = [f"{part} is missing" for part in MODEL_FILES if not (path / part).is_file()]
    for path, wrong in found.items():
        unknown = path in models and not (path / files.SUMS).exists()
        whole = f"not checked, because {files.SUMS} was taken away; its files are all there" if unknown else "whole"
        _write(f"{path}: {'; '.join(wrong) or whole}")
    if any(found.values()):
        raise UserError(f"{folder}: not all is whole")


def _plan(arguments: argparse.Namespace) -> None:
    launched, asked = int(os.environ.get("WORLD_SIZE", "1")), arguments.ranks
    if asked is not None and asked < 1:
        raise UserError(f"--ranks is {asked}; give 1 or more")
    if arguments.measure and asked not in (None, launched):
        raise UserError(f"--ranks is {asked}, but --measure runs on the processes launched, which are {launched}")
    if not (arguments.measure or _is_first_rank()):
        return
    config = _experiment(arguments.config, arguments.overrides)
    ranks = asked or config.distributed.processes or launched
    from mtl_dist.data.tokenizer import load_tokenizer
    from mtl_dist.distributed import launched as launched_engine
    from mtl_dist.studies.plan import measure, plan, tables
    from mtl_dist.training.setup import load_data
    from mtl_dist.watch.screen import make_console

    engine, precision = launched_engine(config.precision)
    if arguments.measure and arguments.engine not in (None, engine):
        raise UserError(
            f"--engine is {arguments.engine}, but --measure trains with what is launched, which is {engine}"
        )
    tokenizer = load_tokenizer(config.encoder.tokenizer_source)
    splits = load_data(config, tokenizer, make_console(_is_first_rank(), stderr=True))
    planned = plan(config, tokenizer, splits, ranks, arguments.engine or engine, precision)
    if arguments.measure:
        planned = measure(config, planned)
    if not _is_first_rank():
        return
    if arguments.json:
        _write(json.dumps(asdict(planned), indent=2))
    else:
        for part in tables(planned):
            _print(part)


def _eval(arguments: argparse.Namespace) -> None:
    from mtl_dist.runs.predict import evaluate_run
    from mtl_dist.watch.screen import score_table

    config = _experiment(arguments.run_folder / CONFIG_FILE, arguments.overrides)
    scores = evaluate_run(config, arguments.run_folder, arguments.split)
    if not _is_first_rank():
        return
    if arguments.json:
        _write(json.dumps(scores, indent=2))
    else:
        _print(score_table(scores, {name: task.metric for name, task in config.tasks.items()}))


def _predict(arguments: argparse.Namespace) -> None:
    from mtl_dist.runs.predict import predict_file

    config = _experiment(arguments.run_folder / CONFIG_FILE, arguments.overrides)
    out = arguments.out
    predicted, remarks = predict_file(
        config,
        arguments.run_folder,
        arguments.task,
        arguments.file,
        out,
        arguments.format,
        arguments.out_format,
        arguments.overwrite,
        arguments.probabilities,
    )
    if _is_first_rank():
        _write(f"{out}: {predicted:,} predictions")
        for remark in remarks:
            print(remark, file=sys.stderr)


def _errors(arguments: argparse.Namespace) -> None:
    from mtl_dist.runs.error_page import tables
    from mtl_dist.runs.errors import errors_of_run
    from mtl_dist.runs.story import config_of

    folder = arguments.run_folder
    config = config_of(folder, arguments.overrides)
    found = errors_of_run(config, folder, arguments.task, arguments.split, arguments.most, arguments.out)
    if not _is_first_rank():
        return
    if arguments.json:
        _write(json.dumps(found.as_json(), indent=2))
    else:
        for part in tables(found.about, found.analysis, found.files):
            _print(part)


def _refuse_launcher(what: str) -> None:
    if "WORLD_SIZE" in os.environ:
        raise UserError(f"{what} starts its processes itself: leave `accelerate launch -m` away, and say --jobs")


def _study(arguments: argparse.Namespace) -> None:
    _refuse_launcher("a study")
    from mtl_dist.studies.study import study

    study(
        arguments.overrides,
        arguments.out,
        arguments.seeds,
        arguments.scale,
        arguments.lr_scale,
        arguments.only,
        arguments.jobs,
        arguments.slurm,
        ["mtl-dist", *arguments.words],
    )


def _compare(arguments: argparse.Namespace) -> None:
    from mtl_dist.studies.compare import compared
    from mtl_dist.studies.document import as_json
    from mtl_dist.studies.table import cells_of, changes_of

    section, problems = compared(arguments.run_folders)
    if section is not None and arguments.json:
        _write(json.dumps(as_json(section), indent=2))
    elif section is not None:
        cells = cells_of(section)
        _print(cells.as_table(), width=300)
        for note in cells.notes:
            _write(note)
        if (changes := changes_of(section.rows)) is not None:
            _write("")
            _print(changes.as_table(), width=300)
    if problems:
        raise UserError("\n".join(problems))


def _prepare(arguments: argparse.Namespace) -> None:
    config = _experiment(arguments.config, arguments.overrides)
    from mtl_dist.data.prepare import train_rows_in_dev
    from mtl_dist.data.tokenizer import load_tokenizer
    from mtl_dist.training.setup import data_table, load_data
    from mtl_dist.watch.screen import make_console

    splits = load_data(config, load_tokenizer(config.encoder.tokenizer_source), make_console(True, stderr=True))
    _print(data_table(splits))
    for line in train_rows_in_dev(splits["train"], splits["dev"]):
        print(line, file=sys.stderr)


def _validate(arguments: argparse.Namespace) -> None:
    config = _experiment(arguments.config, arguments.overrides)
    import numpy as np

    from mtl_dist.data.prepare import also_in_train, count_rows, rows_among
    from mtl_dist.data.read import File
    from mtl_dist.data.tokenizer import load_tokenizer

    counts: dict[str, dict[str, int]] = {}
    problems: list[str] = []
    remarks: list[str] = []  # shown where nothing is wrong, or they would hide what is
    with _noting(problems):
        load_tokenizer(config.encoder.tokenizer_source)
    for name, task in config.tasks.items():
        of_train = array("Q")
        with _noting(problems):
            config.max_length(name)
        for split in ("train", "dev", "test"):
            source = config.source(name, split)
            if split == "test" and isinstance(source, File) and not os.path.exists(source.path):  # noqa: PTH110
                remarks.append(f"{name} test: {source.path} is not there; training does without it")
            elif source is not None:
                digests = array("Q")  # a list takes eight times as much
                with _noting(problems), config.naming(name, split):
                    # Test files often have no labels.
                    counts[f"{name} {split}"] = count_rows(
                        f"task '{name}', {split}", task.reading(split != "test"), source, digests.append
                    )
                if split == "train":
                    of_train = digests
                elif shared := rows_among([np.array(of_train)], np.array(digests)):
                    remarks.append(also_in_train(f"{name} {split}", shared, len(digests)))
    if not problems:
        rows = {name: counts[f"{name} train"]["usable"] for name in config.tasks}
        for stage in config.all_stages():
            with _noting(problems):
                stage.order(rows, config.seed)
    if problems:
        raise UserError("\n".join(problems))
    for remark in remarks:
        print(remark, file=sys.stderr)
    if arguments.json:
        _write(json.dumps({"config": str(arguments.config), "rows": counts}, indent=2))
    else:
        for name, numbers in counts.items():
            _write(f"{name}: {numbers['usable']:,} rows, {numbers['rejected']:,} skipped")
        _write(f"{arguments.config} is valid")


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        problems.append(str(error))


def _doctor(arguments: argparse.Namespace) -> None:
    from mtl_dist.doctor import facts, tables

    if not _is_first_rank():
        return
    found = facts()
    if arguments.json:
        _write(json.dumps(asdict(found), indent=2))
    else:
        for part in tables(found):
            _print(part)


def _schema(arguments: argparse.Namespace) -> None:
    from mtl_dist.experiment import Experiment

    _write(json.dumps(schema(Experiment), indent=2))


def _share(text: str) -> tuple[str, float]:
    task, _, share = text.partition("=")
    return task, float(share)


def _corpus(arguments: argparse.Namespace) -> None:
    from mtl_dist.data.corpus import SHARES, write_corpus

    shares = dict(arguments.shares or SHARES)
    with refusing(f"cannot write {arguments.folder}"):
        sizes = write_corpus(
            arguments.folder, rows=arguments.rows, shares=shares, dev_rows=arguments.dev_rows, seed=arguments.seed
        )
    _write(f"{arguments.folder}: {', '.join(f'{size:,} rows of {task}' for task, size in sizes.items())}")


def _print(renderable: object, width: int | None = None) -> None:
    """To the screen; into a file as wide as it takes, where that may be much."""
    from mtl_dist.watch.screen import make_console

    console = make_console(True, lasting=False)
    if width and not console.is_terminal:
        console.width = width
    with _output():
        console.print(renderable)


def _write(text: str) -> None:
    with _output():
        print(text, flush=True)


@contextmanager
def _output() -> Iterator[None]:
    """Makes a line of an output that cannot be written; what is left of it goes nowhere, or Python's exit fails."""
    try:
        yield
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"cannot write the output: {error.strerror}") from error


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
