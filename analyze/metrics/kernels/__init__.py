"""All metrics of a selection on a GPU, in Triton: what the compiled loops are on a CPU.

    walk      one program per query and head: ranks, recall, mass, output and error of its list
    unions    distinct keys that the heads of a group attend
    sums      moments over queries, of all and bucket by bucket, and histograms

`tally` strings them together. `retrace.analyze.metrics.measure.plain_tally` is the definition of
all of it. The modules here need Triton: import them only where `usable` says so.
"""
