"""The book says what is there: fields and defaults, flags, commands, files that are linked to."""

import dataclasses
import re
from pathlib import Path

import pytest

from llmgen import cli, config, flags

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("table", config.TABLES)
def test_every_field_of_a_config_is_there_with_its_default(table):
    text = (ROOT / "docs" / "configuration.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^|]*?)`? \|", text, re.M))
    for field in dataclasses.fields(config.TABLES[table]):
        default = field.default
        if isinstance(default, tuple):
            default = list(default)
        assert rows[field.name] == ("required" if default is dataclasses.MISSING else config.toml_value(default)), field.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, heading = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), target
            headings = {re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in titles(linked)}
            assert not heading or heading in headings, target


def titles(page: Path) -> list[str]:
    return [line for line in page.read_text().splitlines() if line.startswith("#")] if page.suffix == ".md" else []


@pytest.mark.parametrize("page", [ROOT / "docs" / name for name in ("training.md", "quick-start.md")], ids=lambda p: p.name)
def test_flags_and_commands_in_the_text_are_known(page):
    text = page.read_text()
    options = {option for command in cli.cli.commands.values() for p in command.params for option in p.opts}
    known = {f"--{flag.name}" for flag in flags.FLAGS} | options | {"--help", "--version", "--logdir"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known
    assert set(re.findall(r"^llmgen ([a-z-]+)", text, re.M)) <= set(cli.cli.commands)
