"""The figures of a run: their inputs, their captions and their places on the page."""
