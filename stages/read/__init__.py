"""Reading of Level-1 exposures: file names, headers, pixels and catalogues."""
