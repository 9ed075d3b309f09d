"""Help and errors in arguments need no third parties; help texts are complete and true; known errors exist."""

import argparse
import ast
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from eve_ds.cli import benchmark, convert, demo, evaluate, finetune, gpu, plan, prepare, pretrain, report
from eve_ds.cli.command import EXIT_CODES, KNOWN_ERRORS, ending, is_debugging, presets, run_command, tasks
from eve_ds.cli.training import read_deepspeed_config, run_training
from eve_ds.config import ConfigError, load_config
from eve_ds.config import presets as all_presets
from eve_ds.export.plain import OFFICIAL
from eve_ds.lost_ranks import RankLostError
from eve_ds.signals import Stopped
from eve_ds.storage import SaveError
from eve_ds.tasks.registry import TASKS

ROOT = Path(__file__).resolve().parents[2]
PARSERS = {module.__name__.rpartition(".")[2]: module.build_parser() for module in (pretrain, finetune, evaluate)}
PARSERS |= {module.__name__.rpartition(".")[2]: module.build_parser() for module in (prepare, report, demo, gpu)}
PARSERS |= {
    "report plan": plan.build_parser(),
    "benchmark": benchmark.build_parser(),
    "quality": benchmark.build_quality_parser(),
}
PARSERS |= {f"convert {name}".strip(): convert.build_parser(name) for name in ("", *convert.COMMANDS)}
COMMAND_LINES = {
    "pretrain": ["--max_steps", "x"],
    "finetune": ["--task", "vqa"],
    "evaluate": ["task"],
    "convert": ["upcycle", "--noise", "-1"],
    "prepare": ["scenes", "--num_samples", "0", "--out", "x"],
    "report": [],
    "demo": ["--seeds", "0"],
    "benchmark": ["nothing"],
    "gpu": ["--seconds", "x"],
}
SLOW = {"torch", "transformers", "deepspeed", "matplotlib", "pydantic", "numpy", "PIL", "rich", "yaml"}


