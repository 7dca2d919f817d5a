"""The embedded sample: captioned artificial scenes with known duplicates, for the demo and the tests."""
