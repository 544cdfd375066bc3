"""What selections compute in kernels on a GPU. The modules here need Triton: import them only where
`retrace.analyze.units.kernels.usable` says so."""
