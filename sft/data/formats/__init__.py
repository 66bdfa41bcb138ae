"""Turns a row of any shape into a `Conversation` or a `Text`."""
