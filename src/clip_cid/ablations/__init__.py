"""The paper's Tables 4 to 7 as lists of recipe changes, run with several seeds and put into one table.

Each variant with each seed is an ordinary run folder in OUT/runs. A run takes over a stage that
another of these runs has finished from the same settings and inputs, so what does not change between
variants is computed once.
"""
