"""The command from outside: what there is, how fast it answers, what it imports, what it refuses."""

from __future__ import annotations

import importlib
import os
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from polar_deploy import __version__, cli, completion, targets
from polar_deploy.errors import MachineError
from polar_deploy.stages import NAMES
from tests.conftest import ROOT, Outcome, called, child_environment

HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "sklearn")


def timed(*arguments: str, cwd: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Processor seconds of a child, without coverage, which would be measured too, and what it said."""
    environment = child_environment(traced=False)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def trt_is_missing() -> bool:
    try:
        targets.check(targets.parse("trt-fp16"))
    except MachineError:
        return True
    return False


# --------------------------------------------------------------------------- fast answers


def test_help_answers_without_anything_heavy(tmp_path: Path) -> None:
    _, done = timed("-X", "importtime", "-m", "polar_deploy.pipeline", "--help", cwd=tmp_path)
    assert done.returncode == 0
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "polar_deploy.config" in imported  # so the lines are understood
    assert imported.isdisjoint({"numpy", "PIL", *HEAVY})
    options = {"--model", "--target", "--data", "--budget", "--from", "--until", "--dry-run", "--set", "--json"}
    assert options <= set(re.findall(r"--[a-z-]+", done.stdout))
    assert all(stage in done.stdout for stage in NAMES)


def test_surgery_is_imported_at_once_and_imports_nothing_heavy(tmp_path: Path) -> None:
    calls = [timed("-c", "import polar_deploy.surgery", cwd=tmp_path) for _ in range(9)]
    assert statistics.median(seconds for seconds, _ in calls) <= 0.3
    code = f"import polar_deploy.surgery, polar_deploy.pipeline, sys; print([m for m in {HEAVY} if m in sys.modules])"
    _, done = timed("-c", code, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr


def test_the_stages_are_known_without_anything_heavy(tmp_path: Path) -> None:
    code = "import polar_deploy.stages, sys; print([m for m in ('numpy', 'pydantic', 'torch') if m in sys.modules])"
    _, done = timed("-c", code, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("command", ["polar_deploy", "polar_deploy.bundle", "polar_deploy.devices"])
def test_help_of_a_group_imports_none_of_its_commands(command: str, tmp_path: Path) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['{command}', '--help']\n"
        f"try: runpy.run_module('{command}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'onnx', 'torch', 'yaml', 'polar_deploy.pipeline'} & set(sys.modules)), file=sys.stderr)"
    )
    _, done = timed("-c", code, cwd=tmp_path)
    assert done.stdout.startswith("usage: ")
    assert done.stderr == "[]\n"


# --------------------------------------------------------------------------- the tree

HELP = """\
usage: polar-deploy [-h] [-V] COMMAND ...

Turn a CNN into a smaller, faster engine while it trains, prove that it is still as good, and hand it over.

options:
  -h, --help     show this help message and exit
  -V, --version  show program's version number and exit

commands:
  COMMAND
    run          train, cut, build, compare, bundle: all of it, or some stages
    sweep        many runs, budgets × seeds × targets, trained side by side on Ray
    surgery      cut closed channels and blocks out of an ONNX graph
    engines      what runs here, and how fast
    bundle       what an edge team does with a bundle
    gates        the gates of a run
    report       the reports of runs
    doctor       what this machine can build and run, and what the rest takes
    settings     list every setting with its default, unit and meaning
    devices      what widths cost on devices
    completion   print what makes the tab key complete all of this
"""


def command_line(*arguments: str) -> Outcome:
    """`polar-deploy …` in this process; --help and wrong options end it by SystemExit."""

    def main(argv: Sequence[str]) -> int:
        try:
            return cli.main(argv)
        except SystemExit as ended:
            return int(ended.code or 0)

    return called(main, *arguments)


def leaves(node: cli.Node, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], cli.Command]]:
    """Every command with its names."""
    if isinstance(node, cli.Command):
        yield path, node
    else:
        for name, child in node.commands.items():
            yield from leaves(child, (*path, name))


COMMANDS = dict(leaves(cli.COMMANDS))


def test_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/polar-deploy"])
    outcome = command_line("--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == HELP


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_and_its_options(names: tuple[str, ...]) -> None:
    outcome = command_line(*names, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "--debug" in outcome.out
    parser = cli.parser(COMMANDS[names], "x", ())
    assert parser.description
    for action in parser._actions:
        assert action.help, f"{names}: {action.dest}"


@pytest.mark.parametrize(
    ("shim", "names"),
    [
        ("polar_deploy.pipeline", ("run",)),
        ("polar_deploy.surgery", ("surgery",)),
        ("polar_deploy.engines", ("engines",)),
        ("polar_deploy.bundle", ("bundle",)),
        ("polar_deploy.report", ("report",)),
        ("polar_deploy.devices", ("devices",)),
    ],
)
def test_the_modules_of_before_are_the_same_commands(shim: str, names: tuple[str, ...]) -> None:
    module = importlib.import_module(shim if shim == "polar_deploy.pipeline" else f"{shim}.__main__")

    def main(argv: Sequence[str]) -> int:
        with pytest.raises(SystemExit) as ended:
            module.main(argv)
        assert isinstance(ended.value.code, int)
        return ended.value.code

    theirs, ours = called(main, "--help"), command_line(*names, "--help")
    assert theirs.out.startswith(f"usage: python -m {shim} ")
    _, _, body = theirs.out.partition("\n\n")
    assert body == ours.out.partition("\n\n")[2]
    assert called(main, "--no-such-option").code == 2


def test_the_same_by_python_m(tmp_path: Path) -> None:
    _, done = timed("-m", "polar_deploy", "--version", cwd=tmp_path)
    assert done.stdout == f"polar_deploy {__version__}\n"
    _, done = timed("-m", "polar_deploy", "settings", "momentum", cwd=tmp_path)
    assert "momentum: 0.9" in done.stdout
    _, done = timed("-m", "polar_deploy", "run", "--no-such-option", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m polar_deploy run ")


def test_an_option_that_there_is_not_is_told_by_its_command() -> None:
    outcome = command_line("run", "--modle", "resnet20")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("usage: ")
    assert "--full-weights" in outcome.err
    assert outcome.err.endswith(" run: error: unrecognized arguments: --modle resnet20; did you mean --model?\n")
    assert command_line("settings", "--whatever").err.endswith("unrecognized arguments: --whatever\n")
    for words, meant in ((("surgry", "a.onnx"), "surgery"), (("report", "compar"), "compare")):
        outcome = command_line(*words)
        told = f"error: there is no command {words[0] if meant == 'surgery' else words[1]}; did you mean {meant}?\n"
        assert (outcome.code, outcome.err.endswith(told)) == (2, True)
    early = command_line("--quiet", "run", "--model", "resnet20")  # options stand behind their command
    assert early.code == 2
    assert early.err.endswith(" run: error: unrecognized arguments: --quiet\n")


@pytest.mark.parametrize("arguments", [(), ("nothing",), ("bundle",), ("bundle", "nothing"), ("--model", "resnet20")])
def test_a_command_that_there_is_not(arguments: tuple[str, ...]) -> None:
    outcome = command_line(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "error: " in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--model", "resnet20"), "interrupted; the same command goes on from here\n"),
        (("bundle", "schema"), "interrupted\n"),
        (("settings",), "interrupted\n"),
    ],
)
def test_what_is_said_after_ctrl_c(arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parser", interrupted)
    outcome = command_line(*arguments)
    assert (outcome.code, outcome.err) == (130, said)


def test_names_that_a_terminal_cannot_show(tmp_path: Path) -> None:
    """On an ASCII terminal what cannot be shown is written otherwise, and no error."""
    environment = child_environment() | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "polar_deploy", "settings", "größe"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="ascii", cwd=tmp_path)
    assert done.returncode == 2
    assert "no setting has 'gr\\xf6\\xdfe'" in done.stderr


# --------------------------------------------------------------------------- completion


def test_completion_knows_commands_options_and_files() -> None:
    pytest.importorskip("shtab")
    outcome = command_line("completion", "bash")
    assert outcome.code == 0
    assert subprocess.run(["bash", "-n"], input=outcome.out, text=True).returncode == 0
    for names in COMMANDS:
        assert f"_shtab_polar_deploy_{'_'.join(names)}_option_strings=(-h --help" in outcome.out
    assert "_shtab_polar_deploy_run___full_weights_COMPGEN=_shtab_compgen_files" in outcome.out
    assert "_shtab_polar_deploy_run___out_COMPGEN=_shtab_compgen_dirs" in outcome.out


def test_completion_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "find_spec", lambda name: None)
    outcome = command_line("completion", "bash")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err == (
        "error: shtab is not installed\n  what to do: install it, in the checkout: pip install '.[completion]'\n"
    )


def test_the_console_script_is_this_command() -> None:
    script = re.search(r'^polar-deploy = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert script
    function = getattr(importlib.import_module(script[1]), script[2])
    with pytest.raises(SystemExit) as stopped:
        function(["--version"])
    assert stopped.value.code == 0


def test_argparse_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for wrong in (["--modle", "resnet20"], ["--until", "nowhere"]):
        _, done = timed("-m", "polar_deploy.pipeline", *wrong, cwd=tmp_path)
        assert done.returncode == 2
        assert "error: " in done.stderr
        assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------- TensorRT where there is none


@pytest.mark.skipif(not trt_is_missing(), reason="this machine can build for TensorRT")
def test_a_target_that_cannot_be_built_is_refused_at_once(tmp_path: Path) -> None:
    command = ("-m", "polar_deploy.pipeline", "--model", "resnet56", "--target", "trt-fp16")
    seconds, done = timed(*command, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert seconds <= 3
    first, todo = done.stderr.splitlines()
    assert first.startswith("error: target trt-fp16 cannot be built here: ")
    assert "tensorrt" in first
    assert "what to do: use --target ort-fp32" in todo
    assert "--until surgery" in todo
    assert os.listdir(tmp_path) == []
