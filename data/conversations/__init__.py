"""Conversations of data sets: the shapes that their rows have, and the tokens that an assistant says in them."""
