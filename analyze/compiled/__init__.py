"""What PyTorch has no operation for, as loops over rows, compiled by numba for a CPU.

Matrix products and exponentials stay with PyTorch. Beside each loop stands what defines its result:
`top.plain_top` for `ranking`, `measure.plain_tally` for `metrics`. Modules here take a moment
to import: import them where they are used.
"""
