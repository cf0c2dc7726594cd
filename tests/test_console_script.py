"""``dsa-hw``: every verb as ``python -m dsa_hw.VERB`` has it, at once, and with completion."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import dsa_hw
from dsa_hw import __main__ as script
from dsa_hw.runs.completion import completion_script
from dsa_hw.runs.config import COMMANDS, SCRIPT

HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "pandas", "scipy", "matplotlib", "numpy")

COMPLETE = """
source {script}
[[ $(complete -p dsa-hw) =~ -F\\ ([^\\ ]+) ]] && function=${{BASH_REMATCH[1]}}
COMP_WORDS=({words} "{last}"); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); COMPREPLY=()
"$function" dsa-hw "{last}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        script.main(words)
    assert left.value.code == 0
    return capsys.readouterr().out


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert help_of(["--version"], capsys) == f"dsa-hw {dsa_hw.__version__}\n"


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(["--help"], capsys)
    assert all(f"\n    {verb}" in text for verb in COMMANDS)


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_verb_has_the_options_of_its_module(verb: str, capsys: pytest.CaptureFixture) -> None:
    module = subprocess.run(
        [sys.executable, "-m", f"dsa_hw.{verb}", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    options = [line for line in module.stdout.splitlines() if line.startswith("  ")]
    assert options == [
        line for line in help_of([verb, "--help"], capsys).splitlines() if line.startswith("  ")
    ]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_option_is_hyphenated(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = help_of([verb, "--help"], capsys).split()
    assert not [word for word in words if word.startswith("--") and "_" in word]


def test_what_is_no_verb_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["prnue", "--target-ms", "3"]) == 2
    assert capsys.readouterr().err == "dsa-hw: unknown verb 'prnue'; did you mean prune?\n"
    assert script.main([]) == 2
    assert "profile" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--version"], ["--help"], *([v, "--help"] for v in COMMANDS)])
def test_help_imports_nothing_that_is_slow_to_import(words: list[str]) -> None:
    """A help that takes a second is a help that imports torch; what is imported is the law."""
    code = (
        "import sys\nfrom dsa_hw.__main__ import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        f"print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("HEAVY []\n")


def test_the_package_imports_its_parts_on_first_use() -> None:
    code = (
        "import sys, dsa_hw\nassert 'torch' not in sys.modules\n"
        "assert set(dsa_hw.__all__) <= set(dir(dsa_hw))\n"
        "for name in dsa_hw.__all__: getattr(dsa_hw, name)\nassert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_console_script_is_installed() -> None:
    found = entry_points(group="console_scripts", name=SCRIPT)
    assert {entry.load() for entry in found} == {script.main}


def test_one_s_own_factory_is_found_in_the_working_folder_and_shadows_nothing(
    tmp_path: Path,
) -> None:
    """As an installed script runs: without the working folder on the path."""
    (tmp_path / "my_net.py").write_text("def build(): raise SystemExit('built')\n")
    (tmp_path / "yaml.py").write_text("raise SystemExit('shadowed')\n")
    root = str(Path(dsa_hw.__file__).parent.parent)
    code = (
        f"import sys; sys.path[:] = [{root!r}] + [p for p in sys.path if p]\n"
        "from dsa_hw.__main__ import main\n"
        "main(['prune', '--model', 'my_net:build', '--target-ratio', '0.5', '--epochs', '0'])"
    )
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr.strip().endswith("built")


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "last", "wanted"),
    [
        ("dsa-hw", "pr", {"profile", "prune"}),
        ("dsa-hw", "comp", {"compare", "completion"}),
        ("dsa-hw completion", "", {"bash", "zsh"}),
        ("dsa-hw prune", "--target", {"--target-ms", "--target-ratio"}),
        ("dsa-hw compare", "--target", {"--targets-ms", "--target-ratios"}),
        ("dsa-hw prune --budget", "", {"latency", "flops", "params", "memory"}),
        ("dsa-hw prune --budget latency", "f", {"flops"}),
        ("dsa-hw prune --remove-branches", "", {"true", "false"}),
        ("dsa-hw prune --weights", "net", {"net.safetensors"}),
        ("dsa-hw report", "ru", {"runs"}),
        ("dsa-hw validate --run", "ru", {"runs"}),
    ],
)
def test_bash_completes(words: str, last: str, wanted: set[str], tmp_path: Path) -> None:
    (tmp_path / "script.bash").write_text(completion_script("dsa-hw", "bash"))
    (tmp_path / "net.safetensors").touch()
    (tmp_path / "runs").mkdir()
    done = subprocess.run(
        ["bash", "--norc", "-c", COMPLETE.format(script="script.bash", words=words, last=last)],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == wanted


def test_completion_is_offered_for_known_shells_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef dsa-hw")
    with pytest.raises(SystemExit):
        script.main(["completion", "csh"])
