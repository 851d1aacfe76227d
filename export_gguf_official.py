"""Export a plan as a GGUF file for llama.cpp."""

from halfbyte.cli import run

if __name__ == "__main__":
    raise SystemExit(run("export"))
