"""Transcoder adapters: how much of a fine-tuning a few features hold."""
