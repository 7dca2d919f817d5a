"""The figures of the paper and the report's page: arrays in; a figure and the CSV behind it out."""
