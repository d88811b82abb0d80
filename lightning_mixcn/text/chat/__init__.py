"""Lay conversations out as token ids: turns, templates, records of conversations."""
