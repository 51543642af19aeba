"""Write the vectors that an encoder gives to the texts or pictures of a dataset's items, for training with
model.item_tower mode cached.

The program is gr/programs/encode.py: `python -m gr encode` is the same.
"""

from gr.programs.encode import main

if __name__ == "__main__":
    raise SystemExit(main())
