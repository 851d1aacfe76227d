"""What ``halfbyte doctor --served`` says of a folder."""

from __future__ import annotations

from halfbyte.report.tables import text_table
from halfbyte.targets.served.report import ServedReport, block_rows


def served_summary(report: ServedReport) -> str:
    """What each layer of a served folder is computed as, why, and how to have it otherwise."""
    headers, *rows = block_rows(report.layers)
    lines = [
        f"{report.folder.path} on {report.hardware.name} ({report.hardware.key})",
        f"{report.note}\n",
        text_table(["the folder says → computed as", "layers"], [[*row] for row in report.counts.items()]),
        *(f"  {reason}" for reason in report.reasons),
        "\n" + text_table(headers, [[*row] for row in rows]),
    ]
    if report.folder.unquantised:
        lines.append(f"not quantised: {', '.join(report.folder.unquantised)}")
    lines += [f"problem: {problem}" for problem in report.folder.problems]
    for way in report.ways:
        counts = "; ".join(f"{count} {what}" for what, count in way.counts.items())
        lines.append(f"\n{way.name}: {way.command}\n  {counts}")
    if report.engine == "vllm":
        sizes = ", ".join(map(str, report.tensor_parallel))
        lines.append(f"\ntensor parallel: {sizes} GPUs divide the layers evenly")
    if not report.twins:
        lines.append(
            "to check: --twins TWINS writes copies with other activation bits; docs/serving.md says how to compare"
        )
    return "\n".join(lines)
