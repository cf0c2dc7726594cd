"""Pages of the documentation that are made when it is built, so that none can be out of date.

The reference of options comes from the configurations, the results from ``benchmarks/results``, the
list of decisions from the files in ``docs/decisions``, and the figures from what they show.
"""
