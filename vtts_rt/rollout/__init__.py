"""Rollout groups as trainers read them: rows, rewards, and the token tree of a gradient step."""
