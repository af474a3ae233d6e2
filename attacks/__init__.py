"""Checkpoints and maps as an attacker or a broken download leaves them, numbered, each with its refusal."""
