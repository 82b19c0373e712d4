"""The documents hold: links lead somewhere, commands and options exist, the example of the Python interface runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from vzfs import Store
from vzfs.cli.app import cli
from vzfs.store.check import check_container

TOP = Path(__file__).parents[1]
PAGES = sorted([*TOP.glob("*.md"), *TOP.glob("docs/*.md")])
COMMAND = re.compile(r"(?:^|[$<]\(|[|&;] |/)vzfs ([^)]*)")
SHELL_WORDS = {"|", "||", "&&", ";", "&"}


def links(page: Path) -> list[Path]:
    """Where a page's links to files lead."""
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    return [(page.parent / target).resolve() for target in targets if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert [target for target in links(page) if not target.exists()] == []


def test_every_page_is_reached_from_the_start() -> None:
    reached, waiting = set(), [TOP / "README.md"]
    while waiting:
        page = waiting.pop()
        if page.suffix == ".md" and page not in reached:
            reached.add(page)
            waiting += links(page)
    assert sorted(set(PAGES) - reached) == []


def code_lines(page: Path) -> Iterator[str]:
    """Lines of a page's code: indented by four, or between fences."""
    fenced = False
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def commands(page: Path) -> Iterator[list[str]]:
    """The ``vzfs`` commands in a page's code, each as its words, without what a shell does with them."""
    for line in code_lines(page):
        for text in COMMAND.findall(line):
            if re.search(r"\[|\.\.\.|…|\|-", text):
                continue  # a synopsis
            words = []
            for word in shlex.split(text, comments=True):
                if word in SHELL_WORDS or word.startswith(("<", ">")):
                    break
                words.append(word.rstrip(";"))
                if word.endswith(";"):
                    break
            yield words


ALL_COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}") for page in PAGES for words in commands(page) if words
]


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_commands_and_options_exist(words: list[str]) -> None:
    command: click.Command = cli
    context = click.Context(cli)
    rest = list(words)
    while rest:
        known = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
        takes = {
            name
            for parameter in command.params
            if isinstance(parameter, click.Option) and not parameter.is_flag and not parameter.count
            for name in parameter.opts
        }
        word = rest.pop(0)
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in known | {"--help", "-h"}, f"{command.name} has no option {word}"
            if word in takes:
                assert rest, f"{word} needs a value"
                rest.pop(0)
        elif isinstance(command, click.Group):
            found = command.get_command(context, word)
            if word == "COMMAND":
                return
            assert found is not None, f"there is no command {word}"
            command = found


def test_there_are_commands_to_check() -> None:
    assert len(ALL_COMMANDS) > 40


def test_every_kind_of_problem_is_explained() -> None:
    page = (TOP / "docs/troubleshooting.md").read_text()
    module = sys.modules[check_container.__module__]
    kinds = re.findall(r"^    ([a-z-]+) {3,}\S", module.__doc__ or "", re.MULTILINE)
    assert len(kinds) > 8
    assert [kind for kind in kinds if f"| `{kind}`" not in page] == []


def copy_program(program: str, top: Path) -> None:
    """Copy a program and the libraries that it needs."""
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for path in [program, *re.findall(r"(/\S+) \(", libraries)]:
        target = top / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)


def test_the_example_for_lifecycle_managers_runs(tmp_path: Path) -> None:
    page = (TOP / "docs/lifecycle.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    example = tmp_path / "run-in-container"
    example.write_text(code)
    source = tmp_path / "source"
    source.mkdir()
    copy_program("/bin/sh", source)
    store = Store(tmp_path / "vz")
    store.create_template("debian-12", str(source))
    environment = {**os.environ, "VZFS_ROOT": str(store.root), "PYTHONPATH": str(TOP)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(example), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    first = run("101", "/bin/sh", "-c", "echo hello > /made; exit 3")
    assert (first.returncode, first.stderr) == (3, "")
    second = run("101", "/bin/sh", "-c", "read line < /made; echo $line")
    assert (second.returncode, second.stdout, second.stderr) == (0, "hello\n", "")
    container = store.container(101)
    assert not container.status().mounted
    with container.mounted():
        third = run("101", "/bin/sh", "-c", "read line < /made; echo $line")
        assert (third.returncode, third.stdout) == (0, "hello\n")
        assert container.status().mounted
    refused = run("0", "/bin/sh")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "'0' can't" in refused.stderr
    container.destroy()
