"""Mixture-of-experts layers whose experts live on several ranks."""
