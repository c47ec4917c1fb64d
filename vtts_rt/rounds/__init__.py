"""Rounds: a question checked and opened, its rounds scheduled, its events and answer made."""
