"""Who does the work: threads, processes or a Dask cluster."""
