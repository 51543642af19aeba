"""What items are beside their ids: encoders of their text, and the towers that stand where a table of items stands."""
