"""The pipeline that a user would write with the same libraries: whole files, loops over objects, no batches but the
network's.

It gives the same answers as the product by plainer means, and shares none of its kernels: so it is a measure of what
these gain, and a check of what they compute. Only what costs next to nothing is taken from the product: the constants
of the definitions, and the choice of the point sources.
"""
