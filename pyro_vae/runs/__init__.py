"""Runs: training, evaluation and pictures that live in a folder."""
