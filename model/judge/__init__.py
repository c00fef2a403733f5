"""How good a model is: scores, metrics, baselines, pages."""