def every(parser):
    """The parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from every(command)


@pytest.mark.parametrize("name", COMMAND_LINES)
@pytest.mark.parametrize("kind", ["help", "wrong"])
def test_nothing_slow_is_imported_before_a_command_runs(name, kind):
    arguments = ["--help"] if kind == "help" else COMMAND_LINES[name]
    code = (
        "import atexit, json, runpy, sys; sys.argv = sys.argv[1:]; "
        "atexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules)))); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(ROOT / "launcher" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (0 if kind == "help" else 2), done.stderr
    assert not SLOW & set(json.loads(done.stdout.splitlines()[-1]))
    if kind == "wrong":
        assert done.stderr.startswith(f"{name}: ")
        assert done.stderr.endswith(" (see --help)\n")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_has_a_help_text(name):
    for parser in every(PARSERS[name]):
        lacking = [
            action.dest
            for action in parser._actions
            if not action.help and not isinstance(action, argparse._SubParsersAction)
        ]
        assert not lacking, (parser.prog, lacking)
        assert parser.epilog is None or "exit codes:\n  0   success\n" in parser.epilog


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_for_a_path_to_write_refuses_what_no_disk_holds(name):
    for parser in every(PARSERS[name]):
        for action in parser._actions:
            if action.dest not in ("out", "json", "csv", "results", "page") or action.nargs == 0:
                continue
            for path in ("s3://bucket/x", "", os.fsdecode(b"\xff")):
                with pytest.raises(argparse.ArgumentTypeError, match=r"is an address|an empty path|is not UTF-8"):
                    action.type(path)


def test_help_names_the_presets_that_exist():
    models = [name for name in all_presets() if not name.startswith("tasks/")]
    assert presets() == ", ".join(models)
    assert presets("tasks") == ", ".join(name.removeprefix("tasks/") for name in all_presets() if name not in models)
    for name in ("pretrain", "finetune", "convert import", "convert upcycle", "report plan"):
        assert presets() in " ".join(PARSERS[name].format_help().split())


def test_help_names_the_recipes_that_are_taken_without_one():
    text = " ".join(PARSERS["finetune"].format_help().split())
    assert all(task.recipe in finetune.RECIPES_HELP for task in TASKS.values())
    assert all(task.scenes_recipe in (None, f"tasks/scenes_{name}") for name, task in TASKS.items())
    assert f"(default: {finetune.RECIPES_HELP})" in text
    assert tasks() == ", ".join(sorted(TASKS))
    assert f"task to learn: {tasks()}" in text


def test_help_names_the_file_of_released_weights():
    assert f"official: {OFFICIAL} beside" in " ".join(PARSERS["convert"].format_help().split())


def classes():
    """(name, module) of every class of the package."""
    for file in (ROOT / "eve_ds").rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        yield from ((node.name, module) for node in nodes if isinstance(node, ast.ClassDef))


def test_known_errors_are_classes_of_the_package():
    for name, code in KNOWN_ERRORS.items():
        modules = [module for found, module in classes() if found == name]
        assert len(modules) == 1, (name, modules)
        kind = getattr(importlib.import_module(modules[0]), name)
        assert issubclass(kind, Exception)
        assert ending(kind("x")) == ending(type("Derived", (kind,), {})("x")) == (code, "x")
        assert code in EXIT_CODES
        assert ending(type(name, (Exception,), {"__module__": "elsewhere"})("x")) is None


def raises(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("train.x (1) must be 2"), 2, "name: train.x (1) must be 2\n"),
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            2,
            "name: x cannot be used: No such file or directory\n",
        ),
        (
            OSError(28, "No space left on device"),
            5,
            "name: No space left on device; make room, and rerun the same command\n",
        ),
        (
            OSError(30, "Read-only file system", "x"),
            5,
            "name: x: Read-only file system; make room, and rerun the same command\n",
        ),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            5,
            "name: No space left on device; make room, and rerun the same command\n",
        ),
        (SaveError("the checkpoint was not saved"), 5, "name: the checkpoint was not saved\n"),
        (Stopped(signal.SIGINT), 130, "name: stopped by SIGINT; rerun the same command to resume\n"),
        (Stopped(signal.SIGTERM), 4, "name: stopped by SIGTERM; rerun the same command to resume\n"),
        (RankLostError("another rank has ended"), 6, "name: another rank has ended\n"),
        (ConfigError("\udcff"), 2, "name: \\udcff\n"),
    ],
)
def test_a_known_error_is_one_line_and_an_exit_code(capsys, error, code, line):
    assert run_command("name", raises(error)) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    "run",
    [lambda action: run_command("name", action), lambda action: run_training("name", lambda stop: action(), str)],
)
def test_an_unknown_error_keeps_its_traceback(run):
    with pytest.raises(ZeroDivisionError):
        run(raises(ZeroDivisionError()))


@pytest.mark.parametrize(
    "run",
    [
        lambda action, debug: run_command("name", action, debug),
        lambda action, debug: run_training("name", lambda stop: action(), str, debug),
    ],
)
def test_debug_shows_the_traceback_before_the_line(capsys, run):
    assert run(raises(ConfigError("train.x (1) must be 2")), False) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert run(raises(ConfigError("train.x (1) must be 2")), True) == 2
    error = capsys.readouterr().err
    assert "train.x (1) must be 2" in error
    assert ", in action\n" in error


@pytest.mark.parametrize("name", PARSERS)
def test_every_command_takes_debug(name):
    for parser in every(PARSERS[name]):
        assert "--debug" in parser.format_help()
        assert not is_debugging(argparse.Namespace())


@pytest.mark.parametrize(
    ("parser", "arguments", "message"),
    [
        ("evaluate", ["ask", "--model", "m", "--image", "i", "--top", "0", "who?"], "--top: 0 must be at least 1"),
        ("evaluate", ["ask", "--model", "m", "--image", "i", "--top", "-1", "who?"], "--top: -1 must be at least 1"),
        ("evaluate", ["task", "--model", "m", "--out", "o", "--batch_size", "0"], "--batch_size: 0 must be at least 1"),
        ("demo", ["--seeds", "0"], "--seeds: 0 must be at least 1"),
        ("quality", ["--seeds", "0"], "--seeds: 0 must be at least 1"),
        ("quality", ["--jobs", "0"], "--jobs: 0 must be at least 1"),
        ("quality", ["--tasks", "caption"], "--tasks: invalid choice: 'caption' (choose from "),
    ],
)
def test_values_of_options_are_checked_before_a_command_runs(capsys, parser, arguments, message):
    with pytest.raises(SystemExit, match=r"^2$"):
        PARSERS[parser].parse_args(arguments)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_page_without_marks_is_refused_before_the_jobs_of_quality(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    (tmp_path / "page.md").write_text("no marks")
    assert benchmark.main(["quality", "--out", str(tmp_path / "o"), "--page", str(tmp_path / "page.md")]) == 2
    assert "page.md lacks the marks <!-- quality --> and <!-- end of quality -->: put them" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_options_are_short_for_overrides():
    arguments = pretrain.build_parser().parse_args(
        ["--set", "train.seed=3", "train.max_steps=1", "--max_steps", "5", "--init", "a", "--output_dir", "b"]
    )
    given = pretrain.overrides(arguments)
    assert given == ["train.seed=3", "train.max_steps=1", 'train.output_dir="b"', "train.max_steps=5", 'train.init="a"']
    assert load_config("eve_tiny", given).train.max_steps == 5


@pytest.mark.parametrize(
    "name",
    [
        *("2024", "1e3", "007", "12:30", "null", "true", "a #1", "run: x", "a: ", "[a]", "{a}", "*x", "&x", "!x", "|"),
        *(">", "%x", "@x", "`x", "'q'", '"q', "- a", "a\\b", "a\nb", "a\tb", "é😀", "a" * 500 + " b" * 500),
    ],
)
@pytest.mark.parametrize("option", ["output_dir", "init"])
def test_the_path_of_an_option_is_taken_as_it_is(option, name):
    arguments = pretrain.build_parser().parse_args([f"--{option}={name}"])
    assert getattr(load_config("eve_tiny", pretrain.overrides(arguments)).train, option) == Path(name)


@pytest.mark.parametrize("spelling", ["--local_rank=1", "--local-rank=1"])
@pytest.mark.parametrize(
    ("parser", "arguments"),
    [
        ("pretrain", []),
        ("finetune", ["--task", "vqa", "--init", "none"]),
        ("evaluate", ["task", "--model", "m", "--out", "o"]),
        ("evaluate", ["zero_shot", "--model", "m", "--out", "o"]),
    ],
)
def test_commands_that_run_on_several_ranks_take_the_local_rank_of_every_launcher(parser, arguments, spelling):
    assert PARSERS[parser].parse_args([*arguments, spelling]).local_rank == 1


@pytest.mark.parametrize("option", ["--deepspeed_config", "--deepspeed-config", "--deepspeed"])
def test_deepspeed_config_is_read_or_refused_in_one_line(tmp_path, option):
    def read(*arguments):
        return read_deepspeed_config(pretrain.build_parser().parse_args(arguments))

    good = tmp_path / "good.json"
    good.write_text('{"a": 1}')
    (tmp_path / "bad.json").write_text("{")
    assert read() is read("--deepspeed") is None
    assert read(option, str(good)) == {"a": 1}
    assert (
        read("--deepspeed", option, str(good)) == read(option, str(good), "--deepspeed_config", str(good)) == {"a": 1}
    )
    with pytest.raises(ConfigError, match=r"^--deepspeed_config \S+/bad\.json is not JSON: "):
        read(option, str(tmp_path / "bad.json"))
    with pytest.raises(ConfigError, match=r"^--deepspeed_config \S+/gone\.json cannot be read: No such file"):
        read(option, str(tmp_path / "gone.json"))


def test_two_files_of_deepspeed_are_refused():
    arguments = pretrain.build_parser().parse_args(["--deepspeed_config", "a.json", "--deepspeed", "b.json"])
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_config(arguments)
    assert str(caught.value) == ("--deepspeed_config (a.json) and --deepspeed (b.json) name two files: leave one out")


def options(parser):
    """Options of a parser that take one value."""
    return [action for action in parser._actions if action.option_strings and action.nargs is None]


@pytest.mark.parametrize("name", PARSERS)
def test_an_empty_value_of_every_option_is_refused(name, capsys):
    for parser in every(PARSERS[name]):
        for action in options(parser):
            option = action.option_strings[0]
            for arguments in ([option, ""], [f"{option}="]):
                with pytest.raises(SystemExit, match=r"^2$"):
                    parser.parse_args(arguments)
                line = f"the value of {option} is empty: is a variable of the shell not set? (see --help)\n"
                assert capsys.readouterr().err.endswith(line)


def test_an_empty_argument_is_refused(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        PARSERS["report"].parse_args([""])
    assert capsys.readouterr().err == "report: the value is empty: is a variable of the shell not set? (see --help)\n"
    assert pretrain.build_parser().parse_args(["--set", "train.init="]).set == ["train.init="]


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_may_have_hyphens_and_a_home_folder(name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for parser in every(PARSERS[name]):
        for action in options(parser):
            option = action.option_strings[0]
            assert parser._spelled(option.replace("_", "-")) in action.option_strings
            assert parser._spelled(f"{option}=~/a") == f"{option}=/home/me/a"
    given = pretrain.build_parser().parse_args(
        ["--output-dir=~/a", "--max-steps", "5", "--init", "~/b", "--set", "a=~"]
    )
    assert (given.output_dir, given.max_steps, given.init, given.set) == ("/home/me/a", 5, "/home/me/b", ["a=~"])


def test_a_step_of_the_demo_shows_its_log_and_nothing_else(tmp_path):
    """Lines of our log go to descriptor 0; libraries, warnings and child processes write to the log file."""
    code = (
        "import os, subprocess, sys, warnings; from eve_ds.cli.command import start_log; log = start_log(); "
        "assert 'EVE_DS_TERMINAL_FD' not in os.environ; "
        "log.info('shown'); print('output'); warnings.warn('warning', FutureWarning); os.write(2, b'native\\n'); "
        "subprocess.run(['sh', '-c', 'echo child >&2'])"
    )
    files = [tmp_path / "terminal", tmp_path / "log"]
    with files[0].open("w") as terminal, files[1].open("w") as log:
        environment = os.environ | {"EVE_DS_TERMINAL_FD": "0"}
        command = [sys.executable, "-u", "-c", code]
        subprocess.run(command, stdin=terminal, stdout=log, stderr=log, env=environment, check=True, timeout=60)
    shown, logged = (file.read_text() for file in files)
    assert shown.endswith(" INFO shown\n")
    assert shown.count("\n") == 1
    assert all(word in logged for word in ("output\n", "FutureWarning: warning\n", "native\n", "child\n"))
    assert "shown" not in logged
