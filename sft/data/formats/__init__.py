"""A row of any shape becomes a `Conversation` or a `Text`."""
