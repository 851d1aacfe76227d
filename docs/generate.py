"""Write the option tables from the dataclasses that own the defaults: ``python docs/generate.py``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from halfbyte.cli import COMMANDS
from halfbyte.report.tables import markdown_table

SCRIPTS = {
    "search": "mixed_precision_ptq.py",
    "export": "export_gguf_official.py",
    "compare": "compare_real_quant.py",
    "simulate": "test_mixed_precision.py",
}


def option_tables() -> str:
    """One section per command: flag, default, meaning."""
    sections = ["# Options\n\nMade by `docs/generate.py` from `src/halfbyte/options.py`; a test keeps it true."]
    for command, (options, work) in COMMANDS.items():
        also = f" (`{SCRIPTS[command]}`)" if command in SCRIPTS else ""
        rows = []
        for item in fields(options):
            choices = item.metadata["choices"]
            meaning = item.metadata["help"] + (f" (`{'`, `'.join(choices)}`)" if choices else "")
            default = "off" if item.default is False else "on" if item.default is True else item.default
            rows.append([f"`--{item.name}`", "—" if default is None else f"`{default}`", meaning])
        table = markdown_table(["flag", "default", "meaning"], rows, "lll")
        sections.append(f"## halfbyte {command}{also}\n\n{work.__doc__}\n\n{table}")
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "options.md").write_text(option_tables(), encoding="utf-8")
