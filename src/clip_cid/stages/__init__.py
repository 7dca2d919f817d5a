"""The stages: `facts.py` says what each is, without torch; `STAGE.py` does its work."""
