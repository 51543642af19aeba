"""The programs that a person runs, one module each, with ``main(arguments) -> exit status``.

``python -m gr NAME`` and the command ``gr NAME`` start them by name, ``python -m gr.programs.NAME`` and
``launch/NAME.py`` one alone; torchrun starts several processes of one with ``-m gr.programs.NAME``.
"""
