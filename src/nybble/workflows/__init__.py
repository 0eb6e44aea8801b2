"""Workflows: each reads top to bottom and calls down; nothing below calls back up."""
