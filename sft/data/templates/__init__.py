"""Renders conversations as text with supervised spans, escapes control tokens, and holds the shipped templates."""
