"""Search a mixed A4/A8 allocation over W4 weights and write the plan."""

from halfbyte.cli import run

if __name__ == "__main__":
    raise SystemExit(run("search"))
