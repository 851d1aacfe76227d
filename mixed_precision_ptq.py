"""Search which layers of a W4 model get A4 and which A8, and write the plan."""

from halfbyte.cli import run

if __name__ == "__main__":
    raise SystemExit(run("search"))
