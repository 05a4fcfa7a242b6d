"""The page of `python -m moddistill.explore`: conversations, token probabilities, experts."""
