"""Take a model out of its run: a folder of safetensors, config and item ids that evaluate and recommend take as a run.

The program is gr/programs/export.py: `python -m gr export` is the same.
"""

from gr.programs.export import main

if __name__ == "__main__":
    raise SystemExit(main())
