"""Estimators of information, usable alone: nothing here imports the rest of ibprune."""
