"""Evaluation of models: likelihood-based measures, generated text, and tasks."""
