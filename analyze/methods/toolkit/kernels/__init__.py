"""What methods compute for every query and key of a block, on a GPU, in Triton.

    random_numbers   the same random numbers as on a CPU, place by place
    collisions       in how many hash tables a query and a key share a bucket
    soft_votes       the chance that a query gives to the buckets of a key
    draws            the smallest numbers of each row, and what a sample says of its whole
    lists            the positions that are marked in each row

What defines a kernel are the few lines of PyTorch that take its place on a CPU, in the module that
calls it. The modules here need Triton: import them only where
`retrace.analyze.units.kernels.usable` says so.
"""
