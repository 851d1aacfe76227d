"""Write the option tables from the dataclasses that own the defaults: ``python docs/generate.py``."""

from __future__ import annotations

from pathlib import Path

from halfbyte.arguments import choices_of, help_of, in_groups
from halfbyte.cli import COMMANDS
from halfbyte.report.tables import markdown_table

SCRIPTS = {
    "search": "mixed_precision_ptq.py",
    "export": "export_gguf_official.py",
    "compare": "compare_real_quant.py",
    "simulate": "test_mixed_precision.py",
}


def option_tables() -> str:
    """One section per command, one table per group: flag, default, meaning."""
    sections = ["# Options\n\nMade by `docs/generate.py` from `src/halfbyte/options.py`; a test keeps it true."]
    for command, (options, work, _) in COMMANDS.items():
        also = f" (`{SCRIPTS[command]}`)" if command in SCRIPTS else ""
        sections.append(f"## halfbyte {command}{also}\n\n{work.__doc__}")
        for group, items in in_groups(options).items():
            table = markdown_table(["flag", "default", "meaning"], [_row(item) for item in items], "lll")
            sections.append(f"**{group.capitalize()}**\n\n{table}" if group else table)
    return "\n\n".join(sections) + "\n"


def _row(item) -> list[str]:
    choices = choices_of(item)
    meaning = help_of(item) + (f" (`{'`, `'.join(choices)}`)" if choices else "")
    default = ("on" if item.default else "off") if isinstance(item.default, bool) else item.default
    return [f"`--{item.name}`", "—" if default in (None, "") else f"`{default}`", meaning]


if __name__ == "__main__":
    (Path(__file__).parent / "options.md").write_text(option_tables(), encoding="utf-8")
