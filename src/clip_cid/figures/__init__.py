"""The figures of the paper and of the report: each takes arrays and writes a figure and its CSV."""
