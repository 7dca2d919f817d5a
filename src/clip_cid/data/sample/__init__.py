"""The embedded sample: captioned scenes of the package's own invention, with known duplicates, for the demo and the tests."""
