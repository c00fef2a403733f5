"""How a run is carried out: command line, configuration, plan, Dask, report."""
