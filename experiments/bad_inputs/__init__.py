"""Bad inputs, from the command line to the inside of files, and the one line that answers each.

The table is data: what is wrong, the command, its arguments, what puts the input there and what the
line says. Tests walk it; `python -m experiments.bad_inputs docs/bad-inputs.md` writes it down.
"""
